"""Figures for papers: their files, and that they show the numbers of the trace."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.patches import PathPatch, StepPatch
from matplotlib.text import Text
from PIL import Image

from flowtracer_plugin.flow.backbone import strongest_flows
from flowtracer_plugin.report.display import show
from flowtracer_plugin.report.figures import figure as figures
from flowtracer_plugin.report.figures.panels import FILLS, fit, text_width
from flowtracer_plugin.report.figures.ribbon import spread
from flowtracer_plugin.text.visible import visible
from tests.made_traces import as_streamed, hostile_trace, make_trace
from tests.pages import HOSTILE
from tests.test_layout import ROOT

STEPS = ("What is 3 < 4 & more?", "It is $7$ \\frac{", "so \\boxed{", "日本 🍎 مرحبا")


def steps_trace(lines=STEPS, **changes):
    words = [word + " " for line in lines for word in [*line.split(), "\n"]]
    return make_trace(("<s>", *words, "7", "."), prompt=8, **changes)


@pytest.fixture(scope="module")
def trace():
    return steps_trace()


def drawn(trace, kind, width):
    with figures._styled():
        return figures._draw(show(trace), kind, width)


def svg_texts(path):
    root = ElementTree.parse(path).getroot()
    return ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("kind", "width"),
    [("ribbon", None), ("overview", None), ("river", 7.0)],
)
def test_figures_are_files_of_their_kind_and_width(trace, kind, width, tmp_path):
    inches = width or {"overview": 7}.get(kind, 3.3)
    paths = [tmp_path / "new" / name for name in ("a.png", "a.SVG", "a.pdf")]
    for path in paths:
        assert trace.to_figure(path, kind, width=width) == path
    with Image.open(paths[0]) as image:
        assert image.width == pytest.approx(300 * inches, abs=1)
        assert len(set(image.convert("L").tobytes())) > 20
    root = ElementTree.parse(paths[1]).getroot()
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(72 * inches, abs=0.1)
    content = paths[2].read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    assert b"/Type3" not in content
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
    assert float(box[1]) == pytest.approx(72 * inches, abs=0.1)


def test_the_labels_of_steps_are_text_in_svg(trace, tmp_path):
    path = trace.to_figure(tmp_path / "a.svg", "steps", width=7.0)
    texts = svg_texts(path)
    strong = strongest_flows(trace.steps(), max_steps=45)
    for step in strong.steps:
        label = " ".join(trace.steps().steps[step].text.removeprefix("<s>").split())
        assert label in texts
        assert str(step + 1) in texts
    assert "What is 3 < 4 & more?" in texts
    assert "It is $7$ \\frac{" in texts


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_any_text_can_be_drawn(suffix, tmp_path):
    path = hostile_trace().to_figure(tmp_path / f"a.{suffix}", "overview")
    assert path.stat().st_size > 1000
    if suffix == "svg":
        tags = {element.tag for element in ElementTree.parse(path).iter()}
        assert not {tag for tag in tags if tag.endswith(("script", "img", "foreignObject"))}
        shown = " ".join(svg_texts(path))
        assert not set(shown) & set("\x00\x1b\u202e\u200b\ufeff\x85\u2028")


def test_steps_show_hostile_texts_as_they_are(tmp_path):
    trace = steps_trace([*STEPS, *HOSTILE[:3], *(f"${text}$" for text in HOSTILE[3:9])])
    texts = svg_texts(trace.to_figure(tmp_path / "a.svg", "steps", width=20.0))
    assert any(HOSTILE[0] in text for text in texts)
    for text in texts:
        assert text == visible(text)


@pytest.mark.parametrize("tokens", [("a", "b", "7"), ("<s>", "b", "c", "7")])
@pytest.mark.parametrize("width", [3.3, 7.0])
def test_the_smallest_trace_can_be_drawn(width, tokens, tmp_path):
    trace = make_trace(tokens, prompt=2, answer=(-1,))
    assert trace.to_figure(tmp_path / "a.png", "overview", width=width).stat().st_size > 1000


def test_a_long_streamed_trace_can_be_drawn(long_trace, tmp_path):
    path = long_trace.to_figure(tmp_path / "a.svg", "overview")
    assert path.stat().st_size < 400_000


@pytest.fixture(scope="module")
def long_trace():
    words = ("What", " is", " 3", "?\n", "It", " is", ".\n") * 360
    return as_streamed(make_trace(("<s>", *words, "7", "."), prompt=900))


# What is shown


def test_the_ribbon_shows_the_throughput_of_every_token(trace):
    axes = drawn(trace, "ribbon", 7.0).axes[0]
    parts = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    assert [part.get_facecolor()[:3] for part in parts] == [
        matplotlib.colors.to_rgb(FILLS[name]) for name in ("prompt", "response", "answer")
    ]
    for part in parts:
        np.testing.assert_array_equal(part.get_data().edges, np.arange(len(trace.tokens) + 1))
    highest = max(trace.throughput[~trace.spans.answer])
    total = sum(part.get_data().values for part in parts)
    np.testing.assert_allclose(total**2, np.minimum(trace.throughput, highest))
    places = {"prompt": ~trace.spans.response, "answer": trace.spans.answer}
    for name, part in zip(("prompt", "answer"), (parts[0], parts[2]), strict=True):
        np.testing.assert_array_equal(part.get_data().values > 0, places[name] & (total > 0))
    for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert f"{100 * tick**2:g}\N{NO-BREAK SPACE}%" == label.get_text()


@pytest.mark.parametrize(("width", "count"), [(3.3, 5), (7.0, 10)])
def test_hubs_are_numbered_above_their_bars(long_trace, width, count):
    axes, key = drawn(long_trace, "ribbon", width).axes
    hubs = long_trace.hubs(count)
    entries = [text.get_text() for text in key.texts]
    assert entries[::2] == [str(place) for place in range(1, count + 1)]
    assert entries[1::2] == [f"“{hub.text}”".replace("\n", "⏎").replace(" ", "") for hub in hubs]
    numbers = [text for text in axes.texts if text.get_text().isdigit()]
    assert len(numbers) == count + 1  # the answer is 7
    lines = {line.get_xdata()[0] for line in axes.lines[1:]}
    answer = int(np.flatnonzero(long_trace.spans.answer)[0])
    assert lines == {index + 0.5 for index in (answer, *(hub.index for hub in hubs))}


def test_the_river_shows_where_flow_comes_from(trace):
    axes = drawn(trace, "river", 3.3).axes[0]
    river = trace.river()
    bands = [part for part in axes.collections if isinstance(part, PolyCollection)]
    assert len(bands) == len(river.bands) + 2
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["not yet started", *(f"from {band}" for band in river.bands), "arrived"]
    below = np.zeros(len(river.cuts))
    for band, height in zip(
        bands, [river.arrived, *river.flow.T[::-1], river.waiting], strict=True
    ):
        points = band.get_paths()[0].vertices
        for cut, low, high in zip(river.cuts, below, below + height, strict=True):
            ys = points[points[:, 0] == cut, 1]
            assert (ys.min(), ys.max()) == pytest.approx((low, high), abs=1e-9)
        below += height
    np.testing.assert_allclose(below, 1, atol=1e-6)
    legend = [patch.get_facecolor() for patch in axes.get_legend().get_patches()]
    assert [band.get_facecolor()[0].tolist() for band in bands] == [list(c) for c in legend[::-1]]
    lightness = [np.dot(colour[:3], (0.2126, 0.7152, 0.0722)) for colour in legend]
    # Each is darker than the one before it, but what has arrived, which grows large, is light.
    *under_way, arrived = lightness
    assert all(later < earlier - 0.03 for earlier, later in pairwise(under_way))
    assert arrived > under_way[1] + 0.03


@pytest.mark.parametrize("width", [3.3, 7.0])
def test_steps_are_joined_by_the_strongest_flows(trace, width):
    axes = drawn(trace, "steps", width).axes[0]
    strong = strongest_flows(trace.steps(), max_steps=int((width - 0.12) / 0.15))
    arcs = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    place = {step: number for number, step in enumerate(strong.steps)}
    found = [tuple(arc.get_path().vertices[[0, -1], 0].astype(int)) for arc in arcs]
    assert found == [(place[a], place[b]) for a, b, _ in strong.flows[::-1]]
    largest = strong.flows[0][2]
    for arc, (_, _, flow) in zip(arcs, strong.flows[::-1], strict=True):
        assert arc.get_linewidth() == pytest.approx(max(3.2 * (flow / largest) ** 0.5, 0.4))
    dots = [part for part in axes.collections if isinstance(part, PathCollection)]
    assert len(dots) == len(strong.steps)
    shown = percent_in(axes.texts[-1].get_text())
    assert shown == pytest.approx(strong.share, abs=0.001)


def percent_in(text):
    return float(re.search(r"([\d.]+)\s%", text)[1]) / 100


def written(figure):
    """Each visible text of a figure, and its box."""
    with figures._styled():
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        return [
            (text, text.get_window_extent(renderer))
            for text in figure.findobj(Text)
            if text.get_text() and text.get_visible()
        ]


@pytest.mark.parametrize("width", [2.0, 3.3, 7.0])
def test_nothing_that_is_written_leaves_the_figure(trace, long_trace, width):
    wide = steps_trace(["日本語" * 30, "WWW" * 30, "MMM " * 20], spans={"answer_text": "W" * 99})
    short = make_trace(("<s>", *"ab cd. ef" * 9, "7", "."), prompt=80)
    for one in (trace, long_trace, wide, hostile_trace(), short):
        figure = drawn(one, "overview", width)
        for text, box in written(figure):
            assert box.x0 >= -1, (one, text)
            assert box.y0 >= -1, (one, text)
            assert box.x1 <= figure.bbox.x1 + 1, (one, text)
            assert box.y1 <= figure.bbox.y1 + 1, (one, text)


@pytest.mark.parametrize("width", [3.3, 7.0])
def test_numbers_of_hubs_do_not_lie_on_each_other(trace, long_trace, width):
    for one in (trace, long_trace):
        figure = drawn(one, "ribbon", width)
        axes = figure.axes[0]
        boxes = [box for text, box in written(figure) if text in axes.texts[2:]]
        assert len(boxes) > 4
        for left, right in pairwise(sorted(boxes, key=lambda box: box.x0)):
            assert left.x1 < right.x0


def test_numbers_of_steps_do_not_lie_on_each_other(trace):
    figure = drawn(steps_trace([f"{number}." for number in range(1200)]), "steps", 3.3)
    axes = figure.axes[0]
    boxes = [box for text, box in written(figure) if text in axes.texts[:-1]]
    assert len(boxes) > 10
    for left, right in pairwise(boxes):
        assert left.x1 < right.x0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.5, 8)), min_size=1, max_size=8))
def test_labels_are_spread_no_further_than_necessary(labels):
    middles, widths = np.array(sorted(labels)).T
    found = spread(middles, widths, 100)
    gaps = (widths[1:] + widths[:-1]) / 2
    assert (np.diff(found) >= gaps - 1e-6).all()
    assert found[0] >= widths[0] / 2 - 1e-6
    assert found[-1] <= 100 - widths[-1] / 2 + 1e-6
    # A label moves only where one lies on another, or beyond an end.
    free = (np.diff(middles) >= gaps).all() and middles[0] >= widths[0] / 2
    if free and middles[-1] <= 100 - widths[-1] / 2:
        np.testing.assert_allclose(found, middles, atol=1e-9)


@pytest.mark.parametrize(
    "text", ["apples", "many apples and pears", "iiiiiiiiiiii", "日本語" * 9, "W"]
)
@pytest.mark.parametrize("width", [0.0, 0.2, 0.5, 1.0])
def test_labels_fit(text, width):
    with figures._styled():
        wanted = [text[:count] + "…" for count in range(len(text))] + [text]
        fitting = [label for label in wanted if text_width(label) <= width]
        assert fit(text, width) == (fitting or ["…" if len(text) > 1 else text])[-1]


# What a figure does not depend on


def test_the_same_trace_gives_the_same_file_in_another_process(trace, tmp_path):
    saved, other = trace.save(tmp_path / "a.flow"), tmp_path / "other"
    code = (
        f"import sys, flowtracer_plugin as ft; trace = ft.load({str(saved)!r}); "
        f"[trace.to_figure({str(other)!r} + '/a.' + suffix, 'overview') "
        "for suffix in ('png', 'svg', 'pdf')]; assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
    for name in ("a.png", "a.svg", "a.pdf"):
        here = trace.to_figure(tmp_path / name, "overview").read_bytes()
        assert (other / name).read_bytes() == here


def test_settings_of_the_user_neither_matter_nor_change(trace, tmp_path):
    wanted = trace.to_figure(tmp_path / "a.svg").read_bytes()
    changed = {"font.size": 40.0, "axes.facecolor": "red", "text.usetex": True, "svg.hashsalt": "x"}
    with matplotlib.rc_context(changed):
        before = dict(matplotlib.rcParams)
        assert trace.to_figure(tmp_path / "a.svg").read_bytes() == wanted
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("name", "kind", "width", "message"),
    [
        ("a.jpg", "ribbon", None, r"wanted \.png, \.svg or \.pdf, found '\.jpg' in 'a\.jpg'"),
        ("a", "ribbon", None, r"wanted \.png, \.svg or \.pdf, found '' in 'a'"),
        ("a.png", "pie", None, r"kind must be one of \('ribbon', 'river', .* got 'pie'"),
        ("a.png", "ribbon", 0.5, r"width must be from 2\.0 to 20\.0 inches, got 0\.5"),
        ("a.png", "ribbon", float("nan"), "width must be from .* got nan"),
    ],
)
def test_unknown_kinds_suffixes_and_widths_are_refused(trace, name, kind, width, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trace.to_figure(tmp_path / name, kind, width=width)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(trace, tmp_path, monkeypatch):
    for module in [name for name in sys.modules if "report.figure" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = r"to_figure needs matplotlib; run: pip install 'flowtracer-plugin\[viz\]'"
    with pytest.raises(ModuleNotFoundError, match=wanted):
        trace.to_figure(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
