"""`python -m benchmarks [NAME …]`: measure, and write `benchmarks/README.md`."""

from __future__ import annotations

import argparse
import os

from benchmarks.harness import run
from benchmarks.tables import module_of, write_tables

ALL = (
    "trace_against_forward",
    "flow_stage",
    "sparse_against_dense",
    "rollout_batches",
    "data_sets",
    "presets",
    "growth",
    "long_sequences",
    "flashtrace",
    "grpo_step",
    "host_waits",
)


PRETRAINED = ("data_sets", "flashtrace", "grpo_step")
"""Benchmarks that need pretrained models, from the folder that FLOWTRACER_MODELS names."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(ALL)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs, of which the median is taken")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ALL)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    for name in () if arguments.tables else arguments.names or _measurable():
        module = module_of(name)
        getattr(module, "run", run)(module, rounds=arguments.rounds)
    write_tables(ALL)


def _measurable() -> list[str]:
    """All benchmarks, or without a folder of models those that need none."""
    if "FLOWTRACER_MODELS" in os.environ:
        return list(ALL)
    print(f"leaving out {', '.join(PRETRAINED)}: set FLOWTRACER_MODELS to a folder of models")
    return [name for name in ALL if name not in PRETRAINED]


if __name__ == "__main__":
    main()
