"""HRM, which runs its two stacks of layers several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from flowtracer_adapters.interface import interface_call, interface_sites
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite


@final
class RecurrentDepthAdapter(AttentionAdapter):
    """Counts each run of a layer as a layer of its own, in the order of execution.

    In every high cycle, the low stack runs `L_cycles` times, then the high stack once. So "middle"
    means the middle of the computation, and each run of a module is a visit of its own.
    """

    name: ClassVar[str] = "hrm_text"
    interface: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return any(type(module).__name__ == "HrmTextModel" for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        once = interface_sites(model)
        visits: Counter[str] = Counter()
        sites = []
        for layer, stack in enumerate(_runs(model)):
            site = next(s for s in once if s.module == stack)
            sites.append(
                AttentionSite(
                    layer=layer,
                    module=site.module,
                    function=site.function,
                    visit=visits[site.module],
                )
            )
            visits[site.module] += 1
        return tuple(sites)

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        return interface_call(module, args, kwargs)


def _runs(model: nn.Module) -> Iterator[str]:
    """Paths of the attention modules, one for each run, in the order of execution."""
    path, body = next(
        (p, m) for p, m in model.named_modules() if type(m).__name__ == "HrmTextModel"
    )
    config: Any = body.config
    paths = [p for p, m in model.named_modules() if type(m).__name__ == "HrmTextAttention"]
    prefix = f"{path}." if path else ""
    low = [p for p in paths if p.startswith(f"{prefix}L_module.")]
    high = [p for p in paths if p.startswith(f"{prefix}H_module.")]
    for _ in range(config.H_cycles):
        for _ in range(config.L_cycles):
            yield from low
        yield from high
