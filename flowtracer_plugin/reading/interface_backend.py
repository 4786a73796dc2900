"""Reading through transformers' own table of attention functions, without nnsight.

It serves where nnsight cannot: tensor parallel models, several threads, builds without source.
While a model is read, the table's entry for its implementation is a function that passes the
arguments on to the reader, then calls the original entry. Configuration, masks and results stay
the same, and other models that run at the same time are not affected.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, ClassVar, final

import torch
from torch import nn

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionSite,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.reading.backend import Backend, Inputs, Receive, Result, Sites

TABLE = "ALL_ATTENTION_FUNCTIONS"
"""The global of a model's code that maps the name of an implementation to its function."""

EAGER = "eager_attention_forward"
"""Ending of the names of the functions that models fall back on: the table has no "eager"."""


class _Done(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """The last site has been read."""


class _Watch:
    """The sites that one thread waits for, in one run of the model or in several."""

    def __init__(
        self,
        modules: Mapping[AttentionSite, nn.Module],
        sites: Sites,
        receive: Receive,
        *,
        runs: int = 1,
        whole: bool = False,
        stops: bool = False,
    ) -> None:
        self._sites = {(modules[site], site.visit): site for site in sites}
        self._visits_each = Counter(modules.values())  # in one run
        self._visits: Counter[nn.Module] = Counter()
        self._waiting = Counter(dict.fromkeys(sites, runs))
        self._receive, self._whole, self._stops = receive, whole, stops

    @torch.compiler.disable  # type: ignore[untyped-decorator] # it has effects outside the graph
    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Make one attention call, and hand it to `receive` if its site is waited for."""
        module = args[0]
        visit = self._visits[module] % (self._visits_each[module] or 1)
        self._visits[module] += 1
        site = self._sites.get((module, visit))
        if site is None:
            return function(*args, **kwargs)
        output = function(*args, **kwargs) if self._whole else None
        self._receive(site, args, kwargs, output)
        self._waiting[site] -= 1
        if self._whole:
            return output
        if self._stops and not any(self._waiting.values()):
            raise _Done
        return function(*args, **kwargs)

    def missed(self) -> AttentionSite | None:
        """A site that was reached less often than `runs`, if there is one."""
        return next((site for site, times in self._waiting.items() if times > 0), None)


_current: ContextVar[_Watch | None] = ContextVar("watch", default=None)
"""The watch of this thread."""


@final
class InterfaceBackend(Backend):
    """Reads the calls of transformers' attention interface, in any number of threads."""

    name: ClassVar[str] = "interface"
    threads: ClassVar[bool] = True

    def __init__(self, model: nn.Module, adapter: AttentionAdapter, sites: Sites) -> None:
        super().__init__(model, adapter, sites)
        if not adapter.interface:
            raise UnsupportedArchitectureError(
                f"the adapter {adapter.name!r} reads calls inside the code of "
                f"{type(model).__name__}, not of transformers' attention interface (else it says "
                'interface = True), so backend="interface" cannot see them; leave backend= out'
            )
        self._modules = {site: model.get_submodule(site.module) for site in sites}

    def run(self, inputs: Inputs, sites: Sites, receive: Receive, *, whole: bool) -> Any:
        """As `Backend.run`."""
        watch = _Watch(self._modules, sites, receive, whole=whole, stops=not whole)
        try:
            return self._call(lambda: self._model(**inputs), watch)
        except _Done:
            return None

    def listen(
        self, call: Callable[[], Result], sites: Sites, receive: Receive, *, runs: int
    ) -> Result:
        """As `Backend.listen`."""
        return self._call(call, _Watch(self._modules, sites, receive, runs=runs))

    def _call(self, call: Callable[[], Result], watch: _Watch) -> Result:
        before = _current.set(watch)
        try:
            with ExitStack() as entries:
                for table, name in self._entries():
                    entries.enter_context(_replaced(table, name))
                output = call()
        finally:
            _current.reset(before)
        if (missed := watch.missed()) is not None:
            raise AdapterMismatchError(
                f"the adapter {self._adapter.name!r} lists {missed.module}, visit "
                f"{missed.visit}, which makes no attention call; mend its sites(), or "
                "wrap(..., adapter=...) another one"
            )
        return output

    def _entries(self) -> Iterable[tuple[MutableMapping[str, Any], str]]:
        found = map(_table_and_name, set(self._modules.values()))
        return {(id(table), name): (table, name) for table, name in found}.values()


def _globals(module: nn.Module) -> dict[str, Any]:
    """The global names that the code of the module's `forward` uses."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})


def _table_and_name(module: nn.Module) -> tuple[MutableMapping[str, Any], str]:
    """The table that the module takes its function from, and the name that it asks for."""
    table = _globals(module).get(TABLE)
    if table is None:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not use transformers' attention interface, so "
            'backend="interface" cannot see it; leave backend= out'
        )
    config: Any = module.config
    return table, config._attn_implementation


_entry_users: Counter[tuple[int, str]] = Counter()
_entries_lock = Lock()


@contextmanager
def _replaced(table: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """Put a watching entry into the table, for as long as any thread needs it."""
    key = (id(table), name)
    with _entries_lock:
        _entry_users[key] += 1
        if _entry_users[key] == 1:
            table[name] = _TableEntry(table.get(name))
    try:
        yield
    finally:
        with _entries_lock:
            _entry_users[key] -= 1
            if not _entry_users[key]:
                _restore(table, name)


def _restore(table: MutableMapping[str, Any], name: str) -> None:
    original = table[name].original
    del table[name]
    # The original may have been an entry of this table only, not one that all tables share.
    if original is not None and table.get(name) is not original:
        table[name] = original


class _TableEntry:
    """An entry of the table that shows the arguments to this thread's watch, if it has one."""

    def __init__(self, original: Callable[..., Any] | None) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.original or _eager(args[0])
        watch = _current.get()
        return function(*args, **kwargs) if watch is None else watch.call(function, args, kwargs)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The function of the model's own code that its `forward` falls back on."""
    forward = inspect.unwrap(type(module).forward)
    (name,) = (name for name in forward.__code__.co_names if name.endswith(EAGER))
    return _globals(module)[name]
