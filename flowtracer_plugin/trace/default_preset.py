"""The preset of a tracer for which nobody has chosen one."""

from __future__ import annotations

import logging
import warnings

from flowtracer_plugin.options import BEST, EVERYWHERE
from flowtracer_plugin.reading.reader import AttentionReader

logger = logging.getLogger(__name__)


def lacks_influence(reader: AttentionReader) -> bool:
    """Whether the model cannot be traced by the preset `BEST`; a warning says why."""
    reason = reader.why_no_influence()
    logger.debug("preset %r: %s", BEST, reason or "possible")
    if reason is not None:
        warnings.warn(
            f"this model is traced by preset={EVERYWHERE!r}, since it cannot be by {BEST!r}: "
            f"{reason}. Choose a preset to be without this warning",
            stacklevel=3,
        )
    return reason is not None
