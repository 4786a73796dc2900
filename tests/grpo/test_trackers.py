"""What experiment trackers, the model card, the arguments and the log say about the credit."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from flowtracer_plugin.grpo import CreditOptions, FlowGRPOTrainer, attach_flow_credit
from flowtracer_plugin.grpo.settings import credit_settings, settings_line, with_credit
from flowtracer_plugin.grpo.trackers import TRACKERS, trackers
from tests.grpo.test_settings import CHATS, told
from tests.grpo.trained import TEXTS, answering
from tests.grpo.worker import build, scripted

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def digits(text):
    """An answer finder of the user's own."""


@pytest.fixture
def tracker(monkeypatch):
    """Puts a module in the place of a tracker: it has its functions, and keeps what they get."""

    # TRL logs times to the real ones, which are not installed.
    for name in TRACKERS:
        monkeypatch.setattr(f"trl.extras.profiling.is_{name}_available", lambda: False)

    def put(name, *, run=True, fails=False):
        module = ModuleType(name)
        module.logged, module.held, module.run = [], {}, object() if run else None

        def log(values):
            if fails:
                raise ConnectionError("no network")
            module.logged.append(values)

        def html(data, inject=True):
            assert not inject  # styles that the page's policy would refuse
            return Path(data).read_text("utf-8")

        def update(values, allow_val_change=False):
            assert allow_val_change  # the settings of a run that is resumed
            assert module.logged == []  # trackio keeps the configuration as it is at the first log
            module.held.update(values)

        module.log, module.Html = log, html
        module.config = SimpleNamespace(update=update)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def test_pages_and_options_go_to_the_trackers_that_are_reported_to(policy, tmp_path, tracker):
    used = [tracker(name) for name in TRACKERS]
    trainer = answering(policy, tmp_path, max_steps=3, flow_page_steps=2, flow_gamma=1.25)
    trainer.args.report_to = [*TRACKERS, "tensorboard"]
    trainer.train()
    pages = sorted((tmp_path / "out" / "flow").glob("step_*.html"))
    assert [page.name for page in pages] == ["step_000000.html", "step_000002.html"]
    wanted = [
        {"flow/page": page.read_text("utf-8"), "train/global_step": step}
        for page, step in zip(pages, (0, 2), strict=True)
    ]
    assert [one.logged for one in used] == [wanted, wanted]
    assert used[0].held == used[1].held == {"flow_credit": trainer.args.flow_credit}
    assert trainer.args.flow_credit["gamma"] == 1.25


def test_only_the_trackers_of_the_main_process_that_are_named_are_used(tracker):
    used = {name: tracker(name) for name in TRACKERS}
    for name in TRACKERS:
        for main in (True, False):
            trainer = SimpleNamespace(
                accelerator=SimpleNamespace(is_main_process=main),
                args=SimpleNamespace(report_to=[name, "tensorboard"]),
            )
            assert trackers(trainer) == [used[name]] * main
    trainer.args.report_to = None
    assert trackers(trainer) == []


def test_a_tracker_without_a_run_or_a_network_ends_no_training(policy, tmp_path, tracker, caplog):
    idle, broken = tracker("wandb", run=False), tracker("trackio", fails=True)
    trainer = answering(policy, tmp_path, max_steps=2, flow_page_steps=1)
    trainer.args.report_to = ["wandb", "trackio"]
    trainer.train()
    assert (idle.logged, idle.held) == ([], {})
    assert broken.held.keys() == {"flow_credit"}
    assert caplog.text.count("the page of step 0 could not be sent") == 1
    assert len(list((tmp_path / "out" / "flow").glob("step_*.html"))) == 2


def test_a_run_says_in_four_places_what_credit_it_gave(policy, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "flowtracer_plugin")
    plain = build(GRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS))
    trainer = attach_flow_credit(plain, CreditOptions(scorer="reach:decided", gamma=2.0))
    line = (
        "scorer=reach:decided, gamma=2.0, top_fraction=0.4; h = 1[target] + Wᵀ h "
        "(FlowTracer, section 3)"
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"flow credit attached: {line}"
    assert f"flow credit: {line}" in caplog.messages
    trainer.save_model()
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.flow_credit == trainer.args.flow_credit
    assert saved.flow_credit["scorer"] == "reach:decided"
    for _ in range(2):  # as at each checkpoint
        trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.count("### Credit for tokens") == 1
    assert card.index("| gamma | 2.0 |") < card.index("### Framework versions")
    assert "- flowtracer\n" in card


def test_the_card_of_the_own_trainer_has_the_options_too(policy, tmp_path, caplog):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_scorer="entropy")
    trainer.create_model_card()
    path = tmp_path / "out" / "README.md"
    assert "| scorer | entropy |" in path.read_text("utf-8")
    assert trainer.args.flow_credit["paper"] == "arXiv 2506.01939; baseline of both papers"
    path.unlink()
    trainer._flow_credit.model_card(lambda: None)  # a trainer that writes no card
    assert "the model card lacks the options of the credit" in caplog.text


def test_functions_and_lists_are_named_and_the_default_is_not_repeated():
    options = CreditOptions(answer=digits, layers=[1, 2], pass_="extra", side="bottom")
    settings = credit_settings(options)
    assert settings["answer"] == f"{__name__}:digits"
    assert settings["layers"] == "1, 2"
    assert settings_line(settings) == (
        "scorer=flow, gamma=1.5, top_fraction=0.4, layers=1, 2, "
        f"answer={__name__}:digits, side=bottom, pass=extra; "
        "throughput f = h ⊙ g (FlowTracer, arXiv 2606.10646)"
    )


def ones(rollouts):
    """One for each token."""


def test_an_own_scorer_is_named_by_its_function():
    settings = credit_settings(CreditOptions(scorer=ones))
    assert settings["source"] == f"{__name__}:ones"
    assert "paper" not in settings
    assert settings_line(settings).endswith(f"One for each token. ({__name__}:ones)")


def test_a_pattern_cannot_break_the_table_of_the_card():
    settings = credit_settings(CreditOptions(scorer="oracle", oracle=r"a|<b>\d*"))
    card = with_credit("# Card\n", settings)
    assert "| oracle | a\\|&lt;b>\\\\d\\* |\n" in card
    assert card.startswith("# Card\n\n### Credit for tokens\n")


def test_the_list_of_a_run_shows_what_the_user_said_without_the_template(policy, tmp_path):
    asked = "3 plus 4 is " * 20
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "so then"}]},
        {"role": "user", "content": [{"type": "text", "text": asked}]},
    ]
    rollout = told(scripted(TEXTS), None)

    def rollouts(prompts, trainer):
        return rollout([asked] * len(prompts), trainer)

    build(
        FlowGRPOTrainer, policy, tmp_path, rows={"prompt": [chat] * 16}, rollout_func=rollouts
    ).train()
    listed = (tmp_path / "out" / "flow" / "index.html").read_text("utf-8")
    assert f'<span class="asked value">{asked.strip()}</span>' in listed
    build(
        FlowGRPOTrainer, policy, tmp_path, rows=CHATS, rollout_func=told(scripted(TEXTS), None)
    ).train()
    assert '<span class="asked value">3 plus 4 is</span>' in (
        tmp_path / "out" / "flow" / "index.html"
    ).read_text("utf-8")
