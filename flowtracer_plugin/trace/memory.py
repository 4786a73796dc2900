"""How much memory a trace takes in addition to the model, and how much is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from flowtracer_plugin.attention.adapter import (
    AttentionCall,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.head_mean import rows_on_host
from flowtracer_plugin.flow.backbone import MAX_STEPS
from flowtracer_plugin.flow.substitution import BLOCK
from flowtracer_plugin.model.causal_lm import input_device, language_model, vocabulary_size
from flowtracer_plugin.model.free_memory import free_memory
from flowtracer_plugin.model.parallel import may_stop, smallest
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.text.visible import shown_on_stdout

MODES = ("auto", "dense", "streamed")

SPARE = 0.85
"""Share of the free memory that a trace may take, since estimates are not exact."""

SMALL = 2**24
"""Pairs of tokens (64 MB of attention) up to which the free memory is not checked."""

AT_EASE = 0.5
"""Share of the free memory up to which the faster dense mode is chosen; a trace keeps its map."""

FLOAT = 4
"""Bytes of a float32: attention is computed in it for every dtype of the model."""


class TooLittleMemoryError(MemoryError):
    """A trace would not fit in the free memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The peak memory of a trace in each mode, in bytes, without the model's weights.

    Attributes:
        tokens: Number of tokens of each text, prompt and response together.
        batch: Number of texts that are traced at once.
        dense: Peak with the attention between all pairs of tokens: quadratic in the tokens.
        streamed: Peak with queries and keys, from which attention is computed by blocks: linear
            in the tokens. None if the model does not give access to them.
        free: Free memory on the model's device now.
    """

    tokens: int
    batch: int
    dense: int
    streamed: int | None
    free: int

    @property
    def mode(self) -> str | None:
        """The mode that `mode="auto"` chooses; None if neither fits.

        It is dense, which is faster, if that takes at most half of the free memory; otherwise
        streamed; otherwise dense, if it just fits.
        """
        if self.dense <= AT_EASE * self.free:
            return "dense"
        return next((mode for mode in ("streamed", "dense") if self.fits(mode)), None)

    def fits(self, mode: str) -> bool:
        """Whether this mode fits; for "auto", whether any mode does."""
        if mode == "auto":
            return self.mode is not None
        wanted = getattr(self, mode)
        return wanted is not None and wanted <= SPARE * self.free

    def __str__(self) -> str:
        """The figures in words, in characters that standard output can show."""
        streamed = "not possible" if self.streamed is None else readable(self.streamed)
        texts = f"{self.batch} × " if self.batch > 1 else ""
        return shown_on_stdout(
            f"{texts}{self.tokens:,} tokens: dense {readable(self.dense)}, streamed {streamed}; "
            f"{readable(self.free)} free → {self.mode or 'neither fits'}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """What a forward and a backward pass take at their peak.

    Attributes:
        tokens: Bytes per token.
        pairs: Bytes per pair of tokens that the graph keeps.
        masks: Bytes per pair of tokens of the masks that it also keeps, if there are masks.
    """

    tokens: int
    pairs: int
    masks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """How the memory of a model's traces grows with the length of the text.

    Attributes:
        forward: Bytes per token that a decoder layer holds at once.
        pairs: Bytes per pair of tokens in the forward pass: masks, and maps of eager attention.
        sites: Number of attention calls that are read.
        kept: Bytes per token of their queries and keys; None if a call has none.
        masks: Bytes per pair of tokens of their masks and biases, which are kept, too.
        heads: Largest number of query heads in a layer.
        block: Number of query rows that are computed at a time.
        host: Whether the model is on the host, where fewer rows of long texts are computed.
        copies: Maps of all pairs that are made of the map, beside it.
        keeps: Whether dense traces also keep queries and keys, to choose among heads.
        graph: What the graph of a backward pass takes; None if there is no such pass. With it,
            queries and keys are kept, too, until the influence of their heads is known.
    """

    forward: int
    pairs: int
    sites: int
    kept: int | None
    masks: int
    heads: int
    block: int
    host: bool
    copies: int
    keeps: bool = False
    graph: Graph | None = None

    def dense(self, tokens: int, batch: int) -> int:
        """The peak of a dense trace: the map, and the forward pass or the copies of the map."""
        maps = batch * tokens**2 * FLOAT
        rows = self._rows(tokens, batch)
        keeps = self.keeps or self.graph is not None
        kept = batch * (self.kept or 0) * tokens if keeps else 0
        read = maps + kept + max(self._forward(tokens, batch) + rows, self.copies * maps)
        return max(read, self._graph(tokens, batch))

    def streamed(self, tokens: int, batch: int) -> int | None:
        """The peak of a streamed trace: queries and keys, and the forward pass or one block."""
        if self.kept is None:
            return None
        read = self._passes(tokens, batch) + self._held(tokens, batch)
        run = self._forward(tokens, batch) + self._held(tokens, batch)
        return max(read, run, self._graph(tokens, batch))

    def room(self, tokens: int, batch: int) -> int:
        """What the two passes of a streamed trace may keep of their rows below its peak."""
        peak = self.streamed(tokens, batch)
        if peak is None:
            return 0
        return peak - self._passes(tokens, batch) - self._held(tokens, batch)

    def padded(self) -> Footprint:
        """The footprint for texts of different lengths, for which transformers makes a mask."""
        return replace(self, masks=max(1, self.masks), pairs=max(_MASK_COPIES, self.pairs))

    def only(self, sites: int) -> Footprint:
        """The footprint if only so many attention calls were read."""
        return replace(self, sites=sites, kept=-(-(self.kept or 0) * sites // self.sites))

    def _passes(self, tokens: int, batch: int) -> int:
        """What the passes over the rows take: a few blocks, and numbers of each token."""
        block = _BLOCK_COPIES * min(BLOCK, tokens) * tokens * FLOAT
        return self._rows(tokens, batch) + batch * (block + _TOKEN_BYTES * tokens)

    def _rows(self, tokens: int, batch: int) -> int:
        """What the rows take that are computed at a time, before their heads are averaged."""
        row, block = batch * self.heads * tokens * FLOAT, min(self.block, tokens)
        return 3 * row * (rows_on_host(row, block) if self.host else block)

    def _held(self, tokens: int, batch: int) -> int:
        """What a streamed trace holds from its forward pass to its end."""
        steps = min(tokens // _TOKENS_A_STEP, MAX_STEPS) ** 2 * FLOAT
        return steps + batch * ((self.kept or 0) * tokens + self.masks * tokens**2)

    def _forward(self, tokens: int, batch: int) -> int:
        return batch * (self.forward * tokens + self.pairs * tokens**2)

    def _graph(self, tokens: int, batch: int) -> int:
        if self.graph is None:
            return 0
        pairs = self.pairs + self.graph.pairs + (self.graph.masks if self.masks else 0)
        return batch * (self.graph.tokens * tokens + pairs * tokens**2)


_BLOCK_COPIES = 8
"""Number of [block, token] matrices that the second pass holds at once."""

_MASK_COPIES = 5
"""Number of masks that transformers holds at once while it makes one."""

_LOGIT_COPIES = 3
"""Number of float32 copies of the logits at the start of a backward pass, beside the graph's."""

