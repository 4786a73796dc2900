"""The options that commands share, with the names and defaults of the Python API."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from flowtracer_plugin.cli.loading import Device, Implementation, ModelName, Precision, RemoteCode

_generating = partial(typer.Option, rich_help_panel="The model's answer")
_tracing = partial(typer.Option, rich_help_panel="Flow")
_output = partial(typer.Option, rich_help_panel="Output")


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: the fields of its dataclass parameters are its options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = [parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += _field_parameters(groups[name]) if name in groups else own

    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def answer_rule(text: str) -> str | re.Pattern[str]:
    """A finder of answers: its name, or the pattern after `re:`.

    Raises:
        typer.BadParameter: There is no such finder, or the pattern has not one group.
    """
    from flowtracer_plugin.text.answers import FINDERS, check_finder

    names = ["auto", *FINDERS]
    if text in names:
        return text
    if not text.startswith("re:"):
        raise typer.BadParameter(f"wanted {', '.join(names)} or re:PATTERN, found {text!r}")
    try:
        pattern = re.compile(text.removeprefix("re:"))
        check_finder(pattern)
    except (ValueError, re.error) as error:
        raise typer.BadParameter(f"{error}, in {text!r}") from error
    return pattern


def layer_selection(text: str) -> str | list[int]:
    """Layers by name or by number; whether the model has these, only the model can tell.

    Raises:
        typer.BadParameter: It is neither.
    """
    from flowtracer_plugin.model.layers import select_layers

    parts = text.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return [int(part) for part in parts]
    try:
        select_layers(text, [0])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def head_selection(text: str) -> str | float | tuple[tuple[int, int], ...]:
    """Heads as `wrap` takes them; whether the model has these, only the model can tell.

    Raises:
        typer.BadParameter: They are neither all, nor a share, nor pairs.
    """
    if text == "all":
        return text
    try:
        if ":" not in text:
            share = float(text)
            if 0 < share <= 1:
                return share
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(layer), int(head)) for layer, head in pairs)
    except ValueError:
        raise typer.BadParameter(
            f"wanted all, a share above 0 and up to 1, or pairs such as 12:3,15:0, found {text!r}"
        ) from None


def _beginning_with(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """What a shell may complete a word to."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _answer_rules() -> list[str]:
    from flowtracer_plugin.text.answers import FINDERS

    return ["auto", *FINDERS]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: ModelName
    device: Device = "auto"
    dtype: Precision = "auto"
    attn_implementation: Implementation = None
    trust_remote_code: RemoteCode = False


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What the model is asked."""

    prompt: Annotated[str, typer.Option(help="The question; - reads it from standard input.")]
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
    ] = True


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How the model answers: those of `FlowTracer.generate`."""

    max_new_tokens: Annotated[int, _generating(min=1, help="Length of a generated answer.")] = 256
    do_sample: Annotated[
        bool, _generating("--do-sample", help="Sample instead of decoding greedily.")
    ] = False
    temperature: Annotated[
        float | None, _generating(help="Of the sampling, instead of the model's own.")
    ] = None
    seed: Annotated[int, _generating(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0


Layers = Annotated[
    Any,
    _tracing(
        parser=layer_selection,
        metavar="LAYERS",
        help="middle, early, late, all, middle:5, or numbers such as 4,5,6.",
        autocompletion=_beginning_with(lambda: ["middle", "early", "late", "all"]),
    ),
]


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """How the flow is traced: those of `wrap`."""

    preset: Annotated[
        Literal["paper", "decision", "sharp"],
        _tracing(help="What the next options are if they are left out."),
    ] = "paper"
    layers: Layers = "middle"
    question: Annotated[
        Literal["prompt", "all", "user"],
        _tracing(help="Trace from the prompt, also from its special tokens, or from --prompt."),
    ] = "prompt"
    answer: Annotated[
        Any,
        _tracing(
            parser=answer_rule,
            metavar="RULE",
            help="How to find the answer: auto, boxed, answer_tag, hash, phrase, after_think, "
            "last_number, last_word, or re:PATTERN with one group.",
            autocompletion=_beginning_with(_answer_rules),
        ),
    ] = "auto"
    target: Annotated[
        Literal["answer", "decision"] | None,
        _tracing(help="Trace to the answer, or to the tokens whose logits choose it."),
    ] = None
    question_weights: Annotated[
        Literal["uniform", "reach"] | None,
        _tracing(help="Start with equal parts, or in proportion to the influence on the answer."),
    ] = None
    boundary: Annotated[
        Literal["literal", "absorbing"] | None,
        _tracing(help="Flow passes through answer tokens, or ends at the first that it meets."),
    ] = None
    first_token: Annotated[
        Literal["keep", "drop"] | None,
        _tracing(help="Keep or drop what is paid to the first token, a common attention sink."),
    ] = None
    heads: Annotated[
        Any,
        _tracing(
            parser=head_selection,
            metavar="HEADS",
            help="all, the share that looks most at the reasoning, as 0.3, or pairs as 12:3,15:0.",
        ),
    ] = None
    edges: Annotated[
        Literal["attention", "value"] | None,
        _tracing(help="Weigh attention alone, or times what each head moves."),
    ] = None
    adapter: Annotated[
        str | None,
        _tracing(help="Name of an adapter (flowtracer adapters), not the one that fits."),
    ] = None
    backend: Annotated[Literal["nnsight", "interface"], _tracing(help="How the model is read.")] = (
        "nnsight"
    )
    block: Annotated[int, _tracing(min=1, help="Query rows that are computed at a time.")] = 64
    mode: Annotated[
        Literal["auto", "dense", "streamed"],
        _tracing(help="Hold the attention between all pairs of tokens, or compute it in blocks."),
    ] = "auto"
    verify: Annotated[
        bool, _tracing(help="Check first that what is read is what the model computes.")
    ] = True


def writable(path: Path | None) -> Path | None:
    """The file, if one can be made there: better refused now than after the long work.

    Raises:
        typer.BadParameter: Its folder, or the nearest there is above it, may not be written to.
    """
    if path is None:
        return None
    target = path.resolve()
    special = target.exists() and not target.is_file()  # a device or a pipe
    place = target if special else next(one for one in target.parents if one.exists())
    if not (special or place.is_dir()) or not os.access(place, os.W_OK):
        raise typer.BadParameter(
            f"cannot write {str(path)!r}: nothing can be made in {str(place)!r}; name a file in a "
            "folder that you may write to"
        )
    return path


SUFFIXES = (".png", ".svg", ".pdf")
"""Of figures; matplotlib, which writes them, takes a second to import."""


def _figure(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(
            f"wanted .png, .svg or .pdf, found {path.suffix!r} in {path.name!r}"
        )
    return writable(path)


_file = partial(_output, dir_okay=False, callback=writable)

AsJson = Annotated[bool, _output("--json", help="Print the trace as JSON.")]
PageFile = Annotated[Path | None, _file(help="Write a page.")]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What becomes of a trace: those of its methods `to_…`."""

    json: AsJson = False
    html: PageFile = None
    parquet: Annotated[Path | None, _file(help="Write the tokens as a table.")] = None
    graphml: Annotated[Path | None, _file(help="Write the graph of the flow.")] = None
    figure: Annotated[
        Path | None, _file(callback=_figure, help="Write a figure: .png, .svg or .pdf.")
    ] = None
    figure_kind: Annotated[
        Literal["ribbon", "river", "steps", "overview"],
        _output(help="Flow along the text, across its cuts, between its lines, or all three."),
    ] = "ribbon"

    def __post_init__(self) -> None:
        """Refuse what would write less than it says.

        Raises:
            typer.BadParameter: Two files have one name, or there is a kind and no figure.
        """
        names = [value for value in vars(self).values() if isinstance(value, Path)]
        if len(set(names)) < len(names):
            raise typer.BadParameter("two files have the same name: each needs its own")
        if self.figure is None and self.figure_kind != "ribbon":
            raise typer.BadParameter("--figure-kind is of --figure: name its file too")


@dataclass(frozen=True, kw_only=True)
class NewTraceOptions(OutputOptions):
    """What becomes of a trace that is not on disk yet."""

    save: Annotated[Path | None, _file(help="Write the trace itself, for flowtracer report.")] = (
        None
    )
    scores: Annotated[
        str | None,
        _output(help="Shade the page by these too, as attention,flow:sharp; docs/credit.md."),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what would write less than it says.

        Raises:
            typer.BadParameter: As `OutputOptions`; there are scores and no page, or no such score.
        """
        super().__post_init__()
        if self.scores is None:
            return
        if self.html is None:
            raise typer.BadParameter("--scores are for the page: name its file with --html too")
        from flowtracer_plugin.credit.token_scores import token_score

        for name in self.score_names:
            try:
                token_score(name)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--scores") from error

    @property
    def score_names(self) -> tuple[str, ...]:
        """The scores that are asked for."""
        return tuple(name.strip() for name in (self.scores or "").split(",") if name.strip())
