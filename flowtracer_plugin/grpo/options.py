"""The options of a trainer's flow credit, checked before anything is loaded."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowtracer_plugin.credit.own_scorers import Measure, ScorerError
from flowtracer_plugin.credit.scorers import Scorer, find_scorer, lowest
from flowtracer_plugin.model.layers import select_layers
from flowtracer_plugin.text.answers import AnswerFinder, find_answer
from flowtracer_plugin.text.matched_spans import SpanFinder

CHOICES = {
    "target": (None, "answer", "decision"),
    "sign": ("both", "positive", "negative"),
    "side": ("top", "bottom"),
    "normalize": ("none", "mean_one"),
    "no_answer": ("uniform", "raise", "last"),
    "pass_": ("auto", "training", "scoring", "extra"),
    "on_error": ("raise", "uniform"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditOptions:
    """Options of flow credit; `FlowGRPOConfig` explains each of them as `flow_<name>`.

    Raises:
        ValueError: A value is out of range or not among the choices.
        ScorerError: An own scorer cannot be found.
    """

    top_fraction: float = 0.4
    gamma: float = 1.5
    layers: str | Sequence[int] = "auto"
    answer: AnswerFinder = "auto"
    target: str | None = None
    sign: str = "both"
    normalize: str = "none"
    no_answer: str = "uniform"
    scorer: str | Measure | Scorer = "flow"
    side: str = "top"
    oracle: SpanFinder | None = None
    pass_: str = "auto"
    start_step: int = 0
    warmup_steps: int = 0
    on_error: str = "raise"
    page_steps: int = 100
    page_limit_mb: float = 50.0

    def __post_init__(self) -> None:
        """Refuse values that an option cannot have; `wrap` checks the numbers of layers."""
        if not 0 <= self.top_fraction <= 1:
            raise ValueError(
                f"flow credit: top_fraction must be between 0 and 1, got {self.top_fraction!r}"
            )
        for name in ("gamma", "start_step", "warmup_steps", "page_steps", "page_limit_mb"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"flow credit: {name} must be at least 0, got {value!r}")
            if name.endswith(("step", "steps")) and type(value) is not int:
                raise ValueError(f"flow credit: {name} must be a whole number, got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice is not None)
                raise ValueError(
                    f"flow credit: {name.rstrip('_')} must be one of {known}, "
                    f"got {getattr(self, name)!r}"
                )
        self._check_scorer()
        if isinstance(self.layers, str) and self.layers != "auto":
            select_layers(self.layers, range(9))
        if not callable(self.answer):
            find_answer("", self.answer)

    def _check_scorer(self) -> None:
        try:
            scorer = self.chosen_scorer
        except ScorerError as error:
            raise ScorerError(f"flow credit: {error}") from error
        except ValueError as error:
            raise ValueError(f"flow credit: {error}") from error
        told = self.oracle is not None
        if ("oracle" in scorer.needs) != told:
            raise ValueError(
                "flow credit: the scorer 'oracle' needs oracle, a pattern or a function that finds "
                "the tokens that matter in a completion, and no other scorer does; "
                f"got scorer {self.scorer!r} and oracle {self.oracle!r}"
            )
        if isinstance(self.oracle, str):
            try:
                re.compile(self.oracle)
            except re.error as error:
                raise ValueError(
                    f"flow credit: oracle {self.oracle!r} is no pattern: {error}"
                ) from error

    @property
    def chosen_scorer(self) -> Scorer:
        """The scorer by which tokens are chosen.

        Raises:
            ValueError: There is no such scorer, or its lowest scores cannot be chosen.
        """
        scorer = find_scorer(self.scorer)
        return scorer if self.side == "top" else lowest(scorer)

    @property
    def chosen_layers(self) -> str | Sequence[int]:
        """The layers that are read; by default those that the scorer was published with."""
        return self.chosen_scorer.layers if self.layers == "auto" else self.layers

    def gamma_at(self, step: int) -> float:
        """The factor at an optimizer step: 1 before `start_step`, then it rises to `gamma`."""
        if step < self.start_step:
            return 1.0
        warm = min(1.0, (step - self.start_step + 1) / max(1, self.warmup_steps))
        return 1.0 + (self.gamma - 1.0) * warm


def documented(doc: str | None, name: str, default: Any) -> Any:
    """A dataclass field whose help is the text of a parameter in a docstring of TRL's form.

    Inside a class body `__doc__` is the docstring of the class, so that no help is written twice.
    """
    text = inspect.cleandoc(doc or "").partition(f"    {name} (")[2].partition("):\n")[2]
    text = re.split(r"\n {4}\w+ \(", text)[0]
    text = re.sub(r"\[`~?([\w.]+)`\]", r"\1", text)  # a link of TRL's documentation
    words = " ".join(text.translate({ord(mark): None for mark in '`"'}).split())
    return field(default=default, metadata={"help": words})
