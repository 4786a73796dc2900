"""The options that choose who works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from flowtracer_plugin.bulk.engines import Engine

_work = partial(typer.Option, rich_help_panel="Work")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Who works."""

    engine: Annotated[
        Literal["processes", "ray"],
        _work(help="Workers are processes of this machine, or run on Ray."),
    ] = "processes"
    workers: Annotated[
        int, _work(min=1, help="Number of workers, each with its own copy of the model.")
    ] = 1
    gpus_per_worker: Annotated[
        float,
        _work(min=0, help="GPUs that Ray shows to each worker; with 0.5 two workers share one."),
    ] = 0.0
    address: Annotated[
        str | None,
        _work(
            help="The Ray cluster, such as auto or 10.0.0.1:6379; by default Ray is started on "
            "this machine, for this command alone."
        ),
    ] = None


def chosen_engine(options: WorkerOptions) -> Engine:
    """The engine that the options describe.

    Raises:
        typer.BadParameter: An option is for Ray alone.
        ModuleNotFoundError: Ray is missing.
    """
    from flowtracer_plugin.bulk.engines import Engine

    if options.engine != "ray" and (options.gpus_per_worker or options.address is not None):
        raise typer.BadParameter("--gpus-per-worker and --address are for --engine ray: add it")
    return Engine(
        name=options.engine,
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        address=options.address,
    )
