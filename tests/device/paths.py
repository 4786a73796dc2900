"""What the package does on a device, path by path: each runs on the host or on the simulated one.

A path gets `place`, which moves tensors and models to the device, and returns numbers to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.credit.read_rollouts import Late, ReadRollouts
from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES
from flowtracer_plugin.evaluation.knockout import knock_out, set_drops, token_drops
from flowtracer_plugin.evaluation.protocols import PROTOCOLS, EvaluationSettings, measure_example
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.grpo import CreditOptions
from flowtracer_plugin.grpo.other_trainers import rollout_credit
from flowtracer_plugin.options import flow_options
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.rewards.flow_reward import FlowReward
from flowtracer_plugin.trace.rollouts import rollout_masks
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

Place = Callable[[Any], Any]
Path = Callable[[Place], Any]

SAID = [RESPONSE, " He ate 1, so 2.", " no number"]
"""Completions of different lengths, one without an answer."""

COUNTED = " He had 3.\nHe ate 1.\n3 - 1 = 2.\nThe answer is 5."
"""A response of enough tokens and lines for each protocol of an evaluation."""


@cache
def reader(place: Place, backend: str = "interface") -> AttentionReader:
    """Reads a small model that `place` has moved; all paths share it, for its checks take long."""
    return AttentionReader(place(tiny_llama(num_hidden_layers=2)), backend=backend)


def tracer(
    place: Place,
    preset: str = "paper",
    *,
    mode: str = "auto",
    answer: Any = "auto",
    backend: str = "interface",
    **options: Any,
) -> ft.FlowTracer:
    """A tracer of that model, as `wrap` makes it."""
    made = flow_options(preset, **options)
    return ft.FlowTracer(reader(place, backend), tiny_tokenizer(), made, answer, mode, options)


@cache
def rollouts() -> tuple[torch.Tensor, ...]:
    """Ids and masks of prompts, padded on the left, and completions, padded on the right."""
    tokenizer = tiny_tokenizer()
    prompts = [PROMPT, "How many? " + PROMPT, PROMPT]
    asked = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    said = tokenizer(SAID, padding=True, add_special_tokens=False, return_tensors="pt")
    return (
        asked["input_ids"],
        said["input_ids"],
        asked["attention_mask"],
        said["attention_mask"],
    )


def values(found: Any) -> Any:
    """The numbers of a trace or a batch, by name."""
    if isinstance(found, ft.FlowBatch):
        return [found.throughput, found.reach, found.target, found.reasoning_share]
    strong = [found.backbone.sources.flow, found.backbone.targets.flow, found.backbone.steps]
    paths = [(path.tokens, path.probability) for path in found.paths(3)]
    edges = [] if found.attention is None else [found.attention]
    return [found.throughput, found.reach, found.backbone.hubs, *strong, paths, *edges]


def graph(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, question and answer; over several blocks of rows."""
    attention = torch.rand(2, 300, 300, generator=torch.Generator().manual_seed(0)).tril() / 150
    question, answer = torch.arange(300) < 30, torch.arange(300) > 290
    if kind == "batched":
        return attention, question.expand(2, -1), answer.expand(2, -1)
    return attention[0], question, answer


def solved(kind: str, place: Place, **options: Any) -> Any:
    """`solve_flow` on dense, batched or sparse tensors, with the flow on the edges."""
    attention, question, answer = (place(one) for one in graph(kind))
    if kind == "sparse":
        attention = ft.FlowGraph.from_attention(attention, question, answer).to_sparse().matrix
    flow = ft.solve_flow(attention, question, answer, **options)
    prompt = place(torch.arange(300) < 60)
    inflow = flow.inflow(prompt.expand_as(question))
    return [flow.reach, flow.throughput, inflow, flow.sink_flow(), flow.question_reached]


def traced(preset: str, place: Place, **options: Any) -> Any:
    return values(tracer(place, preset, **options).trace(PROMPT, RESPONSE))


def batch(preset: str, place: Place, **options: Any) -> Any:
    made = tracer(place, preset, **options)
    return values(made.trace_ids(*(place(one) for one in rollouts()), batch_size=2))


def several(place: Place) -> Any:
    """Texts of different lengths, read at once."""
    made = tracer(place)
    encoded = [made.tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAID[:2]]
    texts = [made.find(made.tokenizer(PROMPT)["input_ids"], ids) for ids in encoded]
    return [values(trace) for trace in made.trace_found(texts)]


def credited(name: str, place: Place) -> Any:
    """The weights of the tokens of rollouts, as a trainer gets them."""
    options = CreditOptions(scorer=name)
    return rollout_credit(tracer(place), *(place(one) for one in rollouts()), options=options)


