"""The adapter guide, carried out: its package is built, installed and used in an environment."""

from __future__ import annotations

import importlib
import json
import os
import re
import site
import subprocess
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from flowtracer_plugin import attention
from flowtracer_plugin.cli import app
from flowtracer_plugin.diagnosis import ADVICE, diagnose
from flowtracer_plugin.reader import AttentionReader

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")

SAVE = """
import sys, torch, wren_lm
torch.manual_seed(0)
model = wren_lm.WrenForCausalLM(
    wren_lm.WrenConfig(vocab_size=64, hidden_size=48, num_hidden_layers=3, cap=3.0)
)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
    model.embed_tokens.weight.normal_(0, 1)
model.save_pretrained(sys.argv[1])
"""

READ = """
import sys, torch, flowtracer_plugin as ft
from flowtracer_plugin.attention import find_adapter
from flowtracer_plugin.cli_loading import load_model
model = load_model(sys.argv[1], "cpu", "auto")
tracer = ft.wrap(model, layers="all")
assert find_adapter(model).name == "wren"
ids = torch.tensor([[5, 3, 8, 1, 9, 2, 7], [0, 0, 4, 4, 6, 11, 30]])
torch.save((ids, tracer.attention(ids, ids != 0), model.state_dict()), sys.argv[2])
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def write_package(folder: Path) -> Path:
    """The package of the guide; every Python block names its file in its first line."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(blocks("toml")[0])
    for text in blocks("python"):
        path = folder / re.match(r'"""(\S+): ', text)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


class Environment:
    """A virtual environment of its own, on top of the packages of the running one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        # The checkout first: an editable installation may be of another one.
        parents = [str(ROOT), str(ROOT / "adapters"), *site.getsitepackages()]
        (packages / "parents.pth").write_text("\n".join(parents))

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [self.python, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def install(self, package: Path) -> None:
        flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        ran = self.run("-m", "pip", "install", *flags, "--disable-pip-version-check", package)
        assert ran.returncode == 0, ran.stderr

    def flowtracer(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "flowtracer_plugin", *arguments)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("extension")
    made = Environment(folder / "env")
    made.install(write_package(folder / "package"))
    ran = made.run("-c", SAVE, made.folder / "wren")
    assert ran.returncode == 0, ran.stderr
    return made


@pytest.fixture
def mistaken(environment) -> Iterator[Callable[[str, str], None]]:
    """The installed adapter, with some of its text replaced."""
    (file,) = environment.folder.glob("lib/python*/site-packages/wren_lm/flowtracer.py")
    right = file.read_text()

    def change(old: str, new: str) -> None:
        assert old in right
        file.write_text(right.replace(old, new))

    yield change
    file.write_text(right)


def test_an_installed_adapter_is_listed_with_where_it_comes_from(environment):
    listed = json.loads(environment.flowtracer("adapters", "--json").stdout)
    assert listed[0] == {
        "name": "wren",
        "distribution": "wren-lm",
        "version": "0.1.0",
        "entry_point": "wren_lm.flowtracer:ADAPTERS",
        "skipped": None,
        "generic": False,
        "interface": False,
    }
    assert {entry["distribution"] for entry in listed[1:]} == {"flowtracer-plugin"}
    lines = environment.flowtracer("adapters").stdout.splitlines()
    assert lines[1].split() == ["wren", "wren-lm", "0.1.0", "wren_lm.flowtracer:ADAPTERS"]


def test_the_check_of_an_installed_adapter_passes(environment):
    ran = environment.flowtracer("adapters", "check", "wren")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "adapter  wren from wren-lm 0.1.0 (wren_lm.flowtracer:ADAPTERS)" in ran.stdout
    assert ran.stdout.endswith("3 of 3 sites pass\n")
    assert ran.stderr == ""


def slow_head_mean(ids, weights, cap=3.0) -> torch.Tensor:
    """Mean attention of all layers and heads, one number at a time, in double precision."""
    weights = {name: weight.double() for name, weight in weights.items()}
    found = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.float64)
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for row, text in enumerate(ids.tolist()):
        states = [weights["embed_tokens.weight"][token] for token in text]
        for layer in range(layers):
            part = {n.split(".", 2)[2]: w for n, w in weights.items() if f"blocks.{layer}." in n}
            packed = [
                (part["project.weight"] @ state + part["project.bias"]).view(8, 12)
                for state in states
            ]
            mixed = [torch.zeros(4, 12, dtype=torch.float64) for _ in states]
            for later in range(len(text)):
                seen = [k for k in range(later + 1) if text[k] != 0]
                for head in range(4):
                    products = [packed[later][head] @ packed[k][4 + head // 2] for k in seen]
                    powers = [
                        float(torch.exp(cap * torch.tanh(p / 12**0.5 / cap))) for p in products
                    ]
                    for k, power in zip(seen, powers, strict=True):
                        share = power / sum(powers)
                        mixed[later][head] += share * packed[k][6 + head // 2]
                        if text[later] != 0:
                            found[row, later, k] += share / 4 / layers
            states = [
                state + part["out.weight"] @ mix.flatten() + part["out.bias"]
                for state, mix in zip(states, mixed, strict=True)
            ]
    return found


def test_wrap_finds_an_installed_adapter_and_reads_the_right_numbers(environment, tmp_path):
    ran = environment.run("-c", READ, "wren", tmp_path / "read.pt")
    assert ran.returncode == 0, ran.stderr
    ids, found, weights = torch.load(tmp_path / "read.pt")
    wanted = slow_head_mean(ids, weights)
    assert wanted.sum(-1)[1].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


# --- an adapter with a mistake ---


def numbers_aside(text: str) -> str:
    return re.sub(r"\d\.?\d*e-\d\d", "N", text)


def test_the_guide_shows_what_the_check_says_of_a_mistake(environment, mistaken):
    mistaken('            softcap=kwargs["cap"],\n', "")
    ran = environment.flowtracer("adapters", "check", "wren")
    assert ran.returncode == 1
    assert numbers_aside(ran.stdout) == numbers_aside(blocks("text")[1])


@pytest.fixture(scope="module")
def wren(environment) -> Iterator[None]:
    """The architecture, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(environment.folder.parent / "package")
        importlib.import_module("wren_lm")
        yield


