"""How often does the host wait for the device?

A GPU works through what the host has asked of it while the host asks for more. Wherever the host
has to know a number, it waits until all of that is done, and the GPU then waits for the host. A
device that does not exist counts these places: it holds the values of a CPU under the rules of
CUDA, and logs each operation for which PyTorch waits (`tests/device/simulated.py`). The model is a
random Llama of two layers.

`waits` are those of this package in the second run, and `most` is their budget, which a test holds.
`first` is the first run, which also checks the model if nothing before it has. `others` are waits
of other libraries in the second run, such as masks that transformers looks at, and TRL's metrics.

We want at most 3 waits in a step of GRPO and at most 5 in a dense trace. Two steps wait more:
`flow:sharp` 5 times, because the host picks the heads, for which it must know the rows of the
answer and what each head pays, and the scoring pass 4 times, because the host must know whether
the pass that it hears is over the rollouts of the step.

Before they were counted, a step of GRPO waited 23 times (`flow:sharp` 32, `attention` 17), a trace
13 times (`derivation` 29), `trace_ids` 21 times, and a streamed trace 49 times at 64 tokens and 63
at 600.

    python -m benchmarks host_waits
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import Report, write
from tests.device.waits import WORK, count

OURS = "waits"
CASES = [{"work": name} for name in WORK]
TARGETS: list[Any] = []
COLUMNS = ("waits", "most", "first", "others")


def run(_module: Any, *, rounds: int) -> Path:
    """Count, and write the result; `rounds` do not matter, since counts do not vary."""
    rows = []
    for name, (_, most) in tqdm(WORK.items(), desc="host_waits", unit="case"):
        found = count(name)
        numbers = [found.ours, most, found.first, found.others]
        places = sorted(f"{wait.place}: {wait.why}" for wait in found.places)
        counts = dict(zip(COLUMNS, numbers, strict=True))
        rows.append({"case": {"work": name}, "counts": counts, "places": places})
    return write(sys.modules[__name__], rows)


def table(report: Report) -> str:
    """A row for each piece of work."""
    head = ["", *COLUMNS]
    lines = [head, ["---", *["--:"] * len(COLUMNS)]]
    for row in report["rows"]:
        lines.append([row["case"]["work"], *(str(row["counts"][name]) for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
