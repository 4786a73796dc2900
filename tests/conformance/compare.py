"""Compare what the reader reads with what the model reports, for one type of model at a time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from flowtracer_plugin.attention import (
    AdapterMismatchError,
    NoAttentionError,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.reading.reader import AttentionReader
from tests.conformance.probed import PROBES, probed_attention
from tests.conformance.reported import NotReportedError, reported_attention, reported_share
from tests.conformance.results import FORWARD, Row
from tests.conformance.tiny_configs import VOCABULARY, WINDOW
from tests.conformance.tiny_models import tiny_pair
from tests.conformance.type_table import NOTES, ONE_ROW, PARTLY_REPORTED

BACKENDS = ("nnsight", "interface")
TOKENS = 40
PADDED = 5
BOUND = 1e-4
PEAK = 0.15
_NUMBERS = re.compile(r"\d+(\.\d+)?(e[-+]\d+)?")
REFUSALS = (NoAttentionError, UnsupportedArchitectureError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One batch of token ids, and their mask."""

    padding: str
    ids: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]


@dataclass(kw_only=True, slots=True)
class Findings:
    """What a comparison has found so far, also when an error ends it."""

    adapter: str = ""
    layers: int = 0
    differences: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def prompts(*, together: bool = True) -> tuple[Prompt, ...]:
    """Two rows of random ids, longer than every window; the second is padded left, right or not."""
    drawn = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=drawn)
    found = []
    for padding, hidden in (
        ("no padding", slice(0)),
        ("left padding", slice(PADDED)),
        ("right padding", slice(-PADDED, None)),
    ):
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        mask[-1, hidden] = False
        shown = ids.masked_fill(~mask, 0)
        rows = [slice(None)] if together else [slice(0, 1), slice(1, 2)]
        found += [Prompt(padding=padding, ids=shown[row], mask=mask[row]) for row in rows]
    return tuple(found)


def measure(model_type: str, backend: str) -> Row:
    """The row for a tiny model of this type, whose layers are compared; its note tells errors."""
    findings = Findings()
    if model_type in NOTES:
        findings.remarks.append(NOTES[model_type])
    refusal: Exception | None = None
    try:
        _compare(model_type, backend, findings)
    except REFUSALS as error:
        refusal = error
    # The models are other people's: one that cannot be built or run is a row, not the end.
    except Exception as error:  # noqa: BLE001
        findings.problems.append(_line(error))
    notes = [_line(refusal)] if refusal else findings.problems
    largest = max(findings.differences, default=math.nan)
    return Row(
        type=model_type,
        adapter=findings.adapter,
        backend=backend,
        layers=findings.layers,
        difference=f"{largest:.1e}" if findings.differences else "",
        status="refused" if refusal else "passed" if not notes and largest < BOUND else "failed",
        note="; ".join([*notes, *findings.remarks]),
        transformers=transformers.__version__,
    )


def _compare(model_type: str, backend: str, findings: Findings) -> None:
    model, twin = tiny_pair(model_type)
    reader = AttentionReader(model, backend=backend)
    findings.adapter = reader.adapter.name
    layers = sorted({site.layer for site in reader.sites})
    forward, peak = False, 0.0
    for prompt in prompts(together=model_type not in ONE_ROW):
        wanted = _reference(model_type, twin, prompt)
        compared = sorted(set(layers) & set(wanted))
        if compared != sorted({*layers, *wanted}) and model_type not in PARTLY_REPORTED:
            _note(findings, f"sites in layers {layers}, attention in layers {sorted(wanted)}")
        for layer in compared:
            mean = _visible(wanted[layer].mean(1), prompt.mask)
            forward |= bool(mean.triu(1).max() > 1e-6)
            peak = max(peak, _peak(wanted[layer], prompt.mask))
            _read(reader, prompt, layer, mean, findings)
        rest = sorted({*layers} - {*wanted})
        share = reported_share(twin, prompt.ids, prompt.mask) if rest else {}
        for layer in rest:
            if layer in share:
                _read_share(reader, prompt, layer, share[layer], findings)
        findings.layers = len(compared)
    if forward:
        findings.remarks.append(FORWARD)
    if findings.layers and peak < PEAK:
        _note(findings, f"the reported attention has no peaks ({peak:.2f}): it proves nothing")
    _verify(reader, findings)


