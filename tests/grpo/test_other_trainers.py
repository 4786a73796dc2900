"""Credit for trainers other than TRL's: the weights that TRL's trainer would use."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import flowtracer_plugin as ft
from flowtracer_plugin.grpo import CreditOptions, rollout_credit
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.grpo.trained import TEXTS, trained
from tests.grpo.worker import scripted, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

LONG = [f"{text} {text}" for text in TEXTS]
SCORERS = [
    "flow",
    "flow:decided",
    "reach:derivation",
    "flow:causal:2",
    "attention*surprisal",
    "entropy",
    "uniform",
]


@pytest.fixture
def tracer(policy):
    return ft.wrap(AutoModelForCausalLM.from_pretrained(policy), word_tokenizer())


def parts(rollouts):
    names = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
    return [rollouts[name] for name in names]


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_weights_are_those_of_our_trainer(policy, tmp_path, tracer, scorer):
    _, seen = trained(
        policy, tmp_path, flow_scorer=scorer, flow_pass="extra", rollout_func=scripted(LONG),
        max_steps=1,
    )  # fmt: skip
    options = CreditOptions(scorer=scorer)
    for size in (None, 1):
        found = rollout_credit(tracer, *parts(seen[0]), options, batch_size=size)
        torch.testing.assert_close(found, seen[0][WEIGHTS], rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in tracer.model.parameters())


def texts(tracer, *said):
    ids = [tracer.tokenizer(text)["input_ids"] for text in said]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    prompts = torch.tensor([tracer.tokenizer("3 plus 4 is")["input_ids"]] * len(ids))
    return prompts, padded, torch.ones_like(prompts), mask


def test_a_row_without_an_answer_has_plain_credit(tracer):
    rollouts = texts(tracer, "then 4 plus 3 is 7 apples so", "so then is plus")
    weights = rollout_credit(tracer, *rollouts)
    assert weights[0].max() == 1.5
    assert weights[1].unique().tolist() == [1.0]
    with pytest.raises(ft.AnswerNotFoundError, match=r"no answer found in completions \[1\]; set"):
        rollout_credit(tracer, *rollouts, CreditOptions(no_answer="raise"))


def test_signs_need_advantages(tracer):
    rollouts = texts(tracer, "then 4 plus 3 is 7 apples so", "so 1 then 4 plus #### 9")
    options = CreditOptions(sign="positive")
    with pytest.raises(ValueError, match="needs the sign of each rollout's advantage; pass"):
        rollout_credit(tracer, *rollouts, options)
    weights = rollout_credit(tracer, *rollouts, options, advantages=torch.tensor([1.0, -1.0]))
    assert weights[0].max() == 1.5
    assert weights[1].max() == 1.0


@pytest.mark.usefixtures("unchecked")
def test_rollouts_that_do_not_belong_together_are_refused(tracer):
    prompts, said, _, spoken = texts(tracer, "so 7")
    with pytest.raises(ValueError, match="prompt_ids and prompt_mask must both be"):
        rollout_credit(tracer, prompts, said, spoken[:, :1], spoken)