_TOKENS_A_STEP = 8
"""Tokens per step, a line or a sentence; few steps are shorter."""

_TOKEN_BYTES = 1200
"""Bytes per token for everything else: edges, paths, their logarithms and places."""


def footprint(
    model: nn.Module,
    calls: tuple[AttentionCall | AttentionWeights, ...],
    *,
    block: int,
    copies: int,
    keeps: bool = False,
    graph: tuple[int, int] | None = None,
) -> Footprint:
    """The footprint of a model, from the `calls` of its read layers on a short text.

    `graph` are the bytes that a graph keeps, if there is one; see `graph_bytes`.
    """
    config = language_model(model).config.get_text_config()
    width = getattr(config, "hidden_size", None) or max(_width(call) for call in calls)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    size = _element_size(model)
    heads = max(_shape(call)[1] for call in calls)
    eager = getattr(config, "_attn_implementation", "eager") == "eager"
    window = getattr(config, "sliding_window", None)
    # A sliding window needs a mask for long texts, but none for a text that it covers.
    masks = max(0 if window is None else 1, *(_masks([call]) for call in calls))
    # A forward pass that must run to its end computes logits, also in float32.
    words, layer = vocabulary_size(model), size * (6 * width + 3 * inner)
    logits = 0 if may_stop(model) else words * (size + FLOAT)
    return Footprint(
        forward=layer + logits,
        pairs=(2 * heads * (size + FLOAT) if eager else 0) + _MASK_COPIES * masks,
        sites=len(calls),
        kept=_kept(calls, lengths=keeps),
        masks=max(0 if window is None else 1, _masks(calls)),
        heads=heads,
        block=block,
        host=input_device(model).type == "cpu",
        copies=copies,
        keeps=keeps,
        graph=None
        if graph is None
        else Graph(
            tokens=graph[0] + max(layer, _LOGIT_COPIES * FLOAT * words),
            pairs=graph[1],
            # Where a call takes a mask of booleans, its graph keeps one of numbers.
            masks=0 if eager else size * config.num_hidden_layers,
        ),
    )


