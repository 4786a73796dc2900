"""CONTRIBUTING.md shows the rooms as they are, and its four roads pass functions that exist."""

import ast
import importlib
import re

from tests.documents.snippets import ROOT
from tests.test_layout import CORE, ROOMS, SINGLE, parsed

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_table_of_rooms_is_that_of_the_packages():
    listed = re.findall(r"^\| `(\w+)/` \| (.+) \|$", TEXT, flags=re.MULTILINE)
    purposes = [(room, ast.get_docstring(parsed(CORE / room / "__init__.py"))) for room in ROOMS]
    assert listed == purposes
    assert all(f"`{name}.py`" in TEXT for name in SINGLE)


def test_every_hop_of_a_road_exists():
    hops = re.findall(r"`([a-z_/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", TEXT)
    assert len(hops) > 30
    for path, names in hops:
        module = importlib.import_module(f"flowtracer_plugin.{path.replace('/', '.')}")
        for name in re.findall(r"`([\w.]+)`", names):
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)
            # A command is defined where its options are unfolded.
            home = thing.__module__ if "cli" not in path else module.__name__
            assert home == module.__name__, f"{path}: {name}"


def test_every_place_for_a_new_thing_exists():
    section = TEXT.partition("## Where new things go")[2].partition("\n## ")[0]
    for path in re.findall(r"`([\w/]+(?:\.pyi?|\.md|/))`", section):
        assert (CORE / path).exists() or (ROOT / path).exists(), path
