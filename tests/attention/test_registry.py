"""Known adapters: where they come from, their order, and broken ones."""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from importlib.metadata import entry_points
from typing import ClassVar

import pytest
from torch import nn

from flowtracer_adapters import ADAPTERS, InterfaceAdapter
from flowtracer_plugin.attention import (
    ENTRY_POINT_GROUP,
    AttentionAdapter,
    UnsupportedArchitectureError,
    adapter_entries,
    find_adapter,
    known_adapters,
    register_adapter,
)
from flowtracer_plugin.reading.reader import AttentionReader
from tests.families import tiny_model


class Named(AttentionAdapter):
    """Matches every model and finds nothing; only its name matters."""

    name: ClassVar[str] = "first"

    def matches(self, model):
        return True

    def sites(self, model):
        return ()

    def read(self, module, args, kwargs):
        raise NotImplementedError


class Other(Named):
    name: ClassVar[str] = "second"


class Generic(Named):
    name: ClassVar[str] = "looks around"
    generic: ClassVar[bool] = True


def test_the_built_in_adapters_are_found_through_the_entry_point():
    (builtin,) = entry_points(group=ENTRY_POINT_GROUP, name="builtin")
    assert builtin.load() is ADAPTERS
    assert set(ADAPTERS) <= set(known_adapters())


def test_registered_adapters_come_before_installed_ones_and_generic_ones_last():
    register_adapter(Generic())
    register_adapter(Other())
    names = [adapter.name for adapter in known_adapters()]
    assert names.index("second") < names.index("recurrent")
    assert names.index("recurrent") < names.index("looks around") < names.index("interface")
    assert find_adapter(tiny_model("llama")).name == "second"


def test_the_adapter_that_is_passed_comes_first():
    register_adapter(Other())
    passed = InterfaceAdapter()
    assert AttentionReader(tiny_model("llama"), passed).adapter is passed


def test_registering_a_name_again_replaces_its_adapter():
    register_adapter(Named())
    register_adapter(Other())
    newer = Named()
    register_adapter(newer)
    known = known_adapters()
    assert [adapter.name for adapter in known].count("first") == 1
    assert known[0] is newer


def install(folder, distribution: str, code: str, target: str = "ADAPTERS") -> None:
    """Write the files of an installed distribution: a module, and an entry point into it."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    metadata = folder / f"{module}-0.3.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.3\n"
    )
    metadata.joinpath("entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\nacme = {module}:{target}\n"
    )


ACME = """
from flowtracer_plugin.attention import AttentionAdapter

class Acme(AttentionAdapter):
    name, generic = {name!r}, {generic}
    def matches(self, model): return {matches}
    def sites(self, model): return ()
    def read(self, module, args, kwargs): pass

class Nameless(Acme):
    name = None
