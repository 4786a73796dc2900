"""Gradient times input equals finite differences, and leaves the model as it was."""

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.credit.saliency import answer_saliency
from tests.families import tiny_model
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

FAMILIES = ("llama", "gpt2", "gemma3_text", "qwen3_moe")
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "head_dim": 4}


def padded(left=2, right=1, seed=0):
    """Three texts between paddings: an answer of two tokens, one at the end, and none."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.zeros(3, 12, dtype=torch.bool)
    visible[0, left : 12 - right] = True
    visible[1, left + 1 :] = True
    visible[2, left : 12 - right] = True
    answer = torch.zeros_like(visible)
    answer[0, 7:9] = True
    answer[1, 11] = True
    return torch.randint(3, 100, (3, 12), generator=generator), visible, answer


def slow(model, ids, answer, step=2e-3):
    """‖∂ log p / ∂x‖ · ‖x‖ of one text without padding, each slope by two runs of the model.

    The norms of the model are float32 whatever it is: smaller steps measure their rounding.
    """
    embedded = model.get_input_embeddings()(ids[None]).detach()[0]
    places = answer.nonzero()[:, 0].tolist()

    def chance(inputs):
        chances = model(inputs_embeds=inputs).logits.log_softmax(-1)
        return sum(chances[:, place - 1, ids[place]] for place in places)

    found = []
    for token in range(len(ids)):
        slopes = []
        for axis in range(embedded.shape[1]):
            moved = embedded.repeat(2, 1, 1)
            moved[0, token, axis] += step
            moved[1, token, axis] -= step
            above, below = chance(moved)
            slopes.append(float(above - below) / (2 * step))
        length = sum(value**2 for value in embedded[token].tolist()) ** 0.5
        found.append(sum(slope**2 for slope in slopes) ** 0.5 * length)
    return found


@torch.no_grad()
def test_it_is_the_slope_of_the_answer_at_every_embedding():
    model = tiny_model("llama", **SMALL).double()
    ids, visible, answer = padded()
    found = answer_saliency(model, ids, visible, answer)
    assert found.dtype == torch.float32
    for row in range(2):
        seen = visible[row]
        wanted = slow(model, ids[row, seen], answer[row, seen])
        assert found[row, seen].tolist() == pytest.approx(wanted, rel=5e-4, abs=1e-6)
        last = int(answer[row, seen].nonzero()[-1])
        assert max(wanted) > 0.1
        assert wanted[last:] == [0.0] * (len(wanted) - last)  # no later token can depend on it
    assert not found[2].any()
    assert not found[~visible].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_other_rows_change_nothing(family):
    model = tiny_model(family)
    ids, visible, answer = padded()
    together = answer_saliency(model, ids, visible, answer)
    torch.testing.assert_close(
        together, answer_saliency(model, ids, visible, answer, batch_size=1), rtol=1e-3, atol=1e-5
    )
    for row in range(2):
        seen = visible[row]
        one = (part[row : row + 1, seen] for part in (ids, visible, answer))
        alone = answer_saliency(model, *one)
        torch.testing.assert_close(together[row, seen], alone[0], rtol=1e-3, atol=1e-5)


def trained(name):
    """A model in training mode: with dropout, with LoRA, or with gradients recomputed."""
    model = tiny_llama(attention_dropout=0.5)
    if name == "LoRA":
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    if name == "checkpoints":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    if name == "bfloat16":
        model = model.to(torch.bfloat16)
    return model.train()


@pytest.mark.parametrize("name", ["dropout", "LoRA", "checkpoints", "bfloat16"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_trains_is_left_as_it_was(name, grad):
    model = trained(name)
    model.get_input_embeddings().eval()  # a frozen part
    ids, visible, answer = padded()
    for number, part in enumerate(model.parameters()):
        part.grad = torch.full_like(part, 0.5) if number % 2 else None
    gradients = [None if part.grad is None else part.grad.clone() for part in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = len(model.get_input_embeddings()._forward_hooks)
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        found = answer_saliency(model, ids, visible, answer)
        assert torch.equal(found, answer_saliency(model, ids, visible, answer))
        assert torch.is_grad_enabled() == grad
    assert not found.requires_grad
    assert found[0].any()
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    for part, before in zip(model.parameters(), gradients, strict=True):
        assert part.grad is None if before is None else torch.equal(part.grad, before)
    quiet = trained(name).eval()
    torch.testing.assert_close(found, answer_saliency(quiet, ids, visible, answer))


def test_a_model_that_fails_is_left_as_it_was(monkeypatch):
    model = tiny_llama().train()
    ids, visible, answer = padded()
    monkeypatch.setattr(model.lm_head, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_saliency(model, ids, visible, answer)
    assert all(module.training for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks


def test_texts_without_an_answer_are_not_run(monkeypatch):
    model = tiny_llama()
    ids, visible, answer = padded()
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    assert not answer_saliency(model, ids, visible, answer & False, batch_size=2).any()
    assert runs == []
    answer_saliency(model, ids, visible, answer, batch_size=2)
    assert runs == [1]  # of two batches, the second holds no answer


def test_an_offloaded_model_is_refused_and_a_whole_one_helps():
    ids, visible, answer = padded()
    model = accelerate.cpu_offload(tiny_llama(), torch.device("cpu"))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'grad_x_input'.*choose another scorer"
    ):
        answer_saliency(model, ids, visible, answer)
    assert answer_saliency(tiny_llama(), ids, visible, answer).any()
