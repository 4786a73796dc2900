"""Reading through transformers' own table of attention functions, without nnsight.

For the places where nnsight cannot go: tensor parallel models, several threads, builds without
source. While a model is read, the table's entry for its implementation is a function that looks
at the arguments and calls the entry that was there. Configuration, masks and results stay the
same, and so does whatever other models do meanwhile.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, ClassVar, final

from torch import nn

from flowtracer_plugin.attention import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionSite,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.backends import Backend, Receive

TABLE = "ALL_ATTENTION_FUNCTIONS"
"""The global of a model's code that maps the name of an implementation to its function."""

EAGER = "eager_attention_forward"
"""How the names end of the functions that models fall back on: the table has no "eager"."""


class _Done(Exception):  # noqa: N818 - no error: it ends a forward pass that has served
    """The last site has been read."""


class _Watch:
    """What one run in one thread looks for."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        receive: Receive,
        whole: bool,
    ) -> None:
        self._waiting = {(model.get_submodule(s.module), s.visit): s for s in sites}
        self._visits: Counter[nn.Module] = Counter()
        self._receive, self._whole = receive, whole

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Pass one attention call on, and note it if it is one that is looked for."""
        module = args[0]
        site = self._waiting.pop((module, self._visits[module]), None)
        self._visits[module] += 1
        if site is None:
            return function(*args, **kwargs)
        output = function(*args, **kwargs) if self._whole else None
        self._receive(site, args, kwargs, output)
        if self._whole:
            return output
        if not self._waiting:
            raise _Done
        return function(*args, **kwargs)

    def missed(self) -> list[AttentionSite]:
        return list(self._waiting.values())


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)
"""Of this thread."""


@final
class InterfaceBackend(Backend):
    """Reads the calls of transformers' attention interface, in any number of threads."""

    name: ClassVar[str] = "interface"
    threads: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, adapter: AttentionAdapter, sites: Sequence[AttentionSite]
    ) -> None:
        if not adapter.interface:
            raise UnsupportedArchitectureError(
                f"the adapter {adapter.name!r} reads calls inside the code of "
                f"{type(model).__name__}, not of transformers' attention interface (else it says "
                'interface = True), so backend="interface" cannot see them; leave backend= out'
            )
        self._model, self._adapter = model, adapter
        self._modules = {model.get_submodule(site.module) for site in sites}

    def run(
        self,
        inputs: Mapping[str, Any],
        sites: Sequence[AttentionSite],
        receive: Receive,
        *,
        whole: bool,
    ) -> Any:
        """As `Backend.run`.

        Raises:
            AdapterMismatchError: A site names a call that the model does not make.
        """
        watch = _Watch(self._model, sites, receive, whole)
        before = _watch.set(watch)
        try:
            with ExitStack() as entries:
                for table, name in self._entries():
                    entries.enter_context(_watched(table, name))
                output = self._model(**inputs)
        except _Done:
            return None
        finally:
            _watch.reset(before)
        if missed := watch.missed():
            raise AdapterMismatchError(
                f"the adapter {self._adapter.name!r} lists {missed[0].module}, visit "
                f"{missed[0].visit}, which makes no attention call; mend its sites(), or "
                "wrap(..., adapter=...) another one"
            )
        return output

    def _entries(self) -> Iterable[tuple[MutableMapping[str, Any], str]]:
        found = map(_entry, self._modules)
        return {(id(table), name): (table, name) for table, name in found}.values()


def _globals(module: nn.Module) -> dict[str, Any]:
    """The names that the code of the module's `forward` sees."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})


def _entry(module: nn.Module) -> tuple[MutableMapping[str, Any], str]:
    """The table that the module looks into, and the name that it looks for."""
    table = _globals(module).get(TABLE)
    if table is None:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not use transformers' attention interface, so "
            'backend="interface" cannot see it; leave backend= out'
        )
    config: Any = module.config
    return table, config._attn_implementation


_watched_entries: Counter[tuple[int, str]] = Counter()
_entries_lock = Lock()


@contextmanager
def _watched(table: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """The table with a watching entry, for as long as any thread needs it."""
    key = (id(table), name)
    with _entries_lock:
        _watched_entries[key] += 1
        if _watched_entries[key] == 1:
            table[name] = _Watching(table.get(name))
    try:
        yield
    finally:
        with _entries_lock:
            _watched_entries[key] -= 1
            if not _watched_entries[key]:
                _put_back(table, name)


def _put_back(table: MutableMapping[str, Any], name: str) -> None:
    original = table[name].original
    del table[name]
    # What was there may have been an entry of this very table, not one that all tables share.
    if original is not None and table.get(name) is not original:
        table[name] = original


class _Watching:
    """An entry of the table that looks at the arguments on their way to the original."""

    def __init__(self, original: Callable[..., Any] | None) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.original or _eager(args[0])
        watch = _watch.get()
        return function(*args, **kwargs) if watch is None else watch.call(function, args, kwargs)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The function of the model's own code that its `forward` falls back on."""
    forward = inspect.unwrap(type(module).forward)
    (name,) = (name for name in forward.__code__.co_names if name.endswith(EAGER))
    return _globals(module)[name]
