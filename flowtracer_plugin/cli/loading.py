"""How commands load a tokenizer, a model and a tracer; mistakes end in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from flowtracer_plugin.cli.options import LoadingOptions

if TYPE_CHECKING:
    from flowtracer_plugin.attention.adapter import AttentionAdapter
    from flowtracer_plugin.trace.tracer import FlowTracer


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner in a terminal during work of unknown length."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):
        yield


def load_tokenizer(name: str, options: LoadingOptions) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: The tokenizer cannot be loaded.
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.model import loading

    return loading.load_tokenizer(name, trust_remote_code=options.trust_remote_code)


def load_model(
    name: str, options: LoadingOptions, *, wanted: str = "a causal language model"
) -> Any:
    """A causal language model in evaluation mode; `wanted` names it in messages.

    Raises:
        typer.BadParameter: There is no such device.
        ValueError: The model cannot be loaded.
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.model import loading

    given = {key: value for key, value in vars(options).items() if value is not None}
    try:
        return loading.load_model(name, wanted=wanted, **given)
    except loading.UnknownDeviceError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


def load_tracer(
    name: str, options: LoadingOptions, tokenizer: Any, *, adapter: str | None = None, **given: Any
) -> FlowTracer:
    """A tracer of a model; `given` goes to `wrap`, and without a tokenizer the model's is loaded.

    Raises:
        typer.BadParameter: There is no such device or adapter.
        ValueError: The model cannot be loaded, or the adapter does not fit it.
    """
    with waiting("importing PyTorch, transformers and nnsight"):
        from flowtracer_plugin.trace.tracer import wrap
    chosen = named_adapter(adapter)  # first of all, since nothing must be loaded for it
    tokenizer = tokenizer or load_tokenizer(name, options)
    model = load_fitting(name, options, chosen, wanted="model and tokenizer")
    return wrap(model, tokenizer, adapter=chosen, **given)


def load_fitting(
    name: str, options: LoadingOptions, adapter: AttentionAdapter | None, **others: Any
) -> Any:
    """A model as by `load_model`, which the adapter must fit, if there is one.

    Raises:
        UnsupportedArchitectureError: The adapter does not fit the model.
    """
    from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError

    model = load_model(name, options, **others)
    if adapter is not None and not adapter.matches(model):
        raise UnsupportedArchitectureError(
            f"the adapter {adapter.name!r} is not for {type(model).__name__}: its matches() says "
            "no; leave --adapter out, or fix it"
        )
    return model


def named_adapter(name: str | None) -> AttentionAdapter | None:
    """The adapter of this name; None for None.

    Raises:
        typer.BadParameter: There is none, or it cannot be used.
    """
    if name is None:
        return None
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
