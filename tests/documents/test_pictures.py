"""What the documentation keeps, since not every build can make it, is what today's code makes."""

import re

import flowtracer_plugin as ft
from docs import gallery
from flowtracer_plugin.options import flow_options, preset_of


def test_the_figure_says_what_it_would_say_today(tmp_path):
    gallery.draw_figure(tmp_path / "figure.svg")
    kept, made = (
        re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8"))
        for path in (gallery.FIGURE, tmp_path / "figure.svg")
    )
    assert kept == made


def test_the_long_chat_was_traced_with_todays_defaults():
    trace = ft.load(gallery.LONG_CHAT)
    assert preset_of(trace.options) == "derivation"
    assert trace.options.layers == flow_options("derivation").layers
    assert trace.options.question == "turns"
