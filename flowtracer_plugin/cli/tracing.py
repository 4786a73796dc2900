"""`flowtracer trace`, `generate`, `demo` and `estimate`: the commands that load a model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli.loading import (
    Device,
    ModelName,
    Precision,
    RemoteCode,
    Traceback,
    check_adapter,
    load_model,
    load_tokenizer,
    named_adapter,
    waiting,
)
from flowtracer_plugin.cli.options import (
    AsJson,
    GenerationOptions,
    Layers,
    ModelOptions,
    NewTraceOptions,
    OutputOptions,
    PageFile,
    PromptOptions,
    TracingOptions,
    flattened,
)
from flowtracer_plugin.cli.outputs import deliver, print_document

if TYPE_CHECKING:
    from flowtracer_plugin.trace.flow_trace import FlowTrace
    from flowtracer_plugin.trace.tracer import FlowTracer

DEMO_QUESTION = (
    "Ann has 4 apples. Ann buys 1. Ann gets 3. Ann sees 6. Ann buys 6. How many apples?\n"
)


@flattened
def trace(
    source: ModelOptions,
    asked: PromptOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
    outputs: NewTraceOptions,
    response: Annotated[
        str | None, typer.Option(help="An answer to trace; without one the model generates it.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model answer (as without --response).")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Show which tokens carried an answer, a given one or the model's own.

    For example:

    flowtracer trace --model Qwen/Qwen3-0.6B --prompt "2 + 2 = ?" --response "4."
    """
    if response is None:
        _deliver(*_generated(source, asked, generation, tracing), outputs)
        return
    if generate or generation != GenerationOptions():
        raise typer.BadParameter(
            "--response gives the answer, and nothing is generated: leave it out, or leave out "
            "--generate, --max-new-tokens, --do-sample, --temperature and --seed"
        )
    text, response = _prompt_text(asked), _checked("response", response)
    tracer = load_tracer(source, tracing)
    prompt = _messages(tracer, text, asked)
    _deliver(tracer, tracer.trace(prompt, response, progress=sys.stderr.isatty()), outputs)


@flattened
def generate(
    source: ModelOptions,
    asked: PromptOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
    outputs: NewTraceOptions,
    traceback: Traceback = False,
) -> None:
    """Let the model answer, and show which tokens carried its answer.

    For example:

    flowtracer generate --model Qwen/Qwen3-0.6B --prompt "What is 17 * 3?"
    """
    _deliver(*_generated(source, asked, generation, tracing), outputs)


@flattened
def demo(
    html: PageFile = Path("flowtracer-demo.html"),
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Trace a question with a tiny model that comes along, and write its page. Needs no network.

    For example:

    flowtracer demo --html apples.html
    """
    source = ModelOptions(model=str(demo_model()), device="cpu")
    asked = PromptOptions(prompt=DEMO_QUESTION)
    _, made = _generated(source, asked, GenerationOptions(), TracingOptions())
    deliver(made, OutputOptions(html=html, json=json))
    typer.echo(
        "your own model: flowtracer generate --model FOLDER_OR_ID --prompt TEXT --html trace.html",
        err=True,
    )


@flattened
def estimate(
    model: ModelName,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompt and response.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts that are traced at once.")] = 1,
    layers: Layers = "middle",
    device: Device = "auto",
    dtype: Precision = "auto",
    trust_remote_code: RemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print bytes as JSON.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show what tracing texts of a length would take beside the model, and what is free.

    For example:

    flowtracer estimate --model Qwen/Qwen3-0.6B --tokens 32768
    """
    loaded = load_model(model, device, dtype, wanted="a model", trust_remote_code=trust_remote_code)
    import flowtracer_plugin as ft

    found = ft.wrap(loaded, layers=layers).estimate(tokens, batch=batch)
    if not json:
        typer.echo(str(found))
        return
    print_document({**asdict(found), "mode": found.mode})


def load_tracer(source: ModelOptions, tracing: TracingOptions) -> FlowTracer:
    """A tracer of the model that is named, with its tokenizer."""
    with waiting("importing PyTorch, transformers and nnsight"):
        from flowtracer_plugin.trace.tracer import wrap
    chosen = None if tracing.adapter is None else named_adapter(tracing.adapter)
    shared: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    tokenizer = load_tokenizer(source.model, **shared)
    if source.attn_implementation is not None:
        shared["attn_implementation"] = source.attn_implementation
    wanted = "model and tokenizer"
    model = load_model(source.model, source.device, source.dtype, wanted=wanted, **shared)
    check_adapter(chosen, model)
    options: dict[str, Any] = asdict(tracing) | {"adapter": chosen}
    return wrap(model, tokenizer, **options)


def demo_model() -> Path:
    """The folder of the tiny model: in an installed package, or in a clone of the repository."""
    package = Path(__file__).parents[1]
    folders = package / "reasoner", package.parent / "examples" / "reasoner" / "model"
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the demo's model is not in {str(folders[0])!r}; install flowtracer-plugin anew"
    )


def _generated(
    source: ModelOptions,
    asked: PromptOptions,
    generation: GenerationOptions,
    tracing: TracingOptions,
) -> tuple[FlowTracer, FlowTrace]:
    if generation.temperature is not None and not generation.do_sample:
        raise typer.BadParameter("--temperature is of sampling: pass --do-sample too")
    text = _prompt_text(asked)
    tracer = load_tracer(source, tracing)
    from transformers import set_seed

    set_seed(generation.seed)
    made = tracer.generate(
        _messages(tracer, text, asked),
        max_new_tokens=generation.max_new_tokens,
        do_sample=generation.do_sample,
        temperature=generation.temperature,
        progress=sys.stderr.isatty(),
    )
    return tracer, made


def _deliver(tracer: FlowTracer, trace: FlowTrace, outputs: NewTraceOptions) -> None:
    """The trace, with the scores that its page is to have."""
    from flowtracer_plugin.credit.token_scores import score_text

    names = outputs.score_names
    deliver(trace, outputs, score_text(tracer, trace, names) if names else None)


def _prompt_text(asked: PromptOptions) -> str:
    if asked.prompt != "-":
        return _checked("prompt", asked.prompt)
    try:
        return _checked("prompt", sys.stdin.read().removesuffix("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt must be UTF-8 text: {error}") from error


def _checked(name: str, text: str) -> str:
    """The text, if a tokenizer can read it; better refused now than when the model is loaded."""
    if not text:
        raise ValueError(f"the {name} is empty, so there is nothing to trace; pass a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # what a shell passes on, Python keeps as surrogates
        raise ValueError(f"the {name} must be UTF-8 text: {error}") from error
    return text


def _messages(tracer: FlowTracer, text: str, asked: PromptOptions) -> Any:
    if asked.chat and tracer.require_tokenizer().chat_template is not None:
        return [{"role": "user", "content": text}]
    return text
