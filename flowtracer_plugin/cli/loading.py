"""Loading a model for a command, with mistakes in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from flowtracer_plugin.attention.adapter import AttentionAdapter

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


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life in a terminal, while something takes seconds that nobody can foretell."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def load_model(
    name: str, device: str, dtype: str, *, wanted: str = "a causal language model", **options: Any
) -> Any:
    """A causal language model, for inference. `options` are transformers' own.

    Raises:
        typer.BadParameter: There is no such device.
        ValueError: The model cannot be loaded.
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.model import loading

    try:
        return loading.load_model(name, device, dtype, wanted=wanted, **options)
    except loading.UnknownDeviceError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer that belongs to a model. `options` are transformers' own."""
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.model import loading

    return loading.load_tokenizer(name, **options)


def named_adapter(name: str) -> AttentionAdapter:
    """The adapter of that name.

    Raises:
        typer.BadParameter: There is none, or it cannot be used.
    """
    from flowtracer_plugin.attention.adapter import adapter_entries

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
    from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError

    if adapter is not None and not adapter.matches(model):
        raise UnsupportedArchitectureError(
            f"the adapter {adapter.name!r} is not for {type(model).__name__}: its matches() says "
            "no; leave --adapter out, or mend it"
        )
