"""The check that an adapter reads what the model computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.head_mean import add_head_mean, attention_output, tokens_of
from flowtracer_plugin.attention.rounding import difference, rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteReport:
    """What the self-check found at one site.

    Attributes:
        site: The site.
        heads: Number of query heads.
        groups: Number of key heads, 0 if no values were read.
        difference: Difference between probabilities times values and the model's own attention
            output, as a share of the size of that output.
        tolerance: The largest difference that rounding explains.
        row_sum: The smallest sum of a visible row: less than 1 with sinks.
        ahead: The largest share of a token's attention that goes to later tokens.
        padding: Number of padding tokens before the text.
    """

    site: AttentionSite
    heads: int
    groups: int
    difference: float
    tolerance: float
    row_sum: float
    ahead: float
    padding: int


def report_site(
    site: AttentionSite,
    call: AttentionCall | AttentionWeights,
    output: Any,
    visible: Bool[Tensor, " token"],
) -> SiteReport:
    """The comparison of a call, as it was read, with what the model computed from it.

    Raises:
        AdapterMismatchError: Their shapes differ, or the adapter reads no values.
    """
    weights = call.weights if isinstance(call, AttentionWeights) else call.query
    # Models that attend in chunks pad the text behind its end.
    visible = nn.functional.pad(visible, (0, max(0, weights.shape[2] - len(visible))))
    tokens = len(visible)
    if (found := tokens_of(call)) != tokens:
        raise AdapterMismatchError(
            f"{site.module} attends to {found} keys for a text of {tokens} tokens; say in "
            "AttentionCall.key_tokens which tokens they stand for"
        )
    mean = torch.zeros(1, tokens, tokens, dtype=torch.float32, device=visible.device)
    add_head_mean(call, mean)
    seen = mean[0, visible]
    difference, tolerance = _output_error(call, output, visible.to(weights.device))
    return SiteReport(
        site=site,
        heads=weights.shape[1],
        groups=0 if call.value is None else call.value.shape[1],
        difference=difference,
        tolerance=tolerance,
        row_sum=float(seen.sum(-1).min()),
        ahead=float(mean[0].triu(1)[visible].sum(-1).max()),
        padding=int((~visible).sum()),
    )


def check_report(report: SiteReport, adapter: str) -> None:
    """Refuse a site that was misread, or that attends to the future.

    Raises:
        AdapterMismatchError: Probabilities times values are not the model's attention output.
        UnsupportedArchitectureError: Tokens attend to later tokens.
    """
    where = report.site.module
    if not report.difference <= report.tolerance:
        raise AdapterMismatchError(
            f"the adapter {adapter!r} misreads {where}: probabilities times values differ from the "
            f"attention output by {report.difference:.1e} of its size, wanted at most "
            f"{report.tolerance:.0e}; mend its read(), or wrap(..., adapter=...) another one"
        )
    if report.ahead > report.tolerance:
        raise UnsupportedArchitectureError(
            f"{where} attends to later tokens (up to {report.ahead:.0%} of a token's attention): "
            "the model is not causal, and information does not flow forward in it. Encoders that "
            "can be decoders are so with is_decoder=True in their configuration (XLM: causal=True, "
            'XLNet: attn_type="uni")'
        )


def worst(reports: Iterable[SiteReport]) -> SiteReport:
    """The worst of several reports of one site."""
    # No comparison with NaN is true, so a plain maximum could miss it.
    return max(
        reports,
        key=lambda r: (
            not r.difference <= r.tolerance,
            r.ahead > r.tolerance,
            r.difference != r.difference,
            r.difference,
            r.ahead,
        ),
    )


def _output_error(
    call: AttentionCall | AttentionWeights, output: Any, visible: Bool[Tensor, " token"]
) -> tuple[float, float]:
    """The difference between probabilities times values and the attention output, and its bound."""
    wanted = output[0] if isinstance(output, tuple) else output
    if call.value is None and isinstance(call, AttentionWeights):
        # Such calls are read at the softmax itself, whose output is the weights.
        return difference(call.weights, wanted.reshape(call.weights.shape)), rounding(wanted)
    if call.value is None:
        raise AdapterMismatchError("the adapter reads no values, which the self-check needs")
    found = attention_output(call)
    heads_first = found.transpose(1, 2)  # as PyTorch's own functions return them
    if wanted.shape in (heads_first.shape, heads_first.flatten(0, 1).shape):
        wanted = wanted.reshape(heads_first.shape).transpose(1, 2)
    if wanted.numel() != found.numel():
        raise AdapterMismatchError(
            f"probabilities times values have the shape {list(found.shape)}, "
            f"the attention output has {list(wanted.shape)}"
        )
    # Each implementation gives padding tokens other attention, which nothing uses.
    wanted, found = wanted.reshape(found.shape)[:, visible], found[:, visible]
    return difference(found, wanted), rounding(call.value)
