"""Progress bars for work that others do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm.auto import tqdm


class GenerationProgress:
    """A transformers streamer: it is called once for the prompt, then once for each token."""

    def __init__(self, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(total=total, desc="generating", unit="token")
        self._started = False

    def put(self, value: Tensor) -> None:
        """Count a token; the first call is the prompt."""
        self._bar.update(int(self._started))
        self._started = True

    def end(self) -> None:
        """Close the bar."""
        self._bar.close()
