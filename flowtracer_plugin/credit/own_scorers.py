"""Scorers of your own: functions that are found by an entry point or by their path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowtracer_plugin.credit.choosing import LATE, Scorer, top
from flowtracer_plugin.credit.measures import Features, Rollouts

ENTRY_POINT_GROUP = "flowtracer.scorers"
"""The group of entry points by which packages offer scorers."""

PARTS = (
    "flow",
    "attention",
    "heads",
    "entropy",
    "surprisal",
    "tokens",
    "saliency",
    "swaps",
    "sensitivity",
)
"""What an own scorer may need of the rollouts."""

Measure = Callable[[Rollouts], Tensor]

Decorated = TypeVar("Decorated", bound=Measure)

_NEEDS = "flowtracer_needs"


class ScorerError(ValueError):
    """An own scorer cannot be imported, several have its name, or what it returns is no score."""


def needs(*parts: str, layers: str = "middle") -> Callable[[Decorated], Decorated]:
    """A decorator that says what a scorer reads of its `Rollouts`; the function stays as it is.

    Without it, a function gets the ids and the masks alone.

    Args:
        parts: "flow" (`throughput` and `reach`), "attention", "heads" (`calls`), "entropy"
            (`entropies`), "surprisal" (`surprisals`), "tokens", "saliency", "swaps" or
            "sensitivity".
        layers: The layers that "flow", "attention" and "heads" read by default.

    Raises:
        ScorerError: There is no such part, or attention is to be kept until entropies are known.

    Examples:
        >>> @needs("flow", "entropy")
        ... def unsure_flow(rollouts):
        ...     flow = rollouts.throughput[:, rollouts.prompt_length :]
        ...     return flow * rollouts.entropies
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ScorerError(
            f"a scorer needs some of {', '.join(PARTS)}, got {unknown[0]!r}; write "
            "@needs('flow') above the function"
        )
    if LATE & {*parts} and {"attention", "heads"} & {*parts}:
        raise ScorerError(
            "entropies and surprisals are known only when a training run has freed the attention, "
            "so that no function can read both; write two scorers, and multiply them: 'one*other'"
        )

    def mark(measure: Decorated) -> Decorated:
        vars(measure)[_NEEDS] = frozenset(parts), layers
        return measure

    return mark


def own_scorer(name: str) -> Scorer | None:
    """The scorer of an entry point, or of a path; None if the name is neither.

    Raises:
        ScorerError: It cannot be imported or called, or several have this name.
    """
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=name)}
    if len(points) > 1:
        owners = " and ".join(f"{value} of {_owner(point)}" for value, point in points.items())
        raise ScorerError(
            f"several installed packages have a scorer {name!r}: {owners}; name one of them by its "
            "path, or uninstall the other"
        )
    for path in points:
        return function_scorer(_imported(path), name)
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        return None
    return function_scorer(_imported(name), name)


def function_scorer(measure: Any, name: str | None = None) -> Scorer:
    """The scorer of a function; its path is its name, unless another is given.

    Raises:
        ScorerError: It is no function.
    """
    if isinstance(measure, type | Scorer) or not callable(measure):
        raise ScorerError(
            "wanted a function from Rollouts to a tensor [batch, completion] as scorer"
            f"{f' {name!r}' if name else ''}, found {measure!r:.80}"
        )
    name = name or path_of(measure)
    parts, layers = getattr(measure, _NEEDS, (frozenset[str](), "middle"))
    said = (inspect.getdoc(measure) or "").partition("\n")[0]
    return Scorer(
        name=name,
        needs=parts,
        layers=layers,
        measure=partial(_measured, measure, name),
        choose=top,
        formula=said or name,
        source=path_of(measure),
        cost="what the function takes",
        code=source_digest(measure, name),
    )


def scorer_name(scorer: str | Measure) -> str:
    """The name by which any process finds a scorer; of a function, it is the path.

    Raises:
        ScorerError: The path does not lead to the function.
    """
    if isinstance(scorer, str):
        return scorer
    path = function_scorer(scorer).name
    if "<" in path or _imported(path) is not scorer:  # <lambda> and <locals> have no path
        raise ScorerError(
            f"another process could not find this scorer by the path {path!r}; define it at the "
            "top of a module"
        )
    return path


def installed_names() -> list[str]:
    """The names of the scorers that installed packages offer."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def path_of(measure: Measure) -> str:
    """The path of a function, such as `package.module:function`."""
    named: Any = measure if hasattr(measure, "__qualname__") else type(measure)
    return f"{named.__module__}:{named.__qualname__}"


def own_sources(scorers: Mapping[str, Scorer]) -> dict[str, dict[str, str]]:
    """A setting for files of results: the hash of each own scorer's source; none without any."""
    found = {name: scorer.code for name, scorer in scorers.items() if scorer.code}
    return {"own_scorers": found} if found else {}


def source_digest(function: object, name: str) -> str:
    """A hash of a function's source, without what it calls; of its name if there is no source."""
    try:
        source = inspect.getsource(function)  # type: ignore[arg-type] # it says so itself
    except (OSError, TypeError):  # made by no source file, such as a partial function
        source = repr(getattr(getattr(function, "__code__", None), "co_code", name))
    return blake2b(source.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def import_named(module: str, name: str) -> Any:
    """What a module has under a name; the module may lie in the current folder.

    Raises:
        Exception: Whatever the import raises.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as TRL's own script does
    return attrgetter(name)(importlib.import_module(module))


def _imported(path: str) -> Any:
    """What a path names."""
    module, _, name = path.partition(":")
    try:
        return import_named(module, name)
    except Exception as error:  # a foreign import can fail in any way
        raise ScorerError(
            f"cannot import the scorer {path!r}: {_in_words(error)}; wanted the path "
            "package.module:function of a function that stands at the top of an installed module, "
            "or of one in the current folder"
        ) from error


def _measured(measure: Measure, name: str, rollouts: Rollouts) -> Features:
    """What an own function returns, as a single feature.

    Raises:
        ScorerError: The function fails, or returns no number for each token.
    """
    try:
        with torch.no_grad():
            found: Any = measure(rollouts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ScorerError(
            f"the scorer {name!r} fails: {_in_words(error)}; parts of Rollouts that it does not "
            "ask for with @needs(...) may be None"
        ) from error
    wanted = tuple(rollouts.competing.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) != wanted or found.is_complex():
        shape = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ScorerError(
            f"the scorer {name!r} must return a tensor of one real number for each token of the "
            f"completions, [batch, completion], here {wanted}, got {shape:.80}; cut prompts off "
            "with [:, rollouts.prompt_length:]"
        )
    return found.detach().to(rollouts.competing.device, torch.float32)[None]


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def _in_words(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
