"""Attention read from forward passes that the caller runs, such as a training step."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from flowtracer_plugin.attention import AdapterMismatchError
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.conformance.tiny_models import tiny_pair
from tests.families import tiny_model
from tests.reading.comparison import SOME_LAYERS, assert_close, prompt
from tests.reading.own_ways import model_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]
BOTH = pytest.mark.parametrize("backend", BACKENDS)


def rows(count: int = 4) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, padded left."""
    ids, _ = prompt()
    ids = ids[:1].repeat(count, 1).roll(1, 1)
    hidden = torch.arange(count)[:, None] * 3
    return ids, torch.arange(ids.shape[1]) >= hidden


def loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask.long(), labels=ids).loss


def in_parts(model: nn.Module, ids: Tensor, mask: Tensor, size: int) -> list[Tensor]:
    return [
        model(input_ids=ids[start : start + size], attention_mask=mask[start : start + size]).logits
        for start in range(0, len(ids), size)
    ]


@BOTH
@pytest.mark.parametrize("size", [1, 3, None])
def test_what_is_heard_is_what_is_read(backend, size):
    model, (ids, mask) = tiny_model("llama"), rows()
    reader = AttentionReader(model, backend=backend)
    wanted = reader.read_in_place(ids, mask, SOME_LAYERS).attention
    parts = []
    with torch.no_grad():
        reader.listen(
            lambda: in_parts(model, ids, mask.long(), size or len(ids)),
            mask,
            SOME_LAYERS,
            lambda part, reading: parts.append((part, reading)),
            batch_size=size,
        )
    assert [part.start for part, _ in parts] == list(range(0, 4, size or 4))
    assert_close(torch.cat([reading.attention for _, reading in parts]), wanted)


@BOTH
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_training_step_that_is_heard_is_the_same_to_the_bit(backend, reentrant):
    model, (ids, mask) = tiny_model("llama").train(), rows()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin, heard = deepcopy(model), []
    reader = AttentionReader(model, backend=backend)
    found = reader.listen(
        lambda: loss(model, ids, mask), mask, SOME_LAYERS, lambda _, reading: heard.append(reading)
    )
    wanted = loss(twin, ids, mask)
    assert torch.equal(found, wanted)
    found.backward()
    wanted.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    (reading,) = heard
    assert not reading.attention.requires_grad
    assert_close(reading.attention, reader.read_in_place(ids, mask, SOME_LAYERS).attention)
    assert all(module.training for module in model.modules())


@BOTH
def test_dropout_draws_what_it_would_draw(backend):
    model, (ids, mask) = tiny_model("gpt2").train(), rows()
    reader = AttentionReader(model, backend=backend)
    torch.manual_seed(3)
    wanted, drawn = loss(model, ids, mask), torch.rand(2)
    torch.manual_seed(3)
    found = reader.listen(lambda: loss(model, ids, mask), mask, SOME_LAYERS, lambda *_: None)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.rand(2), drawn)


@BOTH
def test_calls_are_kept_on_request(backend):
    model, (ids, mask) = tiny_model("llama"), rows()
    reader, heard = AttentionReader(model, backend=backend), []
    take = lambda _, reading: heard.append(reading)  # noqa: E731
    reader.listen(lambda: loss(model, ids, mask), mask, SOME_LAYERS, take, keep=True)
    reader.listen(lambda: loss(model, ids, mask), mask, SOME_LAYERS, take)
    assert [call.query.shape[:3] for call in heard[0].calls] == [(4, 4, ids.shape[1])] * len(
        SOME_LAYERS
    )
    assert heard[1].calls == ()


@BOTH
def test_modules_that_run_several_times_are_told_apart_in_every_pass(backend):
    model = model_of("hrm_text")
    ids, mask = rows()
    reader, heard = AttentionReader(model, backend=backend), []
    wanted = reader.read_in_place(ids, mask, [5, 6]).attention
    with torch.no_grad():
        reader.listen(
            lambda: in_parts(model, ids, mask.long(), 2),
            mask,
            [5, 6],
            lambda _, reading: heard.append(reading.attention),
            batch_size=2,
        )
    assert_close(torch.cat(heard), wanted)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj"])
def test_models_that_attend_in_their_own_code_are_heard_through_nnsight(model_type):
    model, _ = tiny_pair(model_type)
    ids, mask = rows()
    reader, heard = AttentionReader(model), []
    twin = deepcopy(model)
    found = reader.listen(
        lambda: loss(model, ids, mask), mask, [1, 2], lambda _, reading: heard.append(reading)
    )
    assert torch.equal(found, loss(twin, ids, mask))
    assert_close(heard[0].attention, reader.read_in_place(ids, mask, [1, 2]).attention)


@BOTH
def test_an_error_while_reading_waits_for_the_end_of_the_pass(backend):
    model, (ids, mask) = tiny_model("llama"), rows()
    reader, returned = AttentionReader(model, backend=backend), []

    def fails(*_):
        raise ArithmeticError("no flow")

    with pytest.raises(ArithmeticError, match="no flow"):
        reader.listen(lambda: returned.append(loss(model, ids, mask)), mask, SOME_LAYERS, fails)
    assert torch.equal(returned[0], loss(model, ids, mask))


@BOTH
def test_fewer_passes_than_announced_are_an_error(backend):
    model, (ids, mask) = tiny_model("llama"), rows()
    reader = AttentionReader(model, backend=backend)
    with pytest.raises(AdapterMismatchError, match="mend its sites"):
        reader.listen(
            lambda: loss(model, ids, mask), mask, SOME_LAYERS, lambda *_: None, batch_size=1
        )
