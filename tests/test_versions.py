"""Supported versions: every place names the same window, and others are refused."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import flowtracer_plugin as ft
from flowtracer_plugin import versions as _versions
from flowtracer_plugin.grpo import trl_version
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.versions import (
    ANY_VERSION,
    WINDOW,
    UnsupportedVersionError,
    check_versions,
    fits,
)
from tests.families import tiny_model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
TRL = {r.name: r.specifier for r in map(Requirement, PROJECT["optional-dependencies"]["trl"])}
DOCUMENT = (ROOT / "docs" / "versions.md").read_text()


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if not line.startswith("#"))


def lowest(specifier):
    (bound,) = (Version(part.version) for part in specifier if part.operator == ">=")
    return bound


# --- one window in every place ---


@pytest.mark.parametrize("name", WINDOW)
def test_the_package_asks_for_its_window(name):
    assert CORE[name] == Requirement(name + WINDOW[name]).specifier


def test_the_extra_asks_for_the_trl_that_the_trainer_wants():
    assert TRL["trl"] == Requirement("trl" + trl_version.WANTED).specifier


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-lowest.txt"])
def test_every_dependency_is_pinned_to_a_version_that_the_package_takes(constraints):
    pinned = pins(constraints)
    for name, specifier in CORE.items():
        assert specifier.contains(pinned[name]), name


def test_the_lowest_versions_are_those_that_the_tests_run_with():
    pinned = pins("constraints-lowest.txt")
    higher = {name for name in CORE if Version(pinned[name]) != lowest(CORE[name])}
    assert higher == {"torch"}


@pytest.mark.parametrize("name", WINDOW)
def test_the_document_names_the_window(name):
    low, high = re.search(rf"\| {name} \| (\S+) \| (\S+) \|", DOCUMENT).groups()
    assert Version(low) == lowest(CORE[name])
    assert fits(low, WINDOW[name])
    assert fits(high, WINDOW[name])
    major, minor = Version(high).release[:2]
    assert not fits(f"{major}.{minor + 1}", WINDOW[name])


# --- versions inside the window ---


@pytest.mark.parametrize(
    ("found", "inside"),
    [
        ("5.20.2", False),
        ("5.21.0.dev0", False),
        ("5.21.0", True),
        ("5.24.1.dev0", True),
        ("5.24.7", True),
        ("5.25.0.dev0", False),
        ("5.25.0rc1", False),
        ("5.25.0", False),
        ("5.24.0+local.3", True),
        ("6.0", False),
        ("main", False),
    ],
)
def test_development_builds_count_as_their_release(found, inside):
    assert fits(found, ">=5.21,<5.25") is inside


# --- versions outside the window ---


@pytest.fixture
def install(monkeypatch):
    """Pretend that other versions are installed; None is not installed."""

    def pretend(**versions):
        real = _versions.version

        def version(name):
            found = versions[name] if name in versions else real(name)
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(_versions, "version", version)
        check_versions.cache_clear()

    monkeypatch.delenv(ANY_VERSION, raising=False)
    yield pretend
    check_versions.cache_clear()


def test_the_installed_versions_pass_and_are_asked_for_once(install, monkeypatch):
    install(torch="2.13.0+cpu")
    check_versions()
    monkeypatch.setattr(_versions, "version", None)
    check_versions()


def test_wrap_names_what_is_outside_what_was_wanted_and_what_to_run(install):
    wrap, model = ft.wrap, tiny_model("llama")
    install(transformers="5.25.0.dev0", nnsight=None)
    with pytest.raises(UnsupportedVersionError) as caught:
        wrap(model, preset="paper")
    assert str(caught.value) == (
        f"wanted nnsight{WINDOW['nnsight']}, found none; "
        f"wanted transformers{WINDOW['transformers']}, found 5.25.0.dev0; "
        f"run: pip install 'nnsight{WINDOW['nnsight']}' 'transformers{WINDOW['transformers']}', "
        f"or set the environment variable {ANY_VERSION}=1 to try what is installed"
    )


def test_the_command_in_the_message_asks_for_what_the_check_wants(install):
    install(**dict.fromkeys(WINDOW, "0.1"))
    with pytest.raises(UnsupportedVersionError) as caught:
        check_versions()
    command = re.search(r"run: (pip install .*), or", str(caught.value))[1]
    pip = [sys.executable, "-m", *shlex.split(command), "--no-index", "--no-deps", "--dry-run"]
    done = subprocess.run(pip, capture_output=True, text=True, check=True)
    assert done.stdout.count("already satisfied") == len(WINDOW)  # by those that the check takes


def test_the_environment_variable_lets_other_versions_pass_with_a_warning(install, monkeypatch):
    wrap, model = ft.wrap, tiny_model("llama")
    install(torch="2.99")
    monkeypatch.setenv(ANY_VERSION, "1")
    with pytest.warns(UserWarning, match=r"untested versions.*wanted torch>=.*, found 2\.99"):
        assert wrap(model, preset="paper").layers


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_any_other_value_of_the_environment_variable_changes_nothing(install, monkeypatch, value):
    install(torch="2.99")
    monkeypatch.setenv(ANY_VERSION, value)
    with pytest.raises(UnsupportedVersionError, match=r"found 2\.99"):
        check_versions()


def test_an_unsupported_version_is_named_before_its_imports_fail(tmp_path):
    package = tmp_path / "nnsight"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('in the words of nnsight')")
    metadata = tmp_path / "nnsight-0.7.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nnsight\nVersion: 0.7.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "adapters")])
    done = subprocess.run(
        [sys.executable, "-c", "import flowtracer_plugin as ft; ft.wrap(None)"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, ANY_VERSION: ""},
    )
    assert done.returncode == 1
    assert "UnsupportedVersionError: wanted nnsight>=0.8,<0.9, found 0.7.0; run: " in done.stderr


# --- what may change from version to version ---


class FromSeven(dict):
    """nnsight's counter of the operations of one name, starting at 7."""

    def get(self, name, _first):
        return super().get(name, 7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_calls_are_found_whatever_numbers_nnsight_gives_them(family, monkeypatch):
    # Not above: nnsight gives `object` a method that beartype fails on if it is loaded later.
    from nnsight.intervention import source as nnsight_source

    class Renumbered(nnsight_source.Instrument):
        def __init__(self):
            super().__init__()
            self.counts = FromSeven()

    monkeypatch.setattr(nnsight_source, "Instrument", Renumbered)
    monkeypatch.setattr(nnsight_source, "FORWARD_CACHE", {})
    reader = AttentionReader(tiny_model(family))
    source = reader.backend._root.get(reader.sites[0].module).source
    assert {op.name.rpartition("_")[2] for op in source}.isdisjoint({"0", "1"})
    reader.verify()
