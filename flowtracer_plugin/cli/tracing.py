"""`flowtracer trace`, `generate`, `demo`, `app` and `estimate`: which tokens carried an answer?"""

from __future__ import annotations

import socket
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli import parsing
from flowtracer_plugin.cli.loading import load_model, load_tracer, waiting
from flowtracer_plugin.cli.options import (
    AsJson,
    GenerationOptions,
    Layers,
    LoadingOptions,
    ModelArgument,
    OutputOptions,
    PageFile,
    Preset,
    PromptOptions,
    ReadingOptions,
    Traceback,
    TracingOptions,
    flattened,
)
from flowtracer_plugin.cli.outputs import deliver, print_document
from flowtracer_plugin.cli.parsing import check_separate
from flowtracer_plugin.cli.questions import Question, checked, read_question

if TYPE_CHECKING:
    from flowtracer_plugin.result.token_heads import TokenHeads
    from flowtracer_plugin.trace.flow_trace import FlowTrace
    from flowtracer_plugin.trace.tracer import FlowTracer

_output = partial(typer.Option, rich_help_panel="Output")
_file = partial(_output, dir_okay=False, callback=parsing.writable)

DEMO_QUESTION = (
    "Ann has 4 apples. Ann buys 1. Ann gets 3. Ann sees 6. Ann buys 6. How many apples?\n"
)

EXAMPLE_QUESTION = "Tom has 5 apples and buys 3 more. How many apples does Tom have now?"
"""What the app asks a model at first."""


