"""GRPO with tools: their output is read, but its tokens do not compete and keep weight 1."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from flowtracer_plugin.grpo import FlowGRPOConfig, FlowGRPOTrainer
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.grpo.trained import LAYERS, logged, same_parameters, slow_weights, watched
from tests.grpo.worker import config, reward, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] }} {{ call['function']['arguments'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}so then{% endif %}"
)
ASKED, SAID = "3 plus 4", "is 7 apples so <eos>"


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    return f"then {a + b} apples then"


def parsed(tokenizer, ids, **_):
    """A tool call for every sum, and plain text otherwise."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    message = {"role": "assistant", "content": text}
    if "plus" not in text:
        return message
    call = {"name": "add", "arguments": {"a": 3, "b": 4}}
    return {**message, "tool_calls": [{"type": "function", "function": call}]}


class Scripted(GRPOTrainer):
    """First calls the tool, then answers."""

    turns = 0

    def _generate_single_turn(self, prompt_ids, *_, **__):
        text = SAID if self.turns % 2 else ASKED
        self.turns += 1
        return [word_tokenizer()(text)["input_ids"] for _ in prompt_ids], None


class FlowScripted(FlowGRPOTrainer, Scripted):
    pass


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "parse_response", parsed)


def trained(kind, policy, folder, **options):
    from datasets import Dataset
    from trl import GRPOConfig

    tokenizer = word_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, {"of": "nothing that is used"}
    settings = FlowGRPOConfig if kind is FlowScripted else GRPOConfig
    chat = [{"role": "user", "content": "3 plus 4 is"}]
    trainer = kind(
        policy,
        reward,
        args=config(settings, folder, max_completion_length=24, **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [chat] * 16}),
        tools=[add],
    )
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"flow_pass": "extra"}])
def test_a_tools_tokens_are_read_but_do_not_compete_and_keep_weight_one(policy, tmp_path, options):
    _, seen = trained(FlowScripted, policy, tmp_path, learning_rate=0.0, **options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), word_tokenizer()
    for step in seen:
        for row, mask in enumerate(step["completion_mask"].bool()):
            ids, chosen = step["completion_ids"][row][mask], step["tool_mask"][row][mask]
            text = tokenizer.decode(ids)
            assert 0 < int((chosen == 0).sum()) < len(chosen)
            assert tokenizer.decode(ids[chosen == 0]).startswith("then 7 apples then")
            place = max(i for i, token in enumerate(ids) if tokenizer.decode(token) == "7")
            prompt = step["prompt_ids"][row][step["prompt_mask"][row].bool()]
            wanted = slow_weights(
                model, text, tokenizer.decode(prompt), place, layers=LAYERS["middle"],
                target="answer", top_fraction=0.4, gamma=1.5, normalize="none",
                chosen=chosen.bool().tolist(),
            )  # fmt: skip
            weights = step[WEIGHTS][row][mask]
            assert weights.tolist() == [weight or 1.0 for weight in wanted]
            assert weights[chosen == 0].eq(1).all()
            assert weights.max() > 1


def test_uniform_credit_is_plain_grpo_with_tools(policy, tmp_path):
    ours, _ = trained(FlowScripted, policy, tmp_path, flow_gamma=1.0)
    plain, _ = trained(Scripted, policy, tmp_path)
    assert same_parameters(ours, plain)
    assert logged(ours, "answer_found") == [1.0, 1.0]