def _width(call: AttentionCall | AttentionWeights) -> int:
    """The width of all heads together, if the configuration does not tell the model's width."""
    if isinstance(call, AttentionWeights):
        return 64 * call.weights.shape[1]
    return call.query.shape[1] * call.query.shape[3]


def _element_size(model: nn.Module) -> int:
    floats = (one for one in model.parameters() if one.is_floating_point())
    return max((one.element_size() for one in floats), default=FLOAT)


def _shape(call: AttentionCall | AttentionWeights) -> torch.Size:
    return call.weights.shape if isinstance(call, AttentionWeights) else call.query.shape


def _kept(calls: tuple[AttentionCall | AttentionWeights, ...], *, lengths: bool) -> int | None:
    """Bytes per token of queries and keys, and with `lengths` of the lengths of the values."""
    total = 0
    for call in calls:
        if isinstance(call, AttentionWeights):
            return None
        total += call.query.shape[1] * FLOAT if lengths else 0
        for part in (call.query, call.key):
            total += part.shape[1] * part.shape[3] * part.element_size()
    return total


def _masks(calls: Sequence[AttentionCall | AttentionWeights]) -> int:
    """Bytes per pair of tokens of masks and biases; those that calls share count once."""
    found: dict[int, int] = {}
    for call in calls:
        parts = () if isinstance(call, AttentionWeights) else (call.mask, call.bias)
        for part in parts:
            if part is not None and part.shape[2] > 1:
                held, pairs = part.untyped_storage(), part.shape[2] * part.shape[3]
                found[held.data_ptr()] = -(-held.nbytes() // pairs)
    return sum(found.values())


def readable(size: int | float) -> str:
    """A number of bytes in words, such as `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


class Budget:
    """Chooses the mode of a reader's traces by the free memory."""

    def __init__(
        self,
        reader: AttentionReader,
        layers: Sequence[int],
        *,
        copies: int,
        keeps: bool = False,
        gradients: bool = False,
    ) -> None:
        self._reader, self._layers = reader, layers
        self._copies, self._keeps, self._gradients = copies, keeps, gradients
        self._known: Footprint | None = None

    def estimate(self, tokens: int, batch: int = 1, *, padded: bool = False) -> MemoryEstimate:
        """The memory that `batch` texts of `tokens` tokens take, and the free memory.

        Raises:
            ValueError: `tokens` or `batch` is below 1.
        """
        if tokens < 1 or batch < 1:
            raise ValueError(f"tokens and batch must be at least 1, got {tokens} and {batch}")
        model, parts = self._reader.model, self._parts(padded)
        return MemoryEstimate(
            tokens=tokens,
            batch=batch,
            dense=parts.dense(tokens, batch),
            streamed=parts.streamed(tokens, batch),
            free=smallest(model, free_memory(input_device(model))),
        )

    def room(self, tokens: int, batch: int, *, padded: bool) -> int:
        """Bytes of rows that a streamed trace may keep without a higher peak; see `Footprint`."""
        return self._parts(padded).room(tokens, batch)

    def prepare(self) -> None:
        """Run the model on the short text now, when all processes do so."""
        self._footprint()

    def choose(
        self, mode: str, tokens: int, batch: int = 1, *, padded: bool = False, fixed: bool = False
    ) -> str:
        """The mode itself, or for "auto" the mode that fits.

        With `fixed`, an error suggests nothing but shorter texts.

        Raises:
            TooLittleMemoryError: The trace does not fit.
            UnsupportedArchitectureError: The model gives no access to queries and keys.
        """
        if batch * tokens**2 <= SMALL:
            return "dense" if mode == "auto" else mode
        estimate = self.estimate(tokens, batch, padded=padded)
        if mode == "streamed" and estimate.streamed is None:
            raise UnsupportedArchitectureError(
                f"{type(self._reader.model).__name__} hands over its probabilities, and no queries "
                "and keys: there is nothing to stream from; wrap(..., mode='dense')"
            )
        if not estimate.fits(mode):
            raise _refusal(estimate, mode, self._parts(padded), fixed=fixed)
        return estimate.mode if mode == "auto" and estimate.mode else mode

    def _parts(self, padded: bool) -> Footprint:
        return self._footprint().padded() if padded else self._footprint()

    def _footprint(self) -> Footprint:
        if self._known is None:
            reader = self._reader
            calls = reader.check_calls(self._layers)
            self._known = footprint(
                reader.model,
                calls,
                block=reader.block,
                copies=self._copies,
                keeps=self._keeps,
                graph=reader.graph_bytes(self._layers) if self._gradients else None,
            )
        return self._known


def _refusal(
    estimate: MemoryEstimate, mode: str, parts: Footprint, *, fixed: bool
) -> TooLittleMemoryError:
    modes = ("dense", "streamed") if mode == "auto" else (mode,)
    sizes = {one: getattr(estimate, one) for one in modes}
    taken = " or ".join(f"{readable(size)} {one}" for one, size in sizes.items() if size)
    texts = f"{estimate.batch} texts of " if estimate.batch > 1 else ""
    return TooLittleMemoryError(
        f"tracing {texts}{estimate.tokens:,} tokens would take {taken} beside the model, but at "
        f"most {SPARE:.0%} of the {readable(estimate.free)} that are free are used; "
        f"what fits: {' or '.join(_fitting(estimate, mode, parts, fixed=fixed))}"
    )


def _fitting(estimate: MemoryEstimate, mode: str, parts: Footprint, *, fixed: bool) -> list[str]:
    """Settings that would fit, those that change the least first."""
    room, batch, tokens = int(SPARE * estimate.free), estimate.batch, estimate.tokens

    def fits(parts: Footprint, tokens: int, batch: int) -> bool:
        return _least(parts, mode, tokens, batch) <= room

    found = []
    if not fixed:
        others = {"dense": ["streamed"], "streamed": ["dense"], "auto": []}[mode]
        found += [f"mode={other!r}" for other in others if estimate.fits(other)]
        if parts.graph and fits(replace(parts, graph=None), tokens, batch):
            found.append("preset='decided'")
        sizes = (size for size in range(batch - 1, 0, -1) if fits(parts, tokens, size))
        found += [f"batch_size={size}" for size in list(sizes)[:1]]
        halves = (parts.sites >> power for power in range(1, parts.sites.bit_length()))
        fewer = (sites for sites in halves if parts.kept and fits(parts.only(sites), tokens, batch))
        found += [f"layers='middle:{sites}'" for sites in list(fewer)[:1]]
    most = longest(room, lambda length: _least(parts, mode, length, 1))
    return [*found, f"up to {most:,} tokens"]


def _least(parts: Footprint, mode: str, tokens: int, batch: int) -> int:
    dense, streamed = parts.dense(tokens, batch), parts.streamed(tokens, batch)
    if mode == "dense" or streamed is None:
        return dense
    return streamed if mode == "streamed" else min(dense, streamed)


def longest(room: int, size: Callable[[int], int]) -> int:
    """The largest number of tokens whose `size` fits in `room`; 0 if one token does not."""
    low, high = 0, 1
    while size(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low
