"""Which errors cost one row of the data, and which end the run."""

from __future__ import annotations

import torch
from jinja2 import TemplateError

from flowtracer_plugin.attention.adapter import NoAttentionError, UnsupportedArchitectureError

NUMBERS = ArithmeticError, MemoryError, torch.OutOfMemoryError
"""Errors of numbers and of memory."""

EVERY_ROW = NoAttentionError, UnsupportedArchitectureError
"""Errors that would come back in every row."""

ONE_ROW = ValueError, TypeError, LookupError, TemplateError, *NUMBERS
"""Errors that a row may cause; a chat template, for one, refuses some conversations."""


def in_words(error: Exception) -> str:
    """The error as a reason, with its type where the message alone may not say much."""
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
