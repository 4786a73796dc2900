"""What the results of a tracer depend on, as plain values: the fingerprint of a run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowtracer_plugin import __version__
from flowtracer_plugin.credit.own_scorers import source_digest
from flowtracer_plugin.files import (
    check_folder,
    check_settings,
    is_part,
    parsed,
    typed,
    write_first,
)
from flowtracer_plugin.model.causal_lm import model_name
from flowtracer_plugin.text.answers import AnswerFinder, finder_name
from flowtracer_plugin.trace.tracer import FlowTracer

FORMAT = "flowtracer.data_set"
VERSION = 3

SETTINGS = "settings.json"
"""The file beside the tables that holds the fingerprint."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "nnsight", "numpy")


def fingerprint(tracer: FlowTracer) -> dict[str, Any]:
    """The model, its weights, the options of the flow and the versions of the libraries."""
    config: Any = tracer.model.config
    tokenizer = tracer.require_tokenizer()
    words = sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)
    return {
        "model": model_name(tracer.model),
        "revision": getattr(config, "_commit_hash", None),
        "config": _hash(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str)),
        "weights": weights_digest(tracer.model),
        "tokenizer": _hash(json.dumps(words)),
        "dtype": str(tracer.model.dtype),
        "flow": {**asdict(tracer.options), "layers": list(tracer.layers)},
        "answer": finder_digest(tracer.answer),
        "mode": tracer.mode,
        "adapter": tracer.reader.adapter.name,
        "backend": tracer.reader.backend.name,
        "versions": {"flowtracer-plugin": __version__} | {one: version(one) for one in _LIBRARIES},
    }


def finder_digest(finder: AnswerFinder) -> str:
    """What tells answer finders apart: a name, a pattern with its flags, or a function's source."""
    if isinstance(finder, str):
        return finder
    if isinstance(finder, re.Pattern):
        return f"{finder.pattern} {finder.flags}"
    return f"{finder_name(finder)} {source_digest(finder, finder_name(finder))}"


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the path that it was loaded from, which may differ by machine."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights and buffers, the same on every device.

    It reads about a gigabyte a second. Weights that are on no device, as they are where a model is
    larger than the memory, count with their names and shapes alone.
    """
    found = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return flat.cpu().numpy().data


def _hash(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside the tables, or check that those there are the same.

    Of several processes that begin at once, one writes them and the others check.

    Raises:
        ValueError: The folder holds results with other settings.
        OSError: The folder cannot be written.
    """
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_first(path, json.dumps(settings, indent=1).encode())
    check_claim(folder, settings)


def check_claim(folder: Path, settings: dict[str, Any]) -> None:
    """Check settings that are known before the model is loaded against those in the folder.

    Raises:
        ValueError: The folder holds results with other settings, or of another kind.
        OSError: The folder cannot be written.
    """
    check_folder(folder)
    path = folder / SETTINGS
    if not path.exists():
        if folder.is_dir() and not all(map(is_part, folder.iterdir())):
            raise ValueError(
                f"cannot write to the folder {str(folder)!r}: it holds other files and no "
                f"{SETTINGS}; name a new or empty folder"
            )
        return
    try:
        held = typed(dict[str, Any], parsed(path.read_bytes()))
    except ValueError as error:
        raise ValueError(
            f"cannot go on with {str(folder)!r}: {SETTINGS} is damaged ({error}); name another "
            "folder"
        ) from error
    if held.get("rows", settings.get("rows")) != settings.get("rows"):
        raise ValueError(
            f"{str(path)!r} holds results of {held['rows']} rows, and the data have "
            f"{settings['rows']} now: finished shards fit the same rows only; give the same data "
            "and --limit, or write to another folder"
        )
    check_settings(path, held, settings, place="folder")