@dataclass(frozen=True, kw_only=True)
class NewTraceOptions(OutputOptions):
    """The files that a new trace is written to."""

    save: Annotated[
        Path | None, _file(help="Save the trace itself; flowtracer report reads it.")
    ] = None
    scores: Annotated[
        str | None,
        _output(
            help="More scores for the page, such as attention,flow:sharp; see 'flowtracer docs "
            "credit'."
        ),
    ] = None
    check: Annotated[
        bool,
        _output(
            "--check",
            help="Knock out the tokens with the most flow and those that the score causal chooses, "
            "one after another, and show what the answer loses; takes a forward pass for each.",
        ),
    ] = False

    by_head: Annotated[
        Any,
        _output(
            parser=parsing.token_place,
            metavar="TOKEN",
            help="Show which layers and heads pay the edges into this token: its number, or answer "
            "for the answer's first token; takes one more pass of the model.",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, asked in (("--check", self.check), ("--by-head", self.by_head is not None)):
            if asked and self.json and self.html is None:
                raise typer.BadParameter(
                    f"{name} is not part of the JSON document: add --html FILE"
                )
        if self.scores is None:
            return
        if self.html is None:
            raise typer.BadParameter("--scores are for the page: name its file with --html too")
        from flowtracer_plugin.credit.token_scores import token_score

        with parsing.wrong_usage("--scores"):
            for name in self.score_names:
                token_score(name)

    @property
    def score_names(self) -> list[str]:
        """The names in `scores`."""
        return [name for name in parsing.names(self.scores or "") if name]


@flattened
def trace(
    model: ModelArgument,
    asked: PromptOptions,
    loading: ReadingOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
    outputs: NewTraceOptions,
    response: Annotated[
        str | None, typer.Option(help="Response to trace; by default the model generates one.")
    ] = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Let the model respond, as it does without --response."),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Show which tokens carried the answer of a given or generated response.

    For example:

    flowtracer trace Qwen/Qwen3-0.6B --prompt "2 + 2 = ?" --response "4."
    """
    check_separate(outputs.files, asked.files)
    question = read_question(asked)
    if question.response is not None and response is not None:
        raise typer.BadParameter("--messages end with a response already: leave out --response")
    response = question.response if response is None and not generate else response
    if response is None:
        _deliver(*_generated(model, question, loading, generation, tracing), outputs)
        return
    if generate or generation != GenerationOptions():
        raise typer.BadParameter(
            "--response gives the answer, and nothing is generated: leave it out, or leave out "
            "--generate, --max-new-tokens, --do-sample, --temperature and --seed"
        )
    response = checked("response", response)
    tracer = _load_tracer(model, loading, tracing)
    trace = tracer.trace(
        question.prompt(tracer.require_tokenizer()),
        response,
        template_kwargs=question.template_kwargs,
        progress=sys.stderr.isatty(),
    )
    _deliver(tracer, trace, outputs)


@flattened
def generate(
    model: ModelArgument,
    asked: PromptOptions,
    loading: ReadingOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
    outputs: NewTraceOptions,
    traceback: Traceback = False,
) -> None:
    """Let the model respond, and show which tokens carried its answer.

    For example:

    flowtracer generate Qwen/Qwen3-0.6B --prompt "What is 17 * 3?"
    """
    check_separate(outputs.files, asked.files)
    _deliver(*_generated(model, read_question(asked), loading, generation, tracing), outputs)


@flattened
def demo(
    html: PageFile = Path("flowtracer-demo.html"),
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Trace a question with a tiny model that is part of this package; no network is needed.

    For example:

    flowtracer demo --html apples.html
    """
    asked = read_question(PromptOptions(prompt=DEMO_QUESTION))
    loading = ReadingOptions(device="cpu")
    made = _generated(str(demo_model()), asked, loading, GenerationOptions(), TracingOptions())
    _deliver(*made, NewTraceOptions(html=html, json=json, check=not json or html is not None))
    typer.echo(
        "your own model: flowtracer generate FOLDER_OR_ID --prompt TEXT --html trace.html",
        err=True,
    )


@flattened
def app(
    loading: ReadingOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model, or its id on the Hugging Face hub; by default the tiny model "
            "of flowtracer demo.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the app on this machine.")
    ] = 7860,
    traceback: Traceback = False,
) -> None:
    """Trace answers of a model in the browser, and hide lines from it; needs the extra app.

    For example:

    flowtracer app Qwen/Qwen3-0.6B
    """
    with waiting("importing Gradio, PyTorch and transformers"):
        from flowtracer_plugin.app.blocks import HOST, build, serve
    _check_port(HOST, port)  # and the model, before anything is served
    tracer = load_tracer(str(model or demo_model()), loading, None)
    serve(
        build(tracer, prompt=DEMO_QUESTION if model is None else EXAMPLE_QUESTION),
        port,
        lambda address: typer.echo(f"the app is at {address} on this machine; Ctrl-C ends it"),
    )


def _check_port(host: str, port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise typer.BadParameter(
                f"port {port} cannot be used ({error.strerror}); name another, such as "
                f"{port + 1 if port < 65535 else port - 1}",
                param_hint="--port",
            ) from error


@flattened
def estimate(
    model: ModelArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens in prompt and response.")],
    loading: LoadingOptions,
    batch: Annotated[int, typer.Option(min=1, help="Number of texts traced at once.")] = 1,
    preset: Preset = None,
    layers: Layers = None,
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Show how much memory tracing would take beside the model, and how much is free.

    For example:

    flowtracer estimate Qwen/Qwen3-0.6B --tokens 32768
    """
    loaded = load_model(model, loading)
    import flowtracer_plugin as ft

    found = ft.wrap(loaded, preset=preset, layers=layers).estimate(tokens, batch=batch)
    if not json:
        typer.echo(str(found))
        return
    print_document({**asdict(found), "mode": found.mode})


def demo_model() -> Path:
    """The folder of the tiny model, in an installed package or in a clone of the repository."""
    package = Path(__file__).parents[1]
    folders = package / "reasoner", package.parent / "examples" / "reasoner" / "model"
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the demo's model is not in {str(folders[0])!r}; install flowtracer-plugin anew"
    )


def _load_tracer(model: str, loading: LoadingOptions, tracing: TracingOptions) -> FlowTracer:
    return load_tracer(model, loading, None, **asdict(tracing))


def _generated(
    model: str,
    question: Question,
    loading: LoadingOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
) -> tuple[FlowTracer, FlowTrace]:
    tracer = _load_tracer(model, loading, tracing)
    from transformers import set_seed

    set_seed(generation.seed)
    made = tracer.generate(
        question.prompt(tracer.require_tokenizer()),
        max_new_tokens=generation.max_new_tokens,
        do_sample=generation.do_sample,
        temperature=generation.temperature,
        top_p=generation.top_p,
        template_kwargs=question.template_kwargs,
        progress=sys.stderr.isatty(),
    )
    return tracer, made


def _deliver(tracer: FlowTracer, trace: FlowTrace, outputs: NewTraceOptions) -> None:
    """Score and check the trace as the options say, then write and show it."""
    from flowtracer_plugin.credit.token_scores import score_text

    names = outputs.score_names
    scores = score_text(tracer, trace, names) if names else None
    drops = _drops(tracer, trace) if outputs.check else None
    heads = None if outputs.by_head is None else _heads(tracer, trace, outputs.by_head)
    deliver(trace, outputs, scores, drops, heads)


def _heads(tracer: FlowTracer, trace: FlowTrace, token: int | str) -> TokenHeads | None:
    """What each head pays into a token; the trace itself must not be lost if that fails."""
    from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError

    place = int(trace.spans.answer.argmax()) if isinstance(token, str) else token
    try:
        return tracer.heads(trace, place)
    except (ValueError, MemoryError, UnsupportedArchitectureError) as error:
        typer.echo(f"no heads are shown: {error}", err=True)
        return None


def _drops(tracer: FlowTracer, trace: FlowTrace) -> dict[int, float] | None:
    """What the answer loses without some tokens, one at a time.

    They are those with the most flow, and those that `causal` finds that the answer hangs on.
    """
    from flowtracer_plugin.evaluation.knockout import token_drops
    from flowtracer_plugin.model.cutting import KnockOutError
    from flowtracer_plugin.report.carried import carriers
    from flowtracer_plugin.report.display import show

    named = [
        token for one in carriers(show(trace)) for token in range(one.unit.first, one.unit.last + 1)
    ]
    try:
        return token_drops(tracer.model, trace, sorted({*named, *_hung_on(tracer, trace)}))
    except KnockOutError as error:  # the trace itself must not be lost to it
        typer.echo(f"nothing is knocked out: {error}", err=True)
        return None


def _hung_on(tracer: FlowTracer, trace: FlowTrace) -> list[int]:
    """The response tokens that `causal` chooses first; none where the model does not allow it."""
    from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
    from flowtracer_plugin.credit.token_scores import score_text
    from flowtracer_plugin.report.carried import MOST_TOKENS

    try:
        (score,) = score_text(tracer, trace, ["causal"]).values()
    except (ValueError, MemoryError, UnsupportedArchitectureError):
        return []
    best = score.argsort(kind="stable")[::-1][:MOST_TOKENS]
    return [token for token in best.tolist() if score[token] > 0]