"""
OFFERS = ACME + "ADAPTERS = (Acme(),)"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of installed distributions."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


def offers(name: str = "acme", *, generic: bool = False, matches: str = "True") -> str:
    return OFFERS.format(name=name, generic=generic, matches=matches)


def test_an_adapter_is_known_with_its_distribution(packages):
    install(packages, "acme-attention", offers())
    entry = adapter_entries()[0]
    assert (entry.name, entry.skipped) == ("acme", None)
    assert entry.source == "acme-attention 0.3"
    assert entry.entry_point == "acme_attention:ADAPTERS"
    register_adapter(Other())
    assert adapter_entries()[0].source == "this process"
    assert {e.distribution for e in adapter_entries()[2:]} == {"flowtracer-plugin"}


def test_adapters_of_other_distributions_come_first_by_name(
    packages,
):
    install(packages, "zebra", offers("zebra"))
    install(packages, "aardvark", offers("a_generic", generic=True))
    install(packages, "Bear", offers("bear"))
    names = [entry.name for entry in adapter_entries()]
    assert names[:3] == ["bear", "zebra", "recurrent"]
    assert names.index("a_generic") + 1 == names.index("interface")


def test_the_second_of_two_adapters_of_one_name_is_skipped(packages):
    install(packages, "zebra", offers())
    install(packages, "bear", offers())
    first, second = (entry for entry in adapter_entries() if entry.name == "acme")
    assert (first.distribution, first.skipped) == ("bear", None)
    assert second.skipped == "an adapter of this name from bear 0.3 comes first; rename one of them"
    assert [adapter.name for adapter in known_adapters()].count("acme") == 1
    assert find_adapter(tiny_model("llama")) is first.adapter


def test_an_installed_adapter_may_replace_a_built_in_one(packages):
    install(packages, "mine", offers("falcon"))
    mine, built_in = (entry for entry in adapter_entries() if entry.name == "falcon")
    assert (mine.distribution, mine.skipped) == ("mine", None)
    assert "from mine 0.3 comes first" in built_in.skipped


BROKEN = {
    "an import that fails": (
        "import nothing_like_this", "ADAPTERS",
        "acme_x:ADAPTERS cannot be loaded (ModuleNotFoundError: No module named",
    ),
    "an error of any kind": ("1 / 0", "ADAPTERS", "(ZeroDivisionError: division by zero)"),
    "a missing name": ("", "ADAPTERS", "has no attribute 'ADAPTERS')"),
    "a class": (ACME, "Acme", "holds the class Acme, which must be called: Acme(), not in a tuple"),
    "a class in a tuple": (
        ACME + "ADAPTERS = (Acme,)", "ADAPTERS", "the class Acme, which must be called: Acme();",
    ),
    "one alone": (ACME + "ADAPTERS = Acme()", "ADAPTERS", "holds a Acme, not in a tuple"),
    "something else": ("ADAPTERS = ('acme',)", "ADAPTERS", "a tuple of AttentionAdapter instances"),
    "no name": (ACME + "ADAPTERS = [Nameless()]", "ADAPTERS", "holds a Nameless without a name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_point_is_skipped_with_the_reason(packages, kind):
    code, target, reason = BROKEN[kind]
    install(
        packages, "acme-x", code.replace("{name!r}", "'a'").format(generic=0, matches=1), target
    )
    (entry,) = (entry for entry in adapter_entries() if entry.skipped)
    assert (entry.name, entry.adapter, entry.source) == ("acme", None, "acme-x 0.3")
    assert reason in entry.skipped
    assert entry.skipped.endswith("; fix, update or uninstall acme-x")
    assert find_adapter(tiny_model("llama")).name == "interface"
    with pytest.raises(
        UnsupportedArchitectureError, match=r"Skipped acme from acme-x 0\.3: "
    ) as told:
        find_adapter(nn.Identity())
    assert entry.skipped in str(told.value)


def test_good_adapters_beside_a_broken_one_are_used(packages):
    code = offers().replace("(Acme(),)", "(Acme, Acme())")
    install(packages, "acme-x", code)
    assert [bool(e.skipped) for e in adapter_entries() if e.source == "acme-x 0.3"] == [True, False]
    assert find_adapter(tiny_model("llama")).name == "acme"


def test_an_adapter_whose_matches_fails_is_skipped_unless_it_was_passed(packages):
    install(packages, "acme-x", offers(matches="model.config.feathers"))
    assert find_adapter(tiny_model("llama")).name == "interface"
    with pytest.raises(
        UnsupportedArchitectureError, match=r"its matches\(\) fails \(AttributeError"
    ):
        find_adapter(nn.Identity())
    with pytest.raises(AttributeError, match="feathers"):
        find_adapter(tiny_model("llama"), [known_adapters()[0]])


@pytest.mark.parametrize("take", [register_adapter, find_adapter])
def test_the_class_of_an_adapter_is_refused(take):
    with pytest.raises(TypeError, match=r"class Other, which must be called: Other\(\)"):
        inspect.unwrap(take)(*([Other] if take is register_adapter else [nn.Identity(), [Other]]))
