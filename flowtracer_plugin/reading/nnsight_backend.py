"""Reading through nnsight, which watches the operations of unchanged model code.

No other module uses nnsight. nnsight reads the source of every traced block and runs it beside the
forward pass, so the blocks here stay plain: they read in the order of execution, without a
decorator and without `no_grad` around a read.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, final

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.source import SourceNotAvailable
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch import nn

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionSite,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.model.causal_lm import input_device
from flowtracer_plugin.reading.backend import Backend, Inputs, Receive, Result, Sites


class _Root(nnsight.NNsight):  # type: ignore[misc] # nnsight ships no types
    """nnsight sends inputs to the device of the first parameter, which is "meta" if offloaded."""

    @property
    def device(self) -> torch.device:
        return input_device(self._module)


@final
class NnsightBackend(Backend):
    """Reads any call that the source of a module makes.

    nnsight puts a controller around every module's `forward` that does nothing outside a trace. It
    runs one trace at a time on a model. If another thread uses the model during a trace, both fail.
    """

    name: ClassVar[str] = "nnsight"
    threads: ClassVar[bool] = False

    def __init__(self, model: nn.Module, adapter: AttentionAdapter, sites: Sites) -> None:
        super().__init__(model, adapter, sites)
        with warnings.catch_warnings():
            # Another library, such as TRL, may have put its own `forward` over an instrumented
            # one. The new one calls the instrumented one, so nothing is lost.
            warnings.filterwarnings("ignore", ".*`forward` was replaced after nnsight wrapped")
            # BERT calls a module "output", and nnsight offers it under another name.
            warnings.filterwarnings("ignore", ".*submodule named")
            self._root = _Root(model)

    def run(self, inputs: Inputs, sites: Sites, receive: Receive, *, whole: bool) -> Any:
        """As `Backend.run`."""
        with self._explained():
            return self._trace(inputs, self._operations(sites), receive, whole)

    def listen(
        self, call: Callable[[], Result], sites: Sites, receive: Receive, *, runs: int
    ) -> Result:
        """As `Backend.listen`."""
        each = Counter(site.module for site in self._sites)
        later = [
            (replace(site, visit=site.visit + run * each[site.module]), site, operation)
            for run in range(runs)
            for site, operation in self._operations(sites)
        ]
        returned: list[Result] = []
        reached: list[AttentionSite] = []
        with self._explained(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was never reached")  # _check_reached raises
            # nnsight wants an input to run the function on.
            with self._root.trace(None, fn=lambda _: returned.append(call())) as trace:
                for place, site, operation in later:
                    for _ in trace.iter[place.visit : place.visit + 1]:
                        args, kwargs = self._inner(site, operation).inputs
                        receive(site, args, kwargs, None)
                        reached.append(site)
        self._check_reached(reached, [site for _, site, _ in later])
        return returned[0]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn nnsight's errors into those of this package, and put the model's own code back."""
        try:
            yield
        except OutOfOrderError as error:
            raise AdapterMismatchError(
                f"the adapter {self._adapter.name!r} lists an attention call that "
                f"{type(self._model).__name__} does not make, or makes in another order: {error}; "
                "mend its sites(), or wrap(..., adapter=...) another one. Or does another thread "
                'run the model at the same time? Then wrap(..., backend="interface")'
            ) from error
        except (SourceNotAvailable, WithBlockNotFoundError) as error:
            raise UnsupportedArchitectureError(
                f"nnsight needs the source of {type(self._model).__name__} and of this package, "
                f'and one has none here ({error}); wrap(..., backend="interface") needs none'
            ) from error
        finally:
            self._release()

    def _trace(
        self,
        inputs: Inputs,
        calls: Sequence[tuple[AttentionSite, Any]],
        receive: Receive,
        whole: bool,
    ) -> Any:
        output = None
        reached: list[AttentionSite] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was never reached")  # _check_reached raises
            with self._root.trace(**inputs) as run:
                for site, call in calls:
                    for _ in run.iter[site.visit : site.visit + 1]:
                        operation = self._inner(site, call)
                        args, kwargs = operation.inputs
                        receive(site, args, kwargs, operation.output if whole else None)
                        reached.append(site)
                if whole:
                    output = nnsight.save(self._root.output)
                else:
                    run.stop()
        self._check_reached(reached, [site for site, _ in calls])
        return output

    def _check_reached(self, reached: Sites, wanted: Sites) -> None:
        if len(reached) < len(wanted):
            missed = wanted[len(reached)]
            raise AdapterMismatchError(
                f"the adapter {self._adapter.name!r} lists visit {missed.visit} of "
                f"{missed.module}, which {type(self._model).__name__} does not run so often; mend "
                "its sites()"
            )

    def _operations(self, sites: Sites) -> list[tuple[AttentionSite, Any]]:
        return [(site, self._operation(site)) for site in sites]

    def _operation(self, site: AttentionSite) -> Any:
        """The call that `forward` itself makes: the attention call, or the method that makes it."""
        method, _, inner = site.function.rpartition("/")
        source = self._root.get(site.module).source
        return self._listed(source, site, method or inner, -1 if method else site.occurrence)

    def _inner(self, site: AttentionSite, operation: Any) -> Any:
        """The attention call, also inside a method that `forward` calls, known while that runs."""
        method, _, inner = site.function.rpartition("/")
        if not method:
            return operation
        return self._listed(operation.source, site, inner, site.occurrence)

    def _listed(self, source: Any, site: AttentionSite, function: str, occurrence: int) -> Any:
        """The operation of that name in the listing of a function's source.

        nnsight's labels carry a counter that changes between versions, and it counts assignments to
        a name with its calls, before them. So operations are found by name and place, not by label.
        """
        name = function.replace(".", "_")
        wanted = [op for op in source if op.name.rpartition("_")[0] == name]
        if not -len(wanted) <= occurrence < len(wanted):
            raise AdapterMismatchError(
                f"the adapter {self._adapter.name!r} looks for a call of {site.function!r} in "
                f"{site.module}, which makes these: {', '.join(_calls(source))}"
            )
        return wanted[occurrence]

    def _release(self) -> None:
        """Put the attention modules' own code back, so that the model can be compiled.

        nnsight instruments a module's code when its source is first read, and never undoes this.
        """
        for site in self._sites:
            state = vars(self._model.get_submodule(site.module)).get("__nnsight__")
            if state is not None:
                state.body, state.sourced, state.compiled = state.original, False, None


def _calls(source: Any) -> list[str]:
    """The names before the parentheses in a function's source, as an adapter writes them.

    nnsight's labels have underscores for dots, a counter, and an entry for each assignment.
    """
    found = []
    for operation in source:
        called = re.findall(r"([\w.]+)\(", operation.text)
        names = {name.strip(".").replace(".", "_"): name.strip(".") for name in called}
        found.append(names.get(operation.name.rpartition("_")[0]))
    return [
        name if times == 1 else f"{name} ({times} times)"
        for name, times in Counter(filter(None, found)).items()
    ]
