"""A trace in the terminal. Plain text says everything that colour says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from flowtracer_plugin.options import preset_of
from flowtracer_plugin.report.carried import (
    FIRST_TOKEN,
    LEAST_DROP,
    carriers,
    leading_steps,
    most_missed,
    nats,
)
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    QUESTION,
    ShownTrace,
    Unit,
    model_label,
    percent,
    ranges,
    shorten,
    show,
    standouts,
)
from flowtracer_plugin.report.head_map import HeadMap, head_map
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import encodable, visible

# Most terminals are dark, so the hottest is the brightest. White terminals stay legible too.
_HEAT = (
    "",
    "#ffffff on #1e3148",
    "#ffffff on #21456d",
    "#ffffff on #235b98",
    "#ffffff on #2a73c0",
    "#0d1116 on #5aa7f7",
)
_COLD = {"prompt": "dim", "question": "dim", "response": "", "answer": ""}
_REGION = {"prompt": "", "question": "italic", "response": "", "answer": "bold underline"}
_BARS = "▁▂▃▄▅▆▇█"
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKS = 8
_PATHS = 5
_WIDEST = 100


def render_trace(
    trace: TraceData,
    drops: Mapping[int, float] | None = None,
    heads: TokenHeads | None = None,
) -> RenderableType:
    """The view that `rich.print(trace)` shows, at any width, with or without colour.

    What the terminal's encoding cannot hold is shown by plain characters. `drops` are measured
    knock-outs and `heads` those that pay the edges into one token, as for `render_page`.
    """
    shown = show(trace)
    hubs = standouts(shown, "hubs", _MARKS)
    checkpoints = standouts(shown, "checkpoints", _MARKS)
    view = Group(
        _title(shown),
        *_carried(shown, drops),
        "",
        _body(shown, {unit.index: place for place, (unit, _) in enumerate(hubs, start=1)}),
        "",
        Text("throughput along the response", style="bold"),
        Sparkline(values=shown.throughput[shown.prompt_units :]),
        "",
        _table(shown, "hubs", "much flow that many later tokens draw on", hubs),
        "",
        _table(shown, "checkpoints", "much flow, gathered from many earlier tokens", checkpoints),
        "",
        _paths(shown),
        *(() if heads is None else ("", _heads(head_map(shown, heads)))),
    )
    return Encodable(view=view)


@dataclass(frozen=True, kw_only=True, eq=False)
class Encodable:
    """Something that is shown in characters that the terminal has.

    Attributes:
        view: What is shown.
    """

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """The segments of the view."""
        for text, style, control in console.render(self.view, options):
            yield Segment(encodable(text, options.encoding), style, control)


def _title(shown: ShownTrace) -> Text:
    trace = shown.trace
    answer = visible(trace.spans.answer_text).replace("\n", "⏎")
    tokens = trace.spans.answer.nonzero()[0].tolist()
    spent = f"token{'s' * (len(tokens) > 1)} {ranges(tokens)}".replace("–", "-")
    layers = ranges(sorted(trace.layers)).replace("–", "-")
    preset = preset_of(trace.options)
    made = ", rows that decided" if trace.options.rows == "decision" else ""
    made += f", preset {preset}" if preset else ""
    return Text.assemble(
        (f"answer '{answer}'", "bold"),
        f" found by rule '{visible(trace.spans.rule)}' in {spent}\n",
        (f"{percent(trace.reasoning_share)}", "bold"),
        " of the flow passes through the reasoning, the rest jumps straight to the answer\n",
        f"{trace.backbone.question_reached} of {int(trace.spans.question.sum())} question tokens "
        f"reached, from {QUESTION[trace.options.question]} · {len(trace.tokens)} tokens · "
        f"{visible(model_label(trace.model))}, layers {layers}{made}",
    )


def _carried(shown: ShownTrace, drops: Mapping[int, float] | None) -> Iterator[Text]:
    """What the answer hangs on, and the tokens and steps with the most flow, in a sentence each."""
    yield from _missed(shown, drops)
    tokens = [
        f"⟨{one.unit.word}⟩ {percent(one.unit.throughput)}"
        + ("" if one.drop is None else f" ({nats(one.drop)} nats lost)")
        for one in carriers(shown, drops)
    ]
    if tokens:
        yield Text(f"most flow passes through {', '.join(tokens)}")
    steps = [
        f"step {one.row.number} ‘{shorten(one.row.text, 40)}’ {percent(one.inflow)}"
        + (" without what begins at the first token" if one.without_first else "")
        for one in leading_steps(shown)
    ]
    if steps:
        yield Text(f"it enters {'; '.join(steps)}")
    if drops:
        yield Text(
            "nats lost: how far the answer's log-probability falls if no later token can attend to "
            "this one; below zero it rises",
            style="dim",
        )


def _missed(shown: ShownTrace, drops: Mapping[int, float] | None) -> Iterator[Text]:
    missed = most_missed(shown, drops)
    if missed is None:
        return
    if missed.matters:
        yield Text(
            f"of {missed.among}, the answer hangs most on "
            f"⟨{missed.unit.word}⟩: {nats(missed.drop)} nats are lost without it"
        )
    else:
        yield Text(
            f"none of {missed.among} matters alone: less than {LEAST_DROP} nats are lost "
            "without any one of them"
        )


def _body(shown: ShownTrace, hubs: dict[int, int]) -> RenderableType:
    parts = [("prompt", shown.prompt), ("response", shown.response)]
    texts = [
        (Text(name, style="dim"), Padding(_text(units, hubs), (0, 0, 0, 2)))
        for name, units in parts
        if units
    ]
    return Group(*(line for part in texts for line in part), "", _legend())


def _text(units: Sequence[Unit], hubs: dict[int, int]) -> Text:
    text = Text(tab_size=4)
    for before, unit, after in zip([None, *units], units, [*units[1:], None], strict=False):
        opens = unit.region == "answer" != (before and before.region)
        closes = unit.region == "answer" != (after and after.region)
        token = "«" * opens + _marked(unit, hubs.get(unit.index)) + "»" * closes
        text.append(token, style=_HEAT[unit.heat] or _COLD[unit.region])
        text.stylize(_REGION[unit.region], len(text) - len(token))
    return text


def _marked(unit: Unit, hub: int | None) -> str:
    text = unit.text.replace("\n", "⏎\n")
    if hub is None:
        return text
    token = text.rstrip("\n")
    return f"[{token}]{str(hub).translate(_SUPERSCRIPT)}{text[len(token) :]}"


def _legend() -> Text:
    legend = Text("[hub]¹ «answer»  by throughput, top ", style="dim")
    for heat, share in enumerate(HEAT_SHARES, start=1):
        legend.append(f" {100 * share:.0f} ", style=f"not dim {_HEAT[heat]}")
    return legend.append(" %")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparkline:
    """Bars across the terminal, each the highest value of its bin; heights are square roots.

    Attributes:
        values: Throughput in reading order.
    """

    values: Float[np.ndarray, " unit"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """One line of block characters."""
        width = min(len(self.values), options.max_width)
        if not width:
            return
        peaks = np.maximum.reduceat(self.values, np.arange(width) * len(self.values) // width)
        # The answer holds all flow; relative to it, every other bar would be flat.
        highest = float(np.partition(peaks, -2)[-2]) if width > 1 else float(peaks[0])
        heights = np.sqrt(np.minimum(peaks / (highest or 1.0), 1))
        yield Text("".join(_BARS[round(7 * height)] for height in heights.tolist()))


def _table(
    shown: ShownTrace, title: str, meaning: str, rows: Sequence[tuple[Unit, float]]
) -> RenderableType:
    heading = Text.assemble((title, "bold"), f"  {meaning}")
    if not rows:
        return heading.append(": none in the reasoning")
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    widest = max(cell_len(unit.inline) for unit, _ in rows) + 2
    table.add_column("", justify="right", width=2)
    table.add_column("before", justify="right", no_wrap=True, ratio=1)
    table.add_column("token", no_wrap=True, width=min(max(widest, 5), 14), style="bold")
    table.add_column("after", no_wrap=True, ratio=1)
    for name, width in (("flow", 7), ("edges", 5), ("index", 5)):
        table.add_column(name, justify="right", no_wrap=True, width=width)
    for place, (unit, edges) in enumerate(rows, start=1):
        before, after = shown.context(unit, width=4)
        cells = (before, f"⟨{unit.inline}⟩", after, percent(unit.throughput), f"{edges:.1f}")
        table.add_row(str(place), *map(Text, cells), str(unit.last))
    return Group(heading, Constrain(table, _WIDEST))


def _paths(shown: ShownTrace) -> RenderableType:
    lines = [Text.assemble(("likeliest paths", "bold"), "  flow spreads over very many paths")]
    for path in shown.trace.paths(_PATHS):
        tokens = " → ".join(f"⟨{unit.label}⟩" for unit in shown.units_of(path.tokens))
        line = Text(f"{percent(path.probability):>9}  {tokens}")
        lines.append(line.append(f"  {FIRST_TOKEN}", "dim") if path.tokens[0] == 0 else line)
    return Group(*lines)


def _heads(found: HeadMap) -> RenderableType:
    title = f"heads that pay the edges into ⟨{found.unit.label}⟩, token {found.heads.token}"
    lines = [Text(title, style="bold")]
    for one, source in found.listed:
        most = f"most from ⟨{source.label}⟩ {percent(one.source_share)}"
        lines.append(Text(f"{percent(one.share):>9}  layer {one.layer}, head {one.head}, {most}"))
    return Group(*lines)
