"""Load a model and its tokenizer by name, with errors of one sentence."""

from __future__ import annotations

import logging
import re
import socket
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flowtracer_plugin.attention.adapter import known_adapters
from flowtracer_plugin.files import parsed

logger = logging.getLogger(__name__)


class UnknownDeviceError(ValueError):
    """PyTorch has no such device on this machine."""


def load_model(
    name: str, device: str, dtype: str, *, wanted: str = "a causal language model", **options: Any
) -> Any:
    """A causal language model in evaluation mode; `options` are those of `from_pretrained`.

    Raises:
        UnknownDeviceError: There is no such device.
        ValueError: The model cannot be loaded; the message says why.
    """
    chosen, started = _device(device), perf_counter()
    # Importing an adapter may register its architecture with transformers.
    known_adapters()
    with _friendly(name, wanted):
        options |= {"local_files_only": _without_hub(name)}
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    model = model.to(chosen).eval()
    seconds = perf_counter() - started
    logger.info("loaded %s as %s on %s in %.2f s", name, model.dtype, chosen, seconds)
    return model


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model; `options` are those of `from_pretrained`.

    Raises:
        ValueError: It cannot be loaded; the message says why.
    """
    with _friendly(name, "model and tokenizer"):
        options |= {"local_files_only": _without_hub(name)}
        return AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def _friendly(name: str, wanted: str) -> Iterator[None]:
    talk: Any = transformers_logging
    if not sys.stderr.isatty():
        talk.disable_progress_bar()
    here = Path(name).exists()
    if not (here or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)):
        raise ValueError(
            f"there is no folder {name!r}; wanted the folder of a Hugging Face model, or its id on "
            "the hub, such as Qwen/Qwen3-0.6B"
        )
    kinds = ("config.json", "adapter_config.json")  # a whole model, or an adapter of PEFT
    if here and not any((Path(name) / kind).is_file() for kind in kinds):
        raise ValueError(f"{name!r} has no config.json; wanted the folder of a Hugging Face model")
    damages = (TypeError, AttributeError, LookupError, RecursionError, StrictDataclassError)
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, *damages) as error:
        if isinstance(error, damages) and not here:
            raise
        cause = (_damaged(Path(name)) if here else None) or str(error)
        if "instantiate the backend tokenizer" in cause:
            cause = "it has no tokenizer (tokenizer.json, tokenizer.model or another)"
        cause = cause.partition("\n")[0].rstrip(" .:")
        # These name the missing package, or an option, and need no advice about folders.
        enough = isinstance(error, ImportError) or cause.startswith("Specified `attn_")
        wish = f"; wanted a folder that save_pretrained() of {wanted} wrote"
        raise ValueError(
            f"cannot load {name!r}: {cause}{'' if enough else wish}"
            if here
            else f"there is no folder {name!r}, and no such model could be loaded from the hub: "
            f"{cause}; check its id and the connection, and if it is gated, hf auth login"
        ) from error


_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
)


def _damaged(folder: Path) -> str | None:
    """The first file of settings that is no JSON object, which transformers does not name."""
    for file in (folder / name for name in _SETTINGS):
        if not file.is_file():
            continue
        content = file.read_bytes()
        if content.startswith(BOM_UTF8):
            return f"{str(file)!r} begins with a byte order mark; save it without one"
        try:
            held = parsed(content)
        except ValueError as error:
            return f"{str(file)!r} is damaged: {error}"
        if not isinstance(held, dict):
            return f"{str(file)!r} is damaged: wanted a JSON object, found {held!r:.40}"
    return None


def _without_hub(name: str) -> bool:
    """Whether the hub is out of reach: its client would retry for minutes, and print each retry."""
    if Path(name).exists() or getproxies().keys() - {"no"}:  # a proxy resolves names itself
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter if PyTorch is built without CUDA
        raise UnknownDeviceError(
            f"PyTorch has no {name!r} on this machine; cpu is always there, and auto takes "
            "the GPU if there is one"
        ) from error
    return name