@pytest.fixture
def check(wren, environment, monkeypatch) -> Callable[..., Result]:
    """`flowtracer adapters check` with a mistake in the guide's adapter, without a new process."""

    def run(old: str, new: str, *arguments: str) -> Result:
        namespace: dict[str, Any] = {}
        assert old in blocks("python")[1]
        exec(blocks("python")[1].replace(old, new), namespace)
        monkeypatch.setattr(attention, "_registered", [*namespace["ADAPTERS"]])
        folder = str(environment.folder / "wren")
        return CliRunner().invoke(app, ["adapters", "check", folder, *arguments])

    return run


@pytest.mark.parametrize(
    ("old", "new", "verdict", "said"),
    [
        ("mask=~hidden", "mask=hidden", "misread", "differ from the attention output by"),
        ("mask=~hidden", "mask=None", "padding", "take it from the call"),
        ("** -0.5", "** -0.49", "slightly off", "bias"),
        ('kwargs["cap"]', 'kwargs["limit"]', "read() fails", "KeyError: 'limit'"),
        ("value.transpose(1, 2)", "value.transpose(1, 2)[..., 1:]", "does not fit", "17, 4, 11]"),
        ("value.transpose(1, 2)", "None", "does not fit", "reads no values"),
        ('function="wren_attention"', 'function="attend"', "not found", "wren_attention_0"),
        ("layer=layer,", "layer=layer, visit=1,", "not found", "does not run so often"),
        ("layer=layer,", "layer=layer, visit=layer % 2,", "not found", "lists visit 1 of blocks.1"),
    ],
)
def test_every_kind_of_mistake_has_its_verdict(check, old, new, verdict, said):
    ran = check(old, new)
    assert ran.exit_code == 1
    rows = [line for line in ran.stdout.splitlines() if "  blocks." in line and line[0].isdigit()]
    assert len(rows) == 3
    assert rows[1].endswith(f"  {verdict}"), ran.stdout
    if "% 2" in new:  # the others are shown as well
        assert rows[0].endswith("  ok")
    assert said in ran.stdout
    assert f"look at {ADVICE[verdict]}".replace("`", "") in ran.stdout


