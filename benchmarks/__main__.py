"""`python -m benchmarks [NAME …]`: measure, and write the tables of `benchmarks/README.md`."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.harness import run
from benchmarks.tables import write_tables

ALL = ("trace_against_forward", "flashtrace", "grpo_step")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(ALL)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ALL)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    for name in arguments.names or ALL:
        module = importlib.import_module(f"benchmarks.{name}")
        # A benchmark that compares nothing in pairs measures in its own way.
        getattr(module, "run", run)(module, rounds=arguments.rounds)
    write_tables()


if __name__ == "__main__":
    main()
