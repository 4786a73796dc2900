"""The options that several commands share, with the names and defaults of the Python API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from flowtracer_plugin.cli import parsing
from flowtracer_plugin.extras import install

_loading = partial(typer.Option, rich_help_panel="Loading the model")
_generating = partial(typer.Option, rich_help_panel="The model's answer")
_tracing = partial(typer.Option, rich_help_panel="Flow")
_prompt = partial(typer.Option, rich_help_panel="Prompt")
_scoring = partial(typer.Option, rich_help_panel="Scores")
_output = partial(typer.Option, rich_help_panel="Output")
_file = partial(_output, dir_okay=False, callback=parsing.writable)


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: each field of a dataclass parameter becomes an option."""
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


def _starting_with(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """A completion for shells: the names that start with the incomplete word."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder of a model, or its id on the Hugging Face hub."),
]
Backend = Annotated[
    Literal["nnsight", "interface"],
    _tracing(help="How attention is read: with nnsight, or through transformers' own functions."),
]
Adapter = Annotated[
    str | None,
    _tracing(help="Name of the adapter to use; by default the first that fits the model."),
]
Preset = Annotated[
    Literal["paper", "decision", "sharp", "decided", "derivation", "causal"] | None,
    _tracing(
        help="Sets defaults of --layers, --target, --question-weights, --heads, --edges, --rows "
        "and --damping; by default derivation, or paper if the model cannot make a backward pass."
    ),
]
Layers = Annotated[
    Any,
    _tracing(
        parser=parsing.layer_selection,
        metavar="LAYERS",
        help="Layers to read: middle, early, late, all, middle:5, or numbers such as 4,5,6; by "
        "default the preset's.",
        autocompletion=_starting_with(lambda: ["middle", "early", "late", "all"]),
    ),
]
AnswerRule = Annotated[
    Any,
    _tracing(
        parser=parsing.answer_rule,
        metavar="RULE",
        help="How to find the answer in a response: auto, boxed, answer_tag, json, hash, phrase, "
        "after_think, conclusion, formula, first_sentence, last_number, last_word, text:ANSWER for "
        "the answer itself, or re:PATTERN with one group.",
        autocompletion=_starting_with(parsing.answer_rules),
    ),
]
MaxNewTokens = Annotated[
    int, _generating(min=1, help="The most tokens that the model generates for one response.")
]
SCORES = _scoring(help="Scores, such as flow,entropy or your own; see 'flowtracer docs credit'.")
Oracle = Annotated[
    str | None,
    _scoring(
        callback=parsing.pattern,
        help="Regular expression for the tokens that matter; adds a score named oracle.",
    ),
]
AsJson = Annotated[bool, _output("--json", help="Print the result as one JSON document.")]
PageFile = Annotated[Path | None, _file(help="Write an HTML page to this file.")]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Show the full traceback of an error.")
]


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a model is loaded."""

    device: Annotated[
        str,
        _loading(
            help="auto, cpu, cuda, cuda:1 or mps.",
            autocompletion=_starting_with(lambda: ["auto", "cpu", "cuda", "mps"]),
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _loading(help="Precision of the model; auto keeps that of its files."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, _loading("--trust-remote-code", help="Run model code that comes with the files.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(LoadingOptions):
    """How a model is loaded, and how it computes attention."""

    attn_implementation: Annotated[
        str | None,
        _loading(help="Attention implementation: sdpa, eager, flash_attention_2, …"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt, and how the model gets it."""

    prompt: Annotated[str | None, _prompt(help="The prompt; - reads it from standard input.")] = (
        None
    )
    prompt_file: Annotated[
        Path | None, _prompt(exists=True, dir_okay=False, help="A file that holds the prompt.")
    ] = None
    messages: Annotated[
        Path | None,
        _prompt(
            exists=True,
            dir_okay=False,
            help="A JSON file of chat messages, with the response if the last is the assistant's.",
        ),
    ] = None
    system_prompt: Annotated[str | None, _prompt(help="System message before the prompt.")] = None
    chat: Annotated[
        bool, _prompt(help="Put the prompt into the model's chat template, if it has one.")
    ] = True
    template_arg: Annotated[
        list[str] | None,
        _prompt(
            metavar="KEY=VALUE",
            help=parsing.TEMPLATE_ARG,
        ),
    ] = None

    def __post_init__(self) -> None:
        given = [self.prompt, self.prompt_file, self.messages]
        if sum(one is not None for one in given) != 1:
            raise typer.BadParameter(
                "pass the prompt by one of --prompt, --prompt-file and --messages"
            )
        if self.messages is not None and self.system_prompt is not None:
            raise typer.BadParameter(
                "--messages hold the system message: leave out --system-prompt"
            )
        if not self.chat and (self.messages or self.system_prompt or self.template_arg):
            raise typer.BadParameter(
                "--messages, --system-prompt and --template-arg need the chat template: leave out "
                "--no-chat"
            )

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [file for file in (self.prompt_file, self.messages) if file is not None]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        return parsing.keys_and_values(self.template_arg)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How the model generates its answer: the options of `FlowTracer.generate`."""

    max_new_tokens: MaxNewTokens = 256
    do_sample: Annotated[
        bool, _generating("--do-sample", help="Sample instead of decoding greedily.")
    ] = False
    temperature: Annotated[
        float | None, _generating(help="Sampling temperature; by default the model's own.")
    ] = None
    top_p: Annotated[
        float | None,
        _generating(
            min=0,
            max=1,
            help="Sample from the likeliest tokens of this share; by default the model's own.",
        ),
    ] = None
    seed: Annotated[int, _generating(min=0, max=2**32 - 1, help="Random seed of sampling.")] = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise typer.BadParameter(
                f"--temperature must be above 0, found {self.temperature:g}; for the likeliest "
                "tokens leave out --do-sample"
            )
        for name, value in (("--temperature", self.temperature), ("--top-p", self.top_p)):
            if value is not None and not self.do_sample:
                raise typer.BadParameter(f"{name} is for sampling: pass --do-sample too")


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """How the flow is traced: the options of `wrap`."""

    preset: Preset = None
    layers: Layers = None
    question: Annotated[
        Literal["auto", "turns", "user", "prompt", "all"],
        _tracing(
            help="What the question is. turns: all that the user said, without system prompt and "
            "template; user: the user's last message; prompt: the prompt without special tokens; "
            "all: with them; auto: turns in a chat, else prompt."
        ),
    ] = "auto"
    answer: AnswerRule = "auto"
    target: Annotated[
        Literal["answer", "decision"] | None,
        _tracing(help="Where flow ends: the answer's tokens, or those whose logits choose them."),
    ] = None
    question_weights: Annotated[
        Literal["uniform", "reach", "origins"] | None,
        _tracing(
            help="Where flow starts. uniform: at the question, in equal parts; reach: there, in "
            "proportion to influence on the answer; origins: wherever what decided the answer "
            "comes from."
        ),
    ] = None
    boundary: Annotated[
        Literal["literal", "absorbing"] | None,
        _tracing(help="Flow passes through answer tokens, or ends at the first that it meets."),
    ] = None
    first_token: Annotated[
        Literal["keep", "drop"] | None,
        _tracing(help="Keep or drop attention to the first token, a common attention sink."),
    ] = None
    heads: Annotated[
        Any,
        _tracing(
            parser=parsing.head_selection,
            metavar="HEADS",
            help="all, a share such as 0.3 (the heads that attend most to the reasoning), or "
            "pairs of layer and head such as 12:3,15:0.",
        ),
    ] = None
    edges: Annotated[
        Literal["attention", "value", "influence", "causal"] | None,
        _tracing(
            help="Edge weights. attention: alone; value: times the length of the moved value; "
            "influence: also times the head's influence on what was sampled, which takes a "
            "backward pass; causal: what the answer loses without the edge, which takes nine."
        ),
    ] = None
    rows: Annotated[
        Literal["own", "decision"] | None,
        _tracing(
            help="Whose attention leads into a token: its own row's, or that of the row that chose "
            "it."
        ),
    ] = None
    damping: Annotated[
        float | None,
        _tracing(
            help="Factor of every edge, above 0 and up to 1: long chains of edges count less."
        ),
    ] = None
    adapter: Adapter = None
    backend: Backend = "nnsight"
    block: Annotated[int, _tracing(min=1, help="Number of query rows to compute at a time.")] = 64
    mode: Annotated[
        Literal["auto", "dense", "streamed"],
        _tracing(help="dense keeps the whole attention matrix, streamed computes it in blocks."),
    ] = "auto"
    verify: Annotated[
        bool, _tracing(help="First check that the attention read is what the model computes.")
    ] = True


_DRAWN_BY = {"parquet": "pyarrow", "graphml": "networkx", "figure": "matplotlib"}
"""The optional package that each kind of file needs, looked for before the long work."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The files that a trace is written to, by the methods `to_…` of `FlowTrace`."""

    json: AsJson = False
    html: PageFile = None
    parquet: Annotated[Path | None, _file(help="Write the tokens as a Parquet table.")] = None
    graphml: Annotated[Path | None, _file(help="Write the flow graph as GraphML.")] = None
    figure: Annotated[
        Path | None,
        _file(callback=parsing.figure_file, help="Write a figure: .png, .svg or .pdf."),
    ] = None
    figure_kind: Annotated[
        Literal["ribbon", "river", "steps", "overview"],
        _output(
            help="The figure shows flow along the text, across its cuts, between its lines, or "
            "all three."
        ),
    ] = "ribbon"

    def __post_init__(self) -> None:
        parsing.check_separate(self.files)
        for option, package in _DRAWN_BY.items():
            if vars(self)[option] is not None and find_spec(package) is None:
                raise typer.BadParameter(f"--{option} needs {package}; run: {install('viz')}")
        if self.figure is None and self.figure_kind != "ribbon":
            raise typer.BadParameter("--figure-kind is for --figure: name its file too")

    @property
    def files(self) -> list[Path]:
        """The files that are written."""
        return [value for value in vars(self).values() if isinstance(value, Path)]


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """Where the results go."""

    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            callback=parsing.writable,
            help="Write each result to this file once it is known; rerun to continue.",
        ),
    ] = None
    json: AsJson = False
