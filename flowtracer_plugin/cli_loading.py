"""Loading a model for a command, with mistakes in one sentence."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import typer

if TYPE_CHECKING:
    from flowtracer_plugin.attention import AttentionAdapter

_loading = partial(typer.Option, rich_help_panel="Loading the model")

ModelName = Annotated[str, typer.Option(help="Folder of a model, or its id on the hub.")]
Device = Annotated[
    str,
    _loading(
        help="auto, cpu, cuda, cuda:1, mps.",
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
    ),
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _loading(help="Precision of the model; auto is that of its files."),
]
Implementation = Annotated[
    str | None, _loading(help="Load the model with this: sdpa, eager, flash_attention_2, …")
]
RemoteCode = Annotated[
    bool, _loading("--trust-remote-code", help="Run the model code that its files bring along.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where errors arise.")]


def load_model(
    name: str, device: str, dtype: str, *, wanted: str = "a causal language model", **options: Any
) -> Any:
    """A causal language model, for inference. `options` are transformers' own."""
    with waiting("importing PyTorch and transformers"):
        from transformers import AutoModelForCausalLM

    from flowtracer_plugin.attention import known_adapters

    chosen = _device(device)
    # A distribution with an adapter may bring its architecture along, for transformers to know.
    known_adapters()
    with _friendly(name, wanted):
        options |= {"local_files_only": _without_hub(name)}
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model.to(chosen).eval()


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer that belongs to a model. `options` are transformers' own."""
    with waiting("importing PyTorch and transformers"):
        from transformers import AutoTokenizer

    with _friendly(name, "model and tokenizer"):
        options |= {"local_files_only": _without_hub(name)}
        return AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life in a terminal, while something takes seconds that nobody can foretell."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def named_adapter(name: str) -> AttentionAdapter:
    """The adapter of that name.

    Raises:
        typer.BadParameter: There is none, or it cannot be used.
    """
    from flowtracer_plugin.attention import adapter_entries

    entries = adapter_entries()
    found = [entry for entry in entries if entry.name == name]
    for entry in found:
        if entry.adapter and not entry.skipped:
            return entry.adapter
    known = ", ".join(entry.name for entry in entries if not entry.skipped)
    raise typer.BadParameter(
        f"{name} is skipped: {found[0].skipped}" if found else f"wanted {known}, found {name!r}",
        param_hint="--adapter",
    )


def check_adapter(adapter: AttentionAdapter | None, model: Any) -> None:
    """Refuse an adapter that does not know the model.

    Raises:
        UnsupportedArchitectureError: It says so itself.
    """
    from flowtracer_plugin.attention import UnsupportedArchitectureError

    if adapter is not None and not adapter.matches(model):
        raise UnsupportedArchitectureError(
            f"the adapter {adapter.name!r} is not for {type(model).__name__}: its matches() says "
            "no; leave --adapter out, or mend it"
        )


@contextmanager
def _friendly(name: str, wanted: str) -> Iterator[None]:
    from safetensors import SafetensorError
    from transformers.utils import logging

    talk: Any = logging
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
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        cause = str(error).partition("\n")[0].rstrip(" .:")
        # What is missing then is a package, and the cause names it.
        wish = f"; wanted a folder that save_pretrained() of {wanted} wrote"
        raise ValueError(
            f"cannot load {name!r}: {cause}{'' if isinstance(error, ImportError) else wish}"
            if here
            else f"there is no folder {name!r}, and no such model could be had from the hub: "
            f"{cause}; check its id and the connection, and if it is gated, hf auth login"
        ) from error


def _without_hub(name: str) -> bool:
    """Whether files must be here: the hub's client would try for minutes, with a line each time."""
    from huggingface_hub import constants

    if Path(name).exists() or getproxies().keys() - {"no"}:  # a proxy finds addresses itself
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter if PyTorch is built without CUDA
        raise typer.BadParameter(
            f"PyTorch has no {name!r} on this machine; cpu is always there, and auto takes "
            "the GPU if there is one",
            param_hint="--device",
        ) from error
    return name
