"""The options of commands that go through questions: where they come from, and how they are put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli.loading import Device, Precision, RemoteCode
from flowtracer_plugin.cli.options import writable

if TYPE_CHECKING:
    from flowtracer_plugin.evaluation.examples import Example

_data = partial(typer.Option, rich_help_panel="Data")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Questions, and how they are put to a model."""

    data: Annotated[
        str, typer.Argument(help="A file of JSON lines, another file, or a data set on the hub.")
    ]
    split: Annotated[str, _data(help="Split of a data set.")] = "train"
    prompt_column: Annotated[
        str | None, _data(help="Column of the prompts; by default prompt or question.")
    ] = None
    answer_column: Annotated[
        str | None, _data(help="Column of the right answers; by default answer.")
    ] = None
    prompt_template: Annotated[
        str | None, _data(help="hash, boxed, or a text with {prompt} where the question goes.")
    ] = None
    system_prompt: Annotated[str | None, _data(help="A system message before every prompt.")] = None
    chat: Annotated[
        bool, _data(help="Put prompts into the model's chat template, if it has one.")
    ] = True


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which model goes through the questions, and where what it says is kept."""

    model: Annotated[str, typer.Argument(help="Folder of a model, or its id on the hub.")]
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            callback=writable,
            help="Write results here as they come, and go on from there.",
        ),
    ] = None
    device: Device = "auto"
    dtype: Precision = "auto"
    trust_remote_code: RemoteCode = False
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False


def load_prompts(
    options: DataOptions, tokenizer: Any, limit: int | None, **others: Any
) -> Sequence[Example]:
    """The questions; `others` go to `evaluation_data.load_examples`.

    Raises:
        ValueError, ModuleNotFoundError: As that.
    """
    from flowtracer_plugin.evaluation.examples import load_examples

    return load_examples(
        options.data,
        split=options.split,
        limit=limit,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        template=options.prompt_template,
        system=options.system_prompt,
        chat=options.chat and tokenizer.chat_template is not None,
        **others,
    )
