"""The options of a trace: choices that the paper leaves open, and presets of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, TypedDict

Heads = str | float | tuple[tuple[int, int], ...]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {},
        "decision": {"target": "decision", "question_weights": "reach"},
        "sharp": {
            "target": "decision",
            "question_weights": "reach",
            "heads": 0.3,
            "edges": "value",
        },
        "decided": {
            "layers": "all",
            "rows": "decision",
            "edges": "value",
            "question_weights": "origins",
            "damping": 0.5,
        },
        "derivation": {
            "layers": "all",
            "rows": "decision",
            "edges": "influence",
            "question_weights": "origins",
            "damping": 0.5,
        },
        "causal": {
            "layers": "all",
            "target": "decision",
            "edges": "causal",
            "question_weights": "reach",
        },
    }
)
"""The options that each preset sets; all others are as in the paper.

In "decision", flow ends at the rows whose logits choose the answer, and is injected in proportion
to reach. "sharp" also chooses the heads that attend most from these rows to the reasoning, and
weights edges by the length of the moved values.

"decided" follows who decided whom: into each token lead the edges of the row that chose it, over
all layers, weighted by the length of the moved values. "derivation" also weighs each head and row
by its influence on the sampled tokens, at the cost of a forward and a backward pass. In both, a
token passes on half of its reach, since a long chain of copies would otherwise count as much as the
tokens that it copies. So a walk back from the answer ends at a token of the prompt, or with a
probability of one half at any token of the response. Flow is injected where these walks end, so
that throughput is in proportion to reach.

"causal" asks what one answer hangs on: its edges say what the answer loses without them, and
tokens are chosen one after another, at the cost of eight forward and backward passes.
"""

BEST, EVERYWHERE = "derivation", "paper"
"""The preset that `wrap` chooses if none is given, and that for models without a backward pass."""

FREE = ("layers", "question", "answer")
"""Options that leave open which graph is made of the tokens."""


SAID = ("turns", "user")
"""Rules for the question that need to know what the user said."""


class Solving(TypedDict):
    """The options of `solve_flow` that `FlowOptions` also has."""

    question_weights: str
    boundary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowOptions:
    """The options of a trace. The defaults are the paper's.

    Attributes:
        layers: `"middle"` third of the attention layers, `"early"`, `"late"`, `"all"`, five evenly
            spaced ones as `"middle:5"`, or layer numbers.
        question: `"prompt"` (without special tokens and the first, if that leaves any), `"all"`,
            `"turns"` (all that the user said in chat messages, and neither the system prompt nor
            what the template adds), or `"user"` (the last message of the user). `"auto"` is
            `"turns"` where messages tell what the user said, and `"prompt"` for texts and token
            ids; a trace names the one that was taken. `"mask"` says that `trace` was given a mask.
        answer: The name of the answer finder, or its pattern.
        target: `"answer"`, the rows of the answer tokens, or `"decision"`, the rows of the tokens
            before them, whose logits choose them.
        question_weights: `"uniform"` injects flow in equal parts over the question, `"reach"` in
            proportion to reach; `"origins"` at every token outside the answer, in proportion to the
            part of its reach that no edge passes on to earlier tokens, so that throughput is
            proportional to reach.
        boundary: `"literal"`: flow passes answer tokens; `"absorbing"`: it ends at the first one.
        first_token: `"keep"`, or `"drop"`: the attention to the first token, a common attention
            sink, is divided among the other tokens in proportion.
        heads: `"all"`; (layer, head) pairs; or a share such as 0.3 of the layers' heads, that is,
            those with the most attention from the target's rows to the response up to five tokens
            before the answer.
        rows: Whose attention leads into a token: `"own"`, that of its own row, in which the model
            reads it; or `"decision"`, that of the row before it, whose logits chose it. With
            `"decision"`, nothing leads into prompt tokens, since they were given.
        edges: `"attention"`; `"value"`: each head's attention times the length `‖W_O v‖` of the
            moved value; `"influence"`: times `‖v‖` and `‖∂ Σ λ / ∂ o‖`, with the head's output
            `o` in that row and the log-odds `λ` of the sampled tokens. Rows of the mean keep their
            sum. Or `"causal"`: what `log p(answer)` loses, to first order, without the edge; of a
            row's losses above 0, each edge has its share, and nothing leads into prompt tokens.
        damping: Factor of every edge, above 0 and up to 1: a token passes on at most this share of
            its reach, so that long chains of edges count less.
    """

    layers: str | tuple[int, ...] = "middle"
    question: str = "auto"
    answer: str = "auto"
    target: str = "answer"
    question_weights: str = "uniform"
    boundary: str = "literal"
    first_token: str = "keep"
    heads: Heads = "all"
    edges: str = "attention"
    rows: str = "own"
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: A value is not among the choices.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not _is_heads(self.heads):
            raise ValueError(
                "heads must be 'all', a share above 0 and up to 1, or (layer, head) pairs, "
                f"got {self.heads!r}"
            )
        if self.edges == "causal" and self.heads != "all":
            raise ValueError(
                "edges='causal' say what the answer loses without an edge in all heads; use "
                "heads='all'"
            )
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float):
            raise ValueError(f"damping must be a number, got {self.damping!r}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and up to 1, got {self.damping!r}")
        if self.rows == self.target == "decision":
            raise ValueError(
                "with rows='decision', as in preset='derivation', the default, the rows that "
                "decide the answer lead into the answer itself; use target='answer', or "
                "preset='decision'"
            )
        if self.rows == "decision" and self.edges == "causal":
            raise ValueError(
                "edges='causal' lead into the row that reads, and rows='decision', as in "
                "preset='derivation', the default, would move them; use preset='causal'"
            )

    @property
    def solving(self) -> Solving:
        """The options of `solve_flow`, as keyword arguments."""
        return {"question_weights": self.question_weights, "boundary": self.boundary}

    @property
    def plain(self) -> bool:
        """Whether the edges are the mean attention of all heads."""
        return self.heads == "all" and self.edges == "attention"


CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "question": ("auto", "turns", "prompt", "all", "user", "mask"),
        "target": ("answer", "decision"),
        "question_weights": ("uniform", "reach", "origins"),
        "boundary": ("literal", "absorbing"),
        "first_token": ("keep", "drop"),
        "edges": ("attention", "value", "influence", "causal"),
        "rows": ("own", "decision"),
    }
)
"""The allowed values of every option that has a fixed set of values."""


def flow_options(preset: str = "paper", **chosen: Any) -> FlowOptions:
    """The options of a preset, replaced by those of `chosen` that are not None.

    Raises:
        ValueError: There is no such preset, or a value is not among the choices.

    Examples:
        >>> flow_options("sharp", target="answer").heads
        0.3
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in chosen.items() if value is not None}
    return FlowOptions(**{**PRESETS[preset], **given})


