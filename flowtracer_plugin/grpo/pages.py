"""The pages of a training with flow credit: the completions of one prompt, side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from flowtracer_plugin.grpo.checks import find_tokenizer
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.grpo.scoring import Scored
from flowtracer_plugin.grpo.settings import credit_settings
from flowtracer_plugin.grpo.trackers import send_page
from flowtracer_plugin.report.pages.group_page import (
    CompletionView,
    GroupCredit,
    write_group_page,
    write_index,
)
from flowtracer_plugin.text.spans import decode_tokens
from flowtracer_plugin.trace.troubles import Troubles

HUBS = 10

_NAME = re.compile(r"step_\d{6,}\.html")
"""The names of the pages; other files in their folder are left alone."""


class GroupPages:
    """Pages of the main process's first prompt, at most one every `page_steps` steps.

    They are written to the folder `flow` of the trainer's output directory. The oldest pages are
    deleted when all together exceed `page_limit_mb`. A page that cannot be made or written is
    logged, and the training goes on.
    """

    def __init__(self, trainer: Any, options: CreditOptions, troubles: Troubles) -> None:
        self._trainer, self._options, self._troubles = trainer, options, troubles
        self._step: int | None = None
        self._last: int | None = None
        self._views: dict[int, CompletionView] = {}
        self._prompt = self._question = ""
        self._rewards: list[dict[str, float | None]] = []

    @property
    def folder(self) -> Path:
        """The folder of the pages."""
        return Path(self._trainer.args.output_dir) / "flow"

    def begin(self, rollouts: Mapping[str, Any]) -> None:
        """Decide whether new rollouts get a page."""
        trainer, every = self._trainer, self._options.page_steps
        step = trainer.state.global_step
        late = self._last is None or step - self._last >= every
        due = every > 0 and late and trainer.accelerator.is_main_process
        self._step, self._views = None, {}
        if not due:
            return
        self._last = step
        with self._caught(step):
            self._rewards = _rewards(trainer)
            ids = rollouts["prompt_ids"][0][rollouts["prompt_mask"][0].bool()].tolist()
            tokenizer = find_tokenizer(trainer.processing_class)
            self._prompt = decode_tokens(tokenizer, ids).text
            given = list(trainer._logs["prompt"])[-trainer.args.generation_batch_size]
            said = str(tokenizer.decode(ids, skip_special_tokens=True))
            self._question = _question(given) or said
            self._step = step

    def add(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        plain: Tensor,
        competing: Bool[Tensor, "batch completion"],
    ) -> None:
        """Collect the rows of the page's group, and write the page when all are there."""
        step, self._step = self._step, None  # a page that fails is not begun again
        if step is None:
            return
        trainer = self._trainer
        with self._caught(step):
            wanted = min(trainer.num_generations, rows_each(trainer))
            for row, place in enumerate(rollouts["flow_rows"].tolist()):
                if place < wanted:
                    self._views[place] = self._view(row, place, rollouts, heard, plain, competing)
            if len(self._views) == wanted:
                self._write(step, [self._views[place] for place in range(wanted)])
            else:
                self._step = step

    def _caught(self, step: int) -> AbstractContextManager[None]:
        return self._troubles.caught(f"the page of step {step} could not be written", kind="page")

    def _view(
        self,
        row: int,
        place: int,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        plain: Tensor,
        competing: Bool[Tensor, "batch completion"],
    ) -> CompletionView:
        shown = rollouts["completion_mask"][row].bool()
        kept = shown.cpu().numpy()
        ids = rollouts["completion_ids"][row][shown].tolist()
        throughput, answer, note = np.zeros(len(ids)), np.zeros(len(ids), bool), ""
        error = heard if isinstance(heard, Exception) else heard.errors.get(row)
        if error is not None or isinstance(heard, Exception):
            note = f"plain credit: {type(error).__name__}: {error}"
        else:
            start = heard.rollouts.prompt_length
            answer = heard.rollouts.answer[row, start:].cpu().numpy()[kept]
            if heard.rollouts.throughput is not None:
                throughput = heard.rollouts.throughput[row, start:].cpu().numpy()[kept]
            note = "" if answer.any() else "no answer found: plain credit"
        return CompletionView(
            tokens=decode_tokens(find_tokenizer(self._trainer.processing_class), ids).pieces,
            weights=rollouts["flow_weights"][row].cpu().numpy()[kept],
            throughput=throughput,
            advantage=float(plain[row].float().mean()),
            rewards=self._rewards[place],
            answer=answer,
            competing=competing[row].cpu().numpy()[kept],
            hubs=[int(token) for token in np.argsort(-throughput)[:HUBS] if throughput[token] > 0],
            note=note,
        )

    def _write(self, step: int, views: list[CompletionView]) -> None:
        name = self._trainer.args.run_name or Path(self._trainer.args.output_dir).name
        page = self.folder / f"step_{step:06d}.html"
        write_group_page(
            page,
            self._prompt,
            views,
            title=str(name),
            step=step,
            question=self._question,
            credit=_credit(self._options, step),
        )
        self._drop_oldest(page)
        write_index(self.folder)
        with self._troubles.caught(f"the page of step {step} could not be sent", kind="tracker"):
            send_page(self._trainer, page, step)

    def _drop_oldest(self, newest: Path) -> None:
        named = (page for page in self.folder.iterdir() if _NAME.fullmatch(page.name))
        pages = {page for page in named if page.is_file()} - {newest}
        size = newest.stat().st_size
        for page in sorted(pages, key=lambda page: page.stat().st_mtime, reverse=True):
            size += page.stat().st_size
            if size > self._options.page_limit_mb * 1e6:
                page.unlink()


def _credit(options: CreditOptions, step: int) -> GroupCredit:
    name = str(credit_settings(options)["scorer"])
    return GroupCredit(
        scorer=name if options.side == "top" else f"{name}, lowest first",
        gamma=options.gamma_at(step),
        share=options.top_fraction,
    )


def rows_each(trainer: Any) -> int:
    """The number of rollouts of each process in one generation."""
    return trainer.args.generation_batch_size // trainer.accelerator.num_processes


def _rewards(trainer: Any) -> list[dict[str, float | None]]:
    """The rewards of every rollout by reward function, which TRL logs in the main process."""
    count = trainer.args.generation_batch_size
    logged = {name: list(values)[-count:] for name, values in trainer._logs["rewards"].items()}
    return [{name: _known(values[row]) for name, values in logged.items()} for row in range(count)]


def _question(prompt: Any) -> str:
    """What the user says in a chat; nothing for a prompt that is text."""
    if isinstance(prompt, str):
        return ""
    said = [message["content"] or "" for message in prompt if message["role"] == "user"]
    turns = [[{"text": turn}] if isinstance(turn, str) else turn for turn in said]
    return "\n\n".join(part["text"] for turn in turns for part in turn if part.get("text"))


def _known(reward: float) -> float | None:
    return None if reward is None or np.isnan(reward) else float(reward)
