"""Whether an adapter lists exactly the sites where the model attends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident

from torch import nn

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionSite,
    UnsupportedArchitectureError,
    known_adapters,
)


def check_sites(
    model: nn.Module, adapter: AttentionAdapter, sites: Sequence[AttentionSite]
) -> None:
    """Refuse sites that the model does not have, or that leave out some of its layers.

    Raises:
        AdapterMismatchError: The model has no module of that path.
        UnsupportedArchitectureError: Some layers attend in another way, which the adapter misses.
    """
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for site in sites:
        if site.module not in paths:
            raise AdapterMismatchError(
                f"the adapter {adapter.name!r} lists the module {site.module!r}, which "
                f"{type(model).__name__} does not have; mend its sites()"
            )
    if adapter.generic:
        _check_layers(model, adapter, {site.layer for site in sites})


def _check_layers(model: nn.Module, adapter: AttentionAdapter, found: set[int]) -> None:
    """Refuse a model with two ways of attending: each generic adapter finds only one."""
    for other in (one for one in known_adapters() if one.generic):
        for site in other.sites(model):
            if site.layer not in found:
                raise UnsupportedArchitectureError(
                    f"{type(model).__name__} attends in two ways: the adapter "
                    f"{adapter.name!r} reads layers {sorted(found)}, and only "
                    f"{other.name!r} finds {site.module}; write an adapter that lists both "
                    "('flowtracer docs adapters'), and pass it as wrap(model, adapter=...)"
                )


def check_runs(
    model: nn.Module,
    adapter: AttentionAdapter,
    sites: Sequence[AttentionSite],
    visits: Counter[str],
) -> None:
    """Refuse sites that a forward pass visits more or less often than the adapter lists them.

    Raises:
        AdapterMismatchError: The numbers differ.
    """
    listed = Counter(site.module for site in sites)
    for path, runs in visits.items():
        if runs != listed[path]:
            raise AdapterMismatchError(
                f"{type(model).__name__} runs {path} {runs} times in one forward pass, "
                f"and the adapter {adapter.name!r} lists {listed[path]} visits of it; "
                "mend its sites()"
            )


@contextmanager
def counted_runs(model: nn.Module, sites: Sequence[AttentionSite]) -> Iterator[Counter[str]]:
    """Count how often this thread runs each attention module inside the `with` block."""
    visits: Counter[str] = Counter()
    me = get_ident()
    with ExitStack() as hooks:
        for path in {site.module for site in sites}:
            hook = model.get_submodule(path).register_forward_pre_hook(
                # Other threads may run the model at the same time, and count their own runs.
                lambda *_, path=path: visits.update([path] if get_ident() == me else [])
            )
            hooks.callback(hook.remove)
        yield visits