def scored(place: Place) -> Any:
    """The boost of each token by every scorer, from one reading of the rollouts."""
    made, (asked, said, *masks) = tracer(place, layers="all"), rollouts()
    ids, visible = place(torch.cat([asked, said], 1)), place(torch.cat(masks, 1).bool())
    start, surprisals = asked.shape[1], place(torch.linspace(0, 1, said.numel()).view(said.shape))
    found = rollout_masks(made.tokenizer, ids, visible, start, made.options, made.answer)
    late = partial(Late, surprisals, surprisals)
    read = ReadRollouts(made, ids, visible, start, found, late=late, oracle=r"\d")
    scorers = [replace(one, steps=min(one.steps, 1)) for one in SCORERS.values()]
    return [scorer.boost(read.rollouts(scorer), 0.4) for scorer in scorers]


def cut(rows: str, place: Place) -> Any:
    """The effects of knock-outs."""
    ids = torch.tensor(tiny_tokenizer()(PROMPT + RESPONSE)["input_ids"])
    answer = torch.arange(len(ids)) == len(ids) - 2
    sets = torch.eye(len(ids), dtype=torch.bool)[5:9]
    found = knock_out(reader(place).model, place(ids), place(answer), place(sets), rows=rows)
    return [found.log_prob, found.drop, found.divergence]


def dropped(place: Place) -> Any:
    """The drops of tokens and of sets of tokens, each by a call of its own."""
    made = tracer(place)
    trace = made.trace(PROMPT, RESPONSE)
    alone = token_drops(made.model, trace, [3, 9, 12])
    return [*alone.values()], set_drops(made.model, trace, [[3], [4, 9], [12, 13]])


def by_head(preset: str, place: Place) -> Any:
    """What each head pays into a token of the response."""
    made = tracer(place, preset)
    trace = made.trace(PROMPT, RESPONSE)
    found = made.heads(trace, trace.spans.prompt_length + 4)
    return [found.edges, found.flow]


def evaluated(place: Place) -> Any:
    """What every protocol of an evaluation finds in a text; none may be skipped."""
    made, names = tracer(place), ("flow", "flow:derivation", "grad_x_input", "surprisal")
    settings = EvaluationSettings(
        options=KnockOutOptions(percents=(20,), gaps=(0,), draws=1),
        scores={name: TOKEN_SCORES[name] for name in names},
        protocols=tuple(PROTOCOLS),
        max_new_tokens=4,
        batch_size=None,
    )
    example = settings.example(made, made.trace(PROMPT, COUNTED), right="5")
    found = measure_example(example, settings)
    assert not [name for name, one in found.items() if "skipped" in one]
    return found


def weighed(place: Place) -> Any:
    throughput = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(40).expand(3, -1) < 30
    return ft.token_credit(place(throughput), place(mask), normalize="mean_one")


def rewarded(place: Place) -> Any:
    reward = FlowReward(tracer(place), batch_size=2)
    return reward([PROMPT] * 3, SAID)


def generated(place: Place) -> Any:
    made = tracer(place, answer=lambda text: (0, len(text)))
    return made.generate(PROMPT, max_new_tokens=6).throughput


def attention(place: Place) -> Any:
    ids, _, mask, _ = rollouts()
    return tracer(place).attention(place(ids), place(mask))


PRESETS = ("paper", "sharp", "decided", "derivation", "causal")
PATHS: Mapping[str, Path] = {
    **{f"solve {kind}": partial(solved, kind) for kind in ("dense", "batched", "sparse")},
    "solve sparse as dense": partial(solved, "sparse", backend="dense"),
    "solve dense as sparse": partial(solved, "dense", backend="sparse"),
    "solve origins": partial(solved, "batched", question_weights="origins"),
    "solve absorbing": partial(solved, "dense", boundary="absorbing", question_weights="reach"),
    "token credit": weighed,
    **{f"trace {preset}": partial(traced, preset) for preset in PRESETS},
    "trace with nnsight": partial(traced, "paper", backend="nnsight"),
    "trace without the first token": partial(traced, "paper", first_token="drop"),
    "traces at once": several,
    **{
        f"streamed {preset}": partial(traced, preset, mode="streamed")
        for preset in ("paper", "sharp", "decided", "derivation")
    },
    **{f"rollouts {preset}": partial(batch, preset) for preset in PRESETS},
    "rollouts streamed": partial(batch, "paper", mode="streamed"),
    "attention": attention,
    "every scorer": scored,
    **{f"credit by {name}": partial(credited, name) for name in ("flow", "flow:sharp*entropy")},
    "knock-out of future rows": partial(cut, "future"),
    "knock-out of the answer's rows": partial(cut, "answer"),
    "drops of tokens and sets": dropped,
    **{f"heads {preset}": partial(by_head, preset) for preset in ("paper", "sharp", "derivation")},
    "evaluation": evaluated,
    "reward": rewarded,
    "generation": generated,
}


def same(found: Any, wanted: Any, close: float = 1e-4) -> None:
    """Compare two results of a path, number by number."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other, close)
    elif isinstance(wanted, torch.Tensor | np.ndarray):
        numbers = torch.as_tensor(found), torch.as_tensor(wanted)
        torch.testing.assert_close(*numbers, rtol=close, atol=close / 10)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=close, abs=close / 10)
    else:
        assert found == wanted
