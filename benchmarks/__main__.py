"""`python -m benchmarks [NAME …]`: measure, and write the tables of `benchmarks/README.md`."""

from __future__ import annotations

import argparse

from benchmarks.harness import run
from benchmarks.tables import module_of, write_tables

ALL = (
    "trace_against_forward",
    "flow_stage",
    "sparse_against_dense",
    "rollout_batches",
    "growth",
    "long_sequences",
    "flashtrace",
    "grpo_step",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(ALL)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ALL)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    for name in () if arguments.tables else arguments.names or ALL:
        module = module_of(name)
        # What the protocol does not fit measures in its own way.
        getattr(module, "run", run)(module, rounds=arguments.rounds)
    write_tables(ALL)


if __name__ == "__main__":
    main()
