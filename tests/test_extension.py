"""The adapter guide works: its package is built, installed and used in an environment."""

from __future__ import annotations

import importlib
import json
import math
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

from flowtracer_plugin.attention import adapter as attention
from flowtracer_plugin.cli.commands import app
from flowtracer_plugin.reading.diagnosis import ADVICE, diagnose
from flowtracer_plugin.reading.reader import AttentionReader

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")

SAVE = """
import sys, torch, fox_lm
torch.manual_seed(0)
config = fox_lm.FoxConfig(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2,
)
model = fox_lm.FoxForCausalLM(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.25 * torch.randn_like(parameter))  # norms and gates are at rest at first
    model.embed_tokens.weight.normal_(0, 1)
model.save_pretrained(sys.argv[1])
"""

READ = """
import sys, torch, flowtracer_plugin as ft
from flowtracer_plugin.attention import find_adapter
from flowtracer_plugin.model.loading import load_model
model = load_model(sys.argv[1], "cpu", "auto")
tracer = ft.wrap(model, layers="all")
assert find_adapter(model).name == "fox"
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
    """A virtual environment that also sees the packages of the running one."""

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
    ran = made.run("-c", SAVE, made.folder / "fox")
    assert ran.returncode == 0, ran.stderr
    return made


@pytest.fixture
def mistaken(environment) -> Iterator[Callable[[str, str], None]]:
    """The installed adapter, with some of its text replaced."""
    (file,) = environment.folder.glob("lib/python*/site-packages/fox_lm/flowtracer.py")
    right = file.read_text()

    def change(old: str, new: str) -> None:
        assert old in right
        file.write_text(right.replace(old, new))

    yield change
    file.write_text(right)


def test_an_installed_adapter_is_listed_with_where_it_comes_from(environment):
    listed = json.loads(environment.flowtracer("adapters", "--json").stdout)
    assert listed[0] == {
        "name": "fox",
        "distribution": "fox-lm",
        "version": "0.1.0",
        "entry_point": "fox_lm.flowtracer:ADAPTERS",
        "skipped": None,
        "generic": False,
        "interface": False,
    }
    assert {entry["distribution"] for entry in listed[1:]} == {"flowtracer-plugin"}


def test_the_check_of_an_installed_adapter_passes(environment):
    ran = environment.flowtracer("adapters", "check", "fox")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "adapter  fox from fox-lm 0.1.0 (fox_lm.flowtracer:ADAPTERS)" in ran.stdout
    assert ran.stdout.endswith("3 of 3 sites pass\n")
    assert ran.stderr == ""


def rms_norm(state, weight) -> torch.Tensor:
    return state / (state @ state / len(state) + 2**-23) ** 0.5 * weight


def feed_forward(state, part) -> torch.Tensor:
    normed = rms_norm(state, part["mlp_norm.weight"])
    gate = part["mlp.gate_proj.weight"] @ normed
    up = part["mlp.up_proj.weight"] @ normed
    return part["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def slow_head_mean(ids, weights) -> torch.Tensor:
    """Mean attention of all layers and heads, one number at a time, in double precision.

    As the paper defines it: every forget gate behind a key is a factor on its exponential.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    found = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.float64)
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for row, text in enumerate(ids.tolist()):
        states = [weights["embed_tokens.weight"][token] for token in text]
        for layer in range(layers):
            part = {n.split(".", 2)[2]: w for n, w in weights.items() if f"blocks.{layer}." in n}
            normed = [rms_norm(state, part["norm.weight"]) for state in states]
            packed = [(part["project.weight"] @ state).view(8, 12) for state in normed]
            gates = [
                1 / (1 + torch.exp(-(part["forget.weight"] @ state + part["forget.bias"])))
                for state in normed
            ]
            mixed = [torch.zeros(4, 12, dtype=torch.float64) for _ in states]
            for later in range(len(text)):
                seen = [k for k in range(later + 1) if text[k] != 0]
                for head in range(4):
                    products = [packed[later][head] @ packed[k][4 + head // 2] for k in seen]
                    powers = [
                        float(torch.exp(p / 12**0.5))
                        * math.prod(float(gate[head]) for gate in gates[k + 1 : later + 1])
                        for k, p in zip(seen, products, strict=True)
                    ]
                    for k, power in zip(seen, powers, strict=True):
                        share = power / sum(powers)
                        mixed[later][head] += share * packed[k][6 + head // 2]
                        if text[later] != 0:
                            found[row, later, k] += share / 4 / layers
            states = [
                state + part["out.weight"] @ mix.flatten()
                for state, mix in zip(states, mixed, strict=True)
            ]
            states = [state + feed_forward(state, part) for state in states]
    return found


def test_wrap_finds_an_installed_adapter_and_reads_the_right_numbers(environment, tmp_path):
    ran = environment.run("-c", READ, "fox", tmp_path / "read.pt")
    assert ran.returncode == 0, ran.stderr
    ids, found, weights = torch.load(tmp_path / "read.pt")
    wanted = slow_head_mean(ids, weights)
    assert wanted.sum(-1)[1].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


# --- an adapter with a mistake ---


def numbers_aside(text: str) -> str:
    return re.sub(r"\d\.?\d*e-\d\d", "N", text)


def test_the_guide_shows_what_the_check_says_of_a_mistake(environment, mistaken):
    mistaken("            bias=kept[..., :, None] - kept[..., None, :],\n", "")
    ran = environment.flowtracer("adapters", "check", "fox")
    assert ran.returncode == 1
    assert numbers_aside(ran.stdout) == numbers_aside(blocks("text")[0])


@pytest.fixture(scope="module")
def fox(environment) -> Iterator[None]:
    """Register the guide's architecture in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(environment.folder.parent / "package")
        importlib.import_module("fox_lm")
        yield


@pytest.fixture
def check(fox, environment, monkeypatch) -> Callable[..., Result]:
    """`flowtracer adapters check` with a mistake in the guide's adapter, without a new process."""

    def run(old: str, new: str, *arguments: str) -> Result:
        namespace: dict[str, Any] = {}
        assert old in blocks("python")[1]
        exec(blocks("python")[1].replace(old, new), namespace)
        monkeypatch.setattr(attention, "_registered", [*namespace["ADAPTERS"]])
        folder = str(environment.folder / "fox")
        return CliRunner().invoke(app, ["adapters", "check", folder, *arguments])

    return run


@pytest.mark.parametrize(
    ("old", "new", "verdict", "said"),
    [
        ("mask=~hidden", "mask=hidden", "misread", "differ from the attention output by"),
        ("mask=~hidden", "mask=None", "padding", "take it from the call"),
        ("** -0.5", "** -0.49", "slightly off", "bias"),
        ("kept[..., :, None] -", "-kept[..., :, None] +", "misread", "bias, sinks"),
        ('kwargs["log_gate"]', 'kwargs["gate"]', "read() fails", "KeyError: 'gate'"),
        ("value.transpose(1, 2)", "value.transpose(1, 2)[..., 1:]", "does not fit", "17, 4, 11]"),
        ("value.transpose(1, 2)", "None", "does not fit", "reads no values"),
        (
            'function="forgetting_attention"',
            'function="attend"',
            "not found",
            "forgetting_attention, ",
        ),
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


def test_the_check_as_json(check):
    document = json.loads(check("mask=~hidden", "mask=hidden", "--json").stdout)
    assert not document["passed"]
    assert document["adapter"]["distribution"] is None
    assert [found["module"] for found in document["sites"]] == [f"blocks.{n}" for n in range(3)]
    for found in document["sites"]:
        assert (found["heads"], found["groups"]) == (4, 2)
        assert found["difference"] > found["tolerance"] == 2e-3
        assert found["look_at"] == ADVICE["misread"]
    nothing = json.loads(check("query.shape[-1] ** -0.5", 'float("nan")', "--json").stdout)
    assert nothing["sites"][0]["difference"] == "nan"


def test_sites_in_another_order_are_reported_for_the_whole_run(check):
    ran = check("enumerate(layers)", "reversed([*enumerate(layers)])")
    assert ran.exit_code == 1
    assert "3 of 3 sites pass" in ran.stdout
    assert "the run as a whole: the adapter 'fox' lists an attention call that" in ran.stdout


def test_a_module_that_runs_more_often_than_listed_is_reported_for_the_whole_run(environment, fox):
    namespace: dict[str, Any] = {}
    exec(blocks("python")[1], namespace)
    model = AutoModelForCausalLM.from_pretrained(environment.folder / "fox")
    model.blocks[1] = model.blocks[0]
    diagnosis = diagnose(AttentionReader(model, namespace["ADAPTERS"][0]))
    assert [found.verdict for found in diagnosis.sites] == ["ok", "ok"]
    assert "runs blocks.0 2 times in one forward pass" in diagnosis.problem
    assert not diagnosis.passed


def test_a_module_that_is_not_there_is_named(check):
    ran = check("module=path", "module=path + '.attention'")
    assert ran.exit_code == 1
    assert "lists the module 'blocks.0.attention', which FoxForCausalLM" in str(ran.exception)


def test_an_adapter_that_fails_in_matches_is_skipped(environment, mistaken):
    mistaken("return bool(self.sites(model))", "return model.config.tails > 1")
    ran = environment.flowtracer("adapters", "check", "fox")
    assert ran.returncode == 1
    assert "Skipped fox from fox-lm 0.1.0: its matches() fails (AttributeError: " in ran.stderr
    assert "fix, update or uninstall fox-lm" in ran.stderr
    model = os.fspath(ROOT / "examples" / "reasoner" / "model")
    assert environment.flowtracer("adapters", "check", model).returncode == 0


# --- the guide ---


def test_the_guide_lists_every_verdict_with_its_advice():
    after = GUIDE.partition("| verdict | look at |\n| --- | --- |\n")[2]
    table = re.findall(r"^\| (.+?) \| (.+) \|$", after.partition("\n\n")[0], re.MULTILINE)
    assert dict(table) == ADVICE


def test_the_guide_is_short():
    assert len(GUIDE.splitlines()) < 200
