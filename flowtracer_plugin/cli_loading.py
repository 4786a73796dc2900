"""Loading a model for a command, with mistakes in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision of the model; auto is that of its files."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where errors arise.")]


def load_model(
    name: str, device: str, dtype: str, *, wanted: str = "a causal language model", **options: Any
) -> Any:
    """A causal language model, for inference. `options` are transformers' own."""
    from transformers import AutoModelForCausalLM

    from flowtracer_plugin.attention import known_adapters

    chosen = _device(device)
    # A distribution with an adapter may bring its architecture along, for transformers to know.
    known_adapters()
    with _friendly(name, wanted):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model.to(chosen).eval()


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer that belongs to a model. `options` are transformers' own."""
    from transformers import AutoTokenizer

    with _friendly(name, "model and tokenizer"):
        return AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def _friendly(name: str, wanted: str) -> Iterator[None]:
    from safetensors import SafetensorError
    from transformers.utils import logging

    talk: Any = logging
    if not sys.stderr.isatty():
        talk.disable_progress_bar()
    here = Path(name).exists()
    kinds = ("config.json", "adapter_config.json")  # a whole model, or an adapter of PEFT
    if here and not any((Path(name) / kind).is_file() for kind in kinds):
        raise ValueError(f"{name!r} has no config.json; wanted the folder of a Hugging Face model")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        cause = str(error).partition("\n")[0].rstrip(" .:")
        raise ValueError(
            f"cannot load {name!r}: {cause}; "
            f"wanted a folder that save_pretrained() of {wanted} wrote"
            if here
            else f"there is no folder {name!r}, and no such model could be had from the hub: "
            f"{cause}; check its id and the connection, and if it is gated, hf auth login"
        ) from error


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter if PyTorch is built without CUDA
        raise typer.BadParameter(
            f"PyTorch has no {name!r} on this machine; wanted auto, cpu, cuda, cuda:1 or mps",
            param_hint="--device",
        ) from error
    return name