def preset_of(options: FlowOptions) -> str | None:
    """The preset whose graph these options make, whatever the layers, question and answer.

    Examples:
        >>> preset_of(flow_options("sharp", layers="late")), preset_of(FlowOptions(heads=0.5))
        ('sharp', None)
    """

    def graph(one: FlowOptions) -> dict[str, Any]:
        return {name: value for name, value in asdict(one).items() if name not in FREE}

    return next((name for name in PRESETS if graph(flow_options(name)) == graph(options)), None)


def preset_over(preset: str, chosen: Mapping[str, Any]) -> FlowOptions:
    """The options of a preset, with the layers, question and answer chosen where it sets none.

    Args:
        preset: The preset.
        chosen: Options that were chosen, by name; others than these three do not count.

    Raises:
        ValueError: There is no such preset.

    Examples:
        >>> preset_over("decided", {"layers": "late"}).layers
        'all'
        >>> preset_over("sharp", {"layers": "late"}).layers
        'late'
    """
    stays = {name: chosen.get(name) for name in FREE}
    return flow_options(preset, **{**stays, **PRESETS.get(preset, {})})


def head_pairs(heads: str | float | Iterable[Iterable[int]]) -> Heads:
    """The option `heads`, with pairs as sorted tuples; names and shares are unchanged."""
    if isinstance(heads, str | int | float):
        return heads
    return tuple(sorted({(int(layer), int(head)) for layer, head in heads}))


def _is_heads(heads: Any) -> bool:
    if isinstance(heads, str):
        return heads == "all"
    if isinstance(heads, bool) or not isinstance(heads, int | float):
        return isinstance(heads, tuple) and len(heads) > 0
    return 0 < heads <= 1