def test_the_arguments_of_a_misread_call_are_shown(check):
    ran = check("mask=~hidden", "mask=hidden")
    shapes = "float32[1, 17, 4, 12], float32[1, 17, 2, 12], float32[1, 17, 2, 12]"
    assert f"the call: wren_attention({shapes}, bool[1, 1, 17, 17], cap=3.0)" in ran.stdout


def test_the_same_as_json(check):
    document = json.loads(check("mask=~hidden", "mask=hidden", "--json").stdout)
    assert not document["passed"]
    assert document["adapter"]["distribution"] is None
    assert [found["module"] for found in document["sites"]] == [f"blocks.{n}" for n in range(3)]
    for found in document["sites"]:
        assert (found["heads"], found["groups"]) == (4, 2)
        assert found["difference"] > found["tolerance"] == 2e-3
        assert found["look_at"] == ADVICE["misread"]
    nothing = json.loads(check('kwargs["cap"]', 'float("nan")', "--json").stdout)
    assert nothing["sites"][0]["difference"] == "nan"


def test_sites_in_another_order_are_a_mistake_of_the_whole(check):
    ran = check("enumerate(mixers)", "reversed([*enumerate(mixers)])")
    assert ran.exit_code == 1
    assert "3 of 3 sites pass" in ran.stdout
    assert "the run as a whole: the adapter 'wren' lists an attention call that" in ran.stdout


def test_a_module_that_is_run_more_often_than_it_is_listed_is_a_mistake_of_the_whole(
    environment, wren
):
    namespace: dict[str, Any] = {}
    exec(blocks("python")[1], namespace)
    model = AutoModelForCausalLM.from_pretrained(environment.folder / "wren")
    model.blocks[1] = model.blocks[0]
    diagnosis = diagnose(AttentionReader(model, namespace["ADAPTERS"][0]))
    assert [found.verdict for found in diagnosis.sites] == ["ok", "ok"]
    assert "runs blocks.0 2 times in one forward pass" in diagnosis.problem
    assert not diagnosis.passed


def test_a_module_that_is_not_there_is_named(check):
    ran = check("module=path", "module=path + '.attention'")
    assert ran.exit_code == 1
    assert "lists the module 'blocks.0.attention', which WrenForCausalLM" in str(ran.exception)


def test_an_adapter_that_fails_in_matches_stands_in_nobodys_way(environment, mistaken):
    mistaken("return bool(self.sites(model))", "return model.config.feathers > 3")
    ran = environment.flowtracer("adapters", "check", "wren")
    assert ran.returncode == 1
    assert "Skipped wren from wren-lm 0.1.0: its matches() fails (AttributeError: " in ran.stderr
    assert "mend, update or uninstall wren-lm" in ran.stderr
    model = os.fspath(ROOT / "examples" / "reasoner" / "model")
    assert environment.flowtracer("adapters", "check", model).returncode == 0


# --- the guide ---


def test_the_guide_lists_every_verdict_with_its_advice():
    after = GUIDE.partition("| verdict | look at |\n| --- | --- |\n")[2]
    table = re.findall(r"^\| (.+?) \| (.+) \|$", after.partition("\n\n")[0], re.MULTILINE)
    assert dict(table) == ADVICE


def test_the_guide_is_short():
    assert len(GUIDE.splitlines()) < 200
