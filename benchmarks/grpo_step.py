"""What does flow credit add to a step of GRPO?

Two TRL trainers that differ only in credit take turns step by step in one process. They have the
same seeds and prompts, and completions of a forced length, so that both do equal work. A step is
all of generation, reward, forward, backward, optimizer and logging. Everything else is TRL's
default, on one thread, in float32.

`read` says which forward pass attention is read in. `training` and `scoring` are passes that TRL
makes anyway; for `scoring`, rollouts are trained on twice (`num_iterations=2`), and both steps are
timed. `extra` is an additional pass; `extra alone` is this pass without the step around it, with
reading, answers, flow and choice (`with`), or the same layers without reading (`without`).
`whole` is `training` without gradient checkpointing, which TRL uses by default.

`scorer` says what credit is given by. `flow` reads the middle third of the layers. `flow:decided`
reads all, weighed by their values. `flow:derivation` also takes gradients from the graph of the
training pass: a backward pass to the attention outputs, without gradients of weights, and with
checkpoints also the layers' forward pass.

Whole steps vary by more than credit takes, even on an idle machine. So there are two measures:

* `seconds`: the median of whole steps with and without credit. It is exact to ten per cent only,
  which is more than the targets.
* `credit`: the seconds of credit itself, by a clock in the trainer with credit, as a share of a
  median step without. It is exact, but misses effects of credit on the rest of the step, such as on
  caches. The clock runs while credit's own code runs, not while credit waits for TRL's code;
  `logged` is the same share by the trainer's own metric `flow/seconds`.

    FLOWTRACER_MODELS=folder python -m benchmarks grpo_step
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from greenlet import getcurrent, greenlet
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

import flowtracer_plugin as ft
from benchmarks.harness import Row, Target, Ways
from benchmarks.models import SMOLLM2, load, pretrained
from examples.reasoner.problems import make_problems
from examples.reasoner.train import MAX_NEW_TOKENS, MODEL_DIR
from flowtracer_plugin.grpo import FlowCreditMixin, FlowGRPOConfig
from flowtracer_plugin.reading.interface_backend import InterfaceBackend

OURS = "with"
REASONER = "reasoner"
READ = ("training", "scoring", "extra", "extra alone")
LARGE = {"model": SMOLLM2, "tokens": 128}
WEIGHED = (("flow:decided", "training", 0.03), ("flow:derivation", "training", 0.15))
WEIGHED += (("flow:derivation", "whole", 0.15),)
CASES = [
    *(
        {"model": REASONER, "tokens": MAX_NEW_TOKENS, "read": read, "scorer": "flow"}
        for read in READ
    ),
    *({**LARGE, "read": read, "scorer": "flow"} for read in READ if read != "extra"),
    *({**LARGE, "read": read, "scorer": scorer} for scorer, read, _ in WEIGHED),
]
TARGETS = [
    Target(
        other="without",
        measure="credit",
        ratio=share,
        where={"model": model, "read": read, "scorer": "flow"},
    )
    for model, share in ((REASONER, 0.05), (SMOLLM2, 0.02))
    for read in ("training", "scoring")
]
TARGETS += [Target(other="without", measure="seconds", ratio=1.15, where={"read": "extra alone"})]
TARGETS += [
    Target(other="without", measure="credit", ratio=share, where={"read": read, "scorer": scorer})
    for scorer, read, share in WEIGHED
]


def remarks(rows: Sequence[Row]) -> list[str]:
    """The exact measure, for each case."""
    said = {"credit": "by the clock", "logged": "as logged"}
    return [
        f"{', '.join(str(value) for value in row['case'].values())}: credit takes "
        + ", ".join(
            f"{row['ratios'][measure]['without']:.2%} of a step {how}"
            for measure, how in said.items()
            if measure in row["ratios"]
        )
        for row in rows
        if "credit" in row["ratios"]
    ]


GROUP = 8
ROLLOUTS = {REASONER: 64, SMOLLM2: 8}
"""Completions in a step; the reasoner has as many as in the demo."""


def ways(
    *, model: str, tokens: int, read: str, scorer: str = "flow", rollouts: int | None = None
) -> Ways:
    torch.set_num_threads(1)
    size = rollouts or ROLLOUTS[model]
    if read == "extra alone":
        return _extra_pass(*load(_folder(model)), tokens, size)
    common = {"tokens": tokens, "size": size, "iterations": 2 if read == "scoring" else 1}
    common["checkpointing"] = read != "whole"
    credit = {"flow_pass": "training" if read == "whole" else read, "flow_scorer": scorer}
    return {
        "with": Stepper(partial(_trainer, model, ClockedTrainer, FlowGRPOConfig, common, credit)),
        "without": Stepper(partial(_trainer, model, GRPOTrainer, GRPOConfig, common, {})),
    }


def aside(ways: Ways, samples: Mapping[str, list[float]]) -> tuple[dict[str, Any], list[str]]:
    """Credit as a share of a step, by the clock and as logged; a note on answers found."""
    stepper = ways["with"]
    if not isinstance(stepper, Stepper):
        return {}, []
    trainer = stepper.trainer
    logs = [log for log in trainer.state.log_history if "flow/seconds" in log]
    # The first step warms up: it also checks the model, and the trainer's loss.
    logged = sum(log["flow/seconds"] for log in logs[1:]) / (len(logs) - 1)
    whole = statistics.median(samples["without"])
    found = statistics.mean(log["flow/answer_found"] for log in logs)
    shares = {"credit": statistics.median(stepper.credit[1:]) / whole, "logged": logged / whole}
    return (
        {measure: {"without": round(share, 5)} for measure, share in shares.items()},
        [f"an answer was found in {found:.0%} of the completions; the others cost less"],
    )


class Stepper:
    """A trainer that takes one step at each call, or as many as its rollouts are used for.

    Between calls the trainer waits at the beginning of its next step, so that logging is part of
    the step before. Every step has its own seed, so that trainers sample from the same random
    numbers, however they take turns.

    Attributes:
        credit: Seconds that credit took in each call; empty without credit.
    """

    def __init__(self, build: Callable[[], GRPOTrainer]) -> None:
        self._build, self._calls = build, 0
        self.credit: list[float] = []

    def __call__(self) -> None:
        if not self._calls:
            self.trainer = self._build()
            self.trainer.add_callback(_Wait())
            self._training = greenlet(self.trainer.train)
            self._training.switch()
        clock = getattr(self.trainer, "clock", None)
        before = clock.seconds if clock else 0.0
        for _ in range(self.trainer.num_iterations):
            set_seed(self.trainer.state.global_step)
            self._training.switch()
        self._calls += 1
        if clock:
            self.credit.append(clock.seconds - before)

    def close(self) -> None:
        """End the training at the point where it waits."""
        self._training.throw()


class _Wait(TrainerCallback):
    """Returns control to the caller before every step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        caller = getcurrent().parent
        assert caller is not None
        caller.switch()