def _reference(model_type: str, twin: PreTrainedModel, prompt: Prompt) -> dict[int, Tensor]:
    """What the twin reports for each text alone, put where the text stands among the padding."""
    rows = []
    for ids, mask in zip(prompt.ids, prompt.mask, strict=True):
        alone = ids[mask][None], torch.ones(1, int(mask.sum()), dtype=torch.bool)
        if model_type in PROBES:
            found = probed_attention(twin, *alone, PROBES[model_type])
        else:
            found = reported_attention(twin, *alone)
        rows.append({layer: _placed(map_, mask) for layer, map_ in found.items()})
    return {layer: torch.cat([row[layer] for row in rows]) for layer in rows[0]}


def _placed(map_: Tensor, mask: Tensor) -> Tensor:
    whole = map_.new_zeros(1, map_.shape[1], len(mask), len(mask))
    whole[:, :, mask[:, None] & mask] = map_.flatten(2)
    return whole


def _read(
    reader: AttentionReader, prompt: Prompt, layer: int, mean: Tensor, findings: Findings
) -> None:
    """Compare one layer, so that its errors cannot hide in a mean over layers."""
    found = _probabilities(reader, prompt, layer, findings)
    if found is not None:
        difference = float((found - mean).abs().max())
        findings.differences.append(difference)
        if not difference < BOUND:
            _note(findings, f"{prompt.padding}, layer {layer}: differs by {difference:.1e}")


def _read_share(
    reader: AttentionReader, prompt: Prompt, layer: int, share: Tensor, findings: Findings
) -> None:
    """Compare row sums in a layer whose keys are not the tokens: no attention may get lost."""
    found = _probabilities(reader, prompt, layer, findings)
    if found is not None:
        whole = prompt.mask.all(-1)  # padding takes its part with it
        lost = float((found.sum(-1) - share)[whole].abs().max())
        if not lost < BOUND or found.triu(1).any():
            _note(findings, f"{prompt.padding}, layer {layer}: rows sum to {lost:.1e} less or more")


def _probabilities(
    reader: AttentionReader, prompt: Prompt, layer: int, findings: Findings
) -> Tensor | None:
    where = f"{prompt.padding}, layer {layer}"
    try:
        found = reader.read(prompt.ids, prompt.mask, [layer]).double()
    except REFUSALS:
        raise
    # Other layers and paddings may still work.
    except Exception as error:  # noqa: BLE001
        _note(findings, f"{where}: {_line(error)}")
        return None
    if torch.isfinite(found).all() and found.min() >= 0 and found.sum(-1).max() <= 1 + BOUND:
        return found
    _note(findings, f"{where}: no probabilities")
    return None


def _note(findings: Findings, problem: str) -> None:
    """Add a problem, once for all layers and paddings that fail in the same way."""
    kind = _NUMBERS.sub("", problem.partition(": ")[2] or problem)
    if all(kind not in _NUMBERS.sub("", known) for known in findings.problems):
        findings.problems.append(problem)


def _verify(reader: AttentionReader, findings: Findings) -> None:
    try:
        reader.verify()
    except (AdapterMismatchError, NotImplementedError, ValueError) as error:
        _note(findings, f"verify: {_line(error)}")


def _visible(mean: Tensor, mask: Tensor) -> Tensor:
    """The map with 0 in rows and columns of padding."""
    hidden = ~mask
    return mean.masked_fill(hidden[:, :, None], 0).masked_fill(hidden[:, None, :], 0)


def _peak(wanted: Tensor, mask: Tensor) -> float:
    """The mean of the largest probability in rows with more tokens before them than a window."""
    if not torch.isfinite(wanted[mask[:, None].expand(wanted.shape[:3])]).all():
        raise NotReportedError("the reported attention is not finite")
    rows = wanted[:, :, WINDOW:].amax(-1)
    return float(rows[mask[:, None, WINDOW:].expand(rows.shape)].mean())


def _line(error: Exception) -> str:
    """The error as the last line of its traceback, short enough for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 240 else text[:237] + "..."
