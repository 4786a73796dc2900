"""What credit a run gave, in words: for its log, its arguments, its trackers and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from flowtracer_plugin.grpo.options import CreditOptions

_TOLD = ("scorer", "gamma", "top_fraction")
"""The options that are always said; the others only if they are not the default."""

_BEFORE = "### Framework versions"
"""The heading of TRL's model card that follows the part about the training."""


def credit_settings(options: CreditOptions) -> dict[str, Any]:
    """The options of the credit as plain values, with two more entries before them.

    `method` is the score in symbols or words, `paper` where it was published; for an own scorer
    `source` is the path of its function. Functions and sequences are given as text.
    """
    scorer = options.chosen_scorer
    others = [one.name for one in fields(options) if one.name not in _TOLD]
    given = {name.rstrip("_"): _plain(getattr(options, name)) for name in (*_TOLD, *others)}
    where = "source" if scorer.code else "paper"
    return {"method": scorer.formula, where: scorer.source, **given}


def settings_line(settings: Mapping[str, Any]) -> str:
    """The method and the chosen options in one line."""
    usual = credit_settings(CreditOptions())
    _, _, *names = usual
    told = [name for name in names if name in _TOLD or settings[name] != usual[name]]
    chosen = ", ".join(f"{name}={settings[name]}" for name in told)
    source = settings["source"] if "source" in settings else settings["paper"]
    return f"{chosen}; {settings['method']} ({source})"


def with_credit(card: str, settings: Mapping[str, Any]) -> str:
    """A model card with a section about the credit, before the versions if it names them."""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in settings.items())
    section = (
        "### Credit for tokens\n\n"
        "The advantage of each token was multiplied by a weight of FlowTracer's plugin for TRL.\n\n"
        f"| option | value |\n|---|---|\n{rows}\n\n"
    )
    before, heading, after = card.partition(_BEFORE)
    return f"{before}{section}{heading}{after}" if heading else f"{card.rstrip()}\n\n{section}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Sequence):
        return ", ".join(map(str, value))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '?')}:{name}"


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
