"""Scorers of your own: how they are found, what they are given, and what they may return."""

import importlib
import sys
import textwrap

import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.credit import ScorerError, find_scorer, needs, score_text
from flowtracer_plugin.credit.choosing import InvalidScoreError
from flowtracer_plugin.credit.own_scorers import scorer_name
from flowtracer_plugin.credit.token_scores import own_codes, read_text, token_score
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

MODULE = """
import torch
from flowtracer_plugin.credit import needs


@needs("flow", "tokens")
def digits(rollouts):
    \"\"\"Flow at digits.\"\"\"
    start = rollouts.prompt_length
    flow = rollouts.throughput[:, start:]
    shown = [[piece.strip().isdigit() for piece in row[start:]] for row in rollouts.tokens]
    return flow * torch.tensor(shown)


def first(rollouts):
    return rollouts.competing.cumsum(-1) == 1


@needs("flow")
def wide(rollouts):
    return rollouts.throughput


def of_numpy(rollouts):
    return rollouts.competing.numpy()


def undeclared(rollouts):
    return rollouts.throughput[:, rollouts.prompt_length:]


def no_number(rollouts):
    return torch.full(rollouts.competing.shape, torch.nan)


def below(rollouts):
    return -torch.ones(rollouts.competing.shape)


constant = 5
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A current folder with the module `mine`, and a function that installs packages."""
    before, path = set(sys.modules), list(sys.path)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()

    def install(package, **points):
        metadata = tmp_path / f"{package}-0.3.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n"
        )
        lines = [f"{name} = {value}" for name, value in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[flowtracer.scorers]", *lines, ""]))
        monkeypatch.setattr(sys, "path", [str(tmp_path), *path])
        importlib.invalidate_caches()

    yield install
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def text():
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")
    return read_text(tracer, tracer.trace(PROMPT, RESPONSE))


def test_a_function_by_its_path_gets_what_it_needs(packages, text):
    trace, found = text.trace, token_score("mine:digits")(text)
    asked = trace.spans.prompt_length
    for place, piece in enumerate(trace.tokens):
        counts = place >= asked and piece.strip().isdigit()
        assert found[place] == (pytest.approx(trace.throughput[place]) if counts else 0)
    assert np.count_nonzero(found) == 5
    assert token_score("mine:first")(text).nonzero()[0].tolist() == [asked]


def test_an_own_scorer_takes_presets_and_is_multiplied(packages, text):
    digits, flow = (token_score(name)(text) for name in ("mine:digits:sharp", "flow:sharp"))
    assert digits.any()
    assert digits[digits > 0] == pytest.approx(flow[digits > 0])
    joint = token_score("flow*mine:first")(text)
    assert joint == pytest.approx(token_score("flow")(text) * token_score("mine:first")(text))
    assert find_scorer("flow*mine:first").code == find_scorer("mine:first").code != ""
    with pytest.raises(ValueError, match="and 'mine:first' reads none; leave out ':sharp'"):
        find_scorer("mine:first:sharp")


def test_an_installed_scorer_goes_by_its_name(packages, text):
    packages("acme", acme_digits="mine:digits", flow="mine:first")
    scorer = find_scorer("acme_digits")
    assert (scorer.name, scorer.formula) == ("acme_digits", "Flow at digits.")
    assert scorer.source == "mine:digits"
    assert token_score("acme_digits")(text).any()
    assert find_scorer("flow").source.startswith("FlowTracer")  # a built-in name stays built in
    with pytest.raises(ValueError, match="uniform, acme_digits, flow, or the path package"):
        find_scorer("acme")


def test_two_installed_scorers_of_one_name_are_refused(packages):
    packages("acme", digits="mine:digits")
    packages("bear", digits="mine:first")
    wanted = "'digits': mine:digits of acme 0.3 and mine:first of bear 0.3; name one of them by its"
    with pytest.raises(ScorerError, match=wanted):
        find_scorer("digits")
    find_scorer("mine:digits")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:nothing", "cannot import the scorer 'mine:nothing': AttributeError: .*nothing"),
        ("none.such:digits", "ModuleNotFoundError: No module named 'none'; wanted the path"),
        ("broken:digits", "cannot import .*: ZeroDivisionError: division by zero; wanted"),
        ("mine:constant", "wanted a function from Rollouts .* as scorer 'mine:constant', found 5"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(packages, tmp_path, name, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ScorerError, match=message):
        find_scorer(name)


def test_dots_alone_are_no_path():
    with pytest.raises(ValueError, match=r"module:function of your own .*'mine.first'"):
        find_scorer("mine.first")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("wide", ScorerError, r"must return .* here \(1, 16\), got torch.float32 \(1, 28\); cut"),
        ("of_numpy", ScorerError, r"'mine:of_numpy' must return a tensor .* got array\("),
        ("undeclared", ScorerError, "'mine:undeclared' fails: TypeError: .* ask for with @needs"),
        ("no_number", InvalidScoreError, "scores of 'mine:no_number' must be finite .* got nan"),
        ("below", InvalidScoreError, "scores of 'mine:below' must be finite .* got -1.0"),
    ],
)
def test_what_is_no_score_is_one_sentence(packages, text, name, kind, message):
    with pytest.raises(kind, match=message):
        token_score(f"mine:{name}")(text)


def test_a_rollout_with_an_invalid_score_has_no_choice(packages, text):
    scorer = find_scorer("mine:below")
    rollouts = text.rollouts(scorer)
    features = scorer.measure(rollouts)
    boost, wrong = scorer.choices(features, rollouts, 0.4)
    assert not boost.any()
    assert wrong.tolist() == [True]
    error = scorer.invalid(features, rollouts)
    assert str(error) == "the scores of 'mine:below' must be finite and not negative, got -1.0"


def test_needs_are_checked_where_they_are_written():
    with pytest.raises(ScorerError, match=r"needs some of flow, .*, got 'throughput'; write"):
        needs("throughput")
    with pytest.raises(ScorerError, match=r"write two scorers, and multiply them: 'one[*]other'"):
        needs("attention", "entropy")


def lengths(rollouts):
    """Characters; needs nothing but what is there."""
    return torch.ones(rollouts.competing.shape)


def test_a_function_itself_is_a_scorer_by_its_path(text):
    path = f"{__name__}:lengths"
    assert find_scorer(lengths).name == path
    assert [*score_text(text.tracer, text.trace, ["flow", lengths])] == ["flow", path]
    with pytest.raises(ScorerError, match="define it at the top of a module"):
        scorer_name(lambda rollouts: lengths(rollouts))


def test_a_changed_function_is_another_setting(packages, tmp_path):
    scores = {"flow": token_score("flow"), "mine:first": token_score("mine:first")}
    before = own_codes(scores)
    assert list(before["own_scorers"]) == ["mine:first"]
    assert own_codes({"flow": token_score("flow")}) == {}
    del sys.modules["mine"]
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE).replace("== 1", "== 2 "))
    importlib.invalidate_caches()
    import linecache

    linecache.clearcache()
    assert own_codes({"mine:first": token_score("mine:first")}) != before
