"""The command `flowtracer`: the public API from a shell, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from flowtracer_plugin.cli_adapters import adapters_app
from flowtracer_plugin.cli_loading import (
    Device,
    Precision,
    Traceback,
    load_model,
    load_tokenizer,
)

if TYPE_CHECKING:
    from flowtracer_plugin.trace import FlowTrace

app = typer.Typer(
    help="Trace which tokens carried a language model's answer.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.add_typer(adapters_app)


_MISTAKES = (
    ValueError,
    LookupError,
    TypeError,
    OSError,
    RuntimeError,
    ImportError,
    MemoryError,
)


def main() -> None:
    """Run the command line; mistakes end in one sentence on stderr and exit code 1."""
    try:
        app()
    except _MISTAKES as error:
        if "--traceback" in sys.argv:
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"error: {error}", err=True, fg="red")
    typer.echo("(--traceback shows where it arose)", err=True)
    raise SystemExit(1) from None


def _version(wanted: bool) -> bool:
    if not wanted:
        return False
    from flowtracer_plugin import __version__

    typer.echo(f"flowtracer {__version__}")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


ModelName = Annotated[str, typer.Option(help="Folder of a model, or its id on the hub.")]
Prompt = Annotated[str, typer.Option(help="The question; - reads it from standard input.")]
Response = Annotated[
    str | None, typer.Option(help="An answer to trace; without one the model generates it.")
]
Generate = Annotated[
    bool, typer.Option("--generate", help="Let the model answer (as without --response).")
]
Length = Annotated[int, typer.Option(min=1, help="Length of a generated answer.")]
Sample = Annotated[bool, typer.Option(help="Sample instead of decoding greedily.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Answer = Annotated[
    str,
    typer.Option(
        help="How to find the answer: auto, boxed, answer_tag, hash, phrase, after_think, "
        "last_number, last_word, or re:PATTERN with one group."
    ),
]
Layers = Annotated[
    str, typer.Option(help="middle, early, late, all, middle:5, or numbers such as 4,5,6.")
]
Target = Annotated[
    Literal["answer", "decision"],
    typer.Option(help="Trace to the answer, or to the tokens whose logits choose it."),
]
Question = Annotated[
    Literal["prompt", "all", "user"],
    typer.Option(help="Trace from the prompt, also from its special tokens, or from --prompt."),
]
Mode = Annotated[
    Literal["auto", "dense", "streamed"],
    typer.Option(help="Hold the attention between all pairs of tokens, or compute it in blocks."),
]
Chat = Annotated[
    bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the trace as JSON.")]
PageFile = Annotated[Path | None, typer.Option(help="Write a page to this file.")]
TraceFile = Annotated[Path | None, typer.Option(help="Write the trace to this file.")]


@app.command()
def trace(
    model: ModelName,
    prompt: Prompt,
    response: Response = None,
    generate: Generate = False,
    max_new_tokens: Length = 256,
    sample: Sample = False,
    seed: Seed = 0,
    answer: Answer = "auto",
    layers: Layers = "middle",
    target: Target = "answer",
    question: Question = "prompt",
    mode: Mode = "auto",
    chat: Chat = True,
    device: Device = "auto",
    dtype: Precision = "auto",
    json: AsJson = False,
    html: PageFile = None,
    save: TraceFile = None,
    traceback: Traceback = False,
) -> None:
    """Show which tokens carried the answer.

    For example:

    flowtracer trace --model Qwen/Qwen3-0.6B --prompt "What is 17 * 3?"
    """
    if generate and response is not None:
        raise typer.BadParameter("pass --response or --generate, not both")
    finder = _finder(answer)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    loaded, tokenizer = _load(model, device, dtype)
    import flowtracer_plugin as ft

    tracer = ft.wrap(
        loaded,
        tokenizer,
        layers=_layers(layers),
        question=question,
        target=target,
        answer=finder,
        mode=mode,
    )
    asked: Any = text
    if chat and tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": text}]
    if response is not None:
        result = tracer.trace(asked, response, progress=sys.stderr.isatty())
    else:
        from transformers import set_seed

        set_seed(seed)
        result = tracer.generate(
            asked, max_new_tokens=max_new_tokens, do_sample=sample, progress=sys.stderr.isatty()
        )
    _show(result, as_json=json, html=html, save=save)


@app.command()
def estimate(
    model: ModelName,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompt and response.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts that are traced at once.")] = 1,
    layers: Layers = "middle",
    device: Device = "auto",
    dtype: Precision = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print bytes as JSON.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show what tracing texts of a length would take beside the model, and what is free.

    For example:

    flowtracer estimate --model Qwen/Qwen3-0.6B --tokens 32768
    """
    loaded = load_model(model, device, dtype, wanted="a model")
    import flowtracer_plugin as ft

    found = ft.wrap(loaded, layers=_layers(layers)).estimate(tokens, batch=batch)
    if not json:
        typer.echo(str(found))
        return
    import json as json_module
    from dataclasses import asdict

    typer.echo(json_module.dumps({**asdict(found), "mode": found.mode}))


# TRL's parser knows these options, and importing TRL to list them takes seconds.
@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="--OPTION VALUE ...")] = None,
) -> None:
    """Train a model by GRPO with flow credit; its --help shows every option.

    For example:

    flowtracer train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl
    --prompt_column question --answer_column answer --reward_funcs math_answer
    """
    from flowtracer_plugin.training import main as run

    run([part for part in arguments or () if part != "--traceback"], prog="flowtracer train")


def _show(result: FlowTrace, *, as_json: bool, html: Path | None, save: Path | None) -> None:
    # Files first, and the trace before the page: what was computed must not be lost to a full
    # disk or to a reader of standard output that has gone.
    if save:
        typer.echo(f"wrote {result.save(save)}", err=True)
    if html:
        typer.echo(f"wrote {result.to_html(html)}", err=True)
    if as_json:
        typer.echo(result.to_json())
        return
    from rich.console import Console

    Console().print(result)


def _load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(name)
    return load_model(name, device, dtype, wanted="model and tokenizer"), tokenizer


def _layers(text: str) -> str | list[int]:
    parts = text.split(",")
    return (
        [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else text
    )


def _finder(text: str) -> Any:
    import re

    from flowtracer_plugin.answers import FINDERS, find_answer

    pattern, names = text.removeprefix("re:"), ["auto", *FINDERS]
    if text in names:
        return text
    try:
        if pattern == text:
            raise ValueError(f"wanted {', '.join(names)} or re:PATTERN, found {text!r}")
        find_answer("", re.compile(pattern))
    except (ValueError, re.error) as error:
        raise typer.BadParameter(str(error), param_hint="--answer") from error
    return re.compile(pattern)


if __name__ == "__main__":
    main()
