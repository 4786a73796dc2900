"""The experiment trackers of a training: the pages and the options of its credit go to them too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

TRACKERS = ("wandb", "trackio")
"""The values of `report_to` whose trackers show HTML; both packages have the same functions."""


def trackers(trainer: Any) -> list[Any]:
    """The modules of the trackers in `report_to` that have a run, in the main process only."""
    if not trainer.accelerator.is_main_process:
        return []
    named = [name for name in TRACKERS if name in (trainer.args.report_to or ())]
    modules = [import_module(name) for name in named]
    return [one for one in modules if one.__name__ != "wandb" or one.run is not None]


class WhenTrackersBegin(TrainerCallback):
    """Calls a function when the runs of the trackers have begun and nothing is logged yet.

    trackio keeps the configuration as it is at the first log, which comes before the first
    rollouts.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call the function; the trackers' own callbacks were added before this one."""
        self._call()


def send_page(trainer: Any, page: Path, step: int) -> None:
    """Log a page of this optimizer step to each tracker as `flow/page`."""
    for tracker in trackers(trainer):
        # As it is: the page allows its own styles only.
        shown = tracker.Html(str(page), inject=False)
        tracker.log({"flow/page": shown, "train/global_step": step})


def send_settings(trainer: Any, settings: Mapping[str, Any]) -> None:
    """Write the options of the credit to the configuration of each tracker, as `flow_credit`."""
    for tracker in trackers(trainer):
        tracker.config.update({"flow_credit": dict(settings)}, allow_val_change=True)