class Clock:
    """Counts seconds while it is on."""

    def __init__(self) -> None:
        self.seconds, self._is_on, self._since = 0.0, False, 0.0

    @contextmanager
    def set(self, is_on: bool) -> Iterator[None]:
        """Turn it on or off in this context; afterwards it is as before."""
        before = self._is_on
        self._turn(is_on)
        try:
            yield
        finally:
            self._turn(before)

    def _turn(self, is_on: bool) -> None:
        now = perf_counter()
        if self._is_on:
            self.seconds += now - self._since
        self._is_on, self._since = is_on, now


class _Theirs(GRPOTrainer):
    """GRPOTrainer whose clock is off during TRL's part of a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, *args: Any) -> Any:
        with self.clock.set(False):
            return super()._generate_and_score_completions(*args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.set(False):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, *args: Any) -> Any:
        with self.clock.set(False):
            return super()._compute_loss(*args)


class ClockedTrainer(FlowCreditMixin, _Theirs):
    """`FlowGRPOTrainer` with a clock that runs while credit's own code runs."""

    def _generate_and_score_completions(self, *args: Any) -> Any:
        with self.clock.set(True):
            return super()._generate_and_score_completions(*args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        # Attention is read inside TRL's part, so its receiver turns the clock on again.
        with patch.object(InterfaceBackend, "listen", self._listen), self.clock.set(True):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, *args: Any) -> Any:
        with self.clock.set(True):
            return super()._compute_loss(*args)

    @property
    def _listen(self) -> Callable[..., Any]:
        listen, clock = InterfaceBackend.listen, self.clock

        def clocked(backend: Any, call: Any, sites: Any, receive: Any, **more: Any) -> Any:
            return listen(backend, call, sites, clock.set(True)(receive), **more)

        return clocked


def _trainer(
    name: str,
    kind: type[GRPOTrainer],
    config: type[GRPOConfig],
    common: Mapping[str, int],
    credit: Mapping[str, Any],
) -> GRPOTrainer:
    model, tokenizer = load(_folder(name))
    tokens, size = common["tokens"], common["size"]
    trainer = kind(
        model,
        reward,
        args=config(
            str(Path(gettempdir()) / "flowtracer-benchmarks"),  # nothing is written to it
            max_steps=10_000,
            per_device_train_batch_size=size,
            num_generations=GROUP,
            num_iterations=common["iterations"],
            gradient_checkpointing=bool(common["checkpointing"]),
            max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens},
            learning_rate=1e-6,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **credit,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": _prompts(256)}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An arbitrary reward that differs within a group, so that there is something to train."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def _folder(name: str) -> Path:
    return MODEL_DIR if name == REASONER else pretrained(name)


def _prompts(count: int) -> list[str]:
    return [problem.prompt for problem in make_problems(count, seed=2)]


def _extra_pass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, size: int
) -> Ways:
    """A pass over sampled rollouts to the last layer that is read, with and without reading."""
    set_seed(0)
    texts = [text for text in _prompts(size // GROUP) for _ in range(GROUP)]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    ids = model.generate(**prompts, do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens)
    prompt_ids, mask = prompts["input_ids"], prompts["attention_mask"]
    completion_ids = ids[:, prompt_ids.shape[1] :]
    visible = torch.cat([mask, torch.ones_like(completion_ids)], dim=1)
    tracer = ft.wrap(model.eval(), tokenizer, backend="interface", preset="paper")
    whole = partial(tracer.trace_ids, prompt_ids, completion_ids, mask, visible[:, -tokens:])
    target = whole().target
    question = visible.bool() & (torch.arange(visible.shape[1]) < prompt_ids.shape[1])
    sites = [site for site in tracer.reader.sites if site.layer in tracer.layers]
    inputs = {"input_ids": ids, "attention_mask": visible, "use_cache": False}

    def read() -> None:
        rows = target.any(-1)
        attention = tracer.attention(ids, visible)[rows]
        ft.solve_flow(attention, question[rows], target[rows], unreached="zero")

    @torch.no_grad()
    def forward() -> None:
        tracer.reader.backend.run(inputs, sites, lambda *_: None, whole=False)

    return {"with": read, "without": forward, "with_answers": whole}
