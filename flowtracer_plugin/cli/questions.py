"""The options that choose a command's questions, and how the model gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flowtracer_plugin.bulk.examples import Example

_data = partial(typer.Option, rich_help_panel="Data")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Questions, and how they are put to a model."""

    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A JSON Lines file, another data file, a folder, or a dataset on the hub.",
        ),
    ]
    split: Annotated[str, _data(help="Split of the dataset.")] = "train"
    prompt_column: Annotated[
        str | None, _data(help="Column of the prompts; by default prompt, question or messages.")
    ] = None
    answer_column: Annotated[
        str | None, _data(help="Column of the right answers; by default answer.")
    ] = None
    prompt_template: Annotated[
        str | None, _data(help="hash, boxed, or a text with {prompt} where the question goes.")
    ] = None
    system_prompt: Annotated[str | None, _data(help="System message before every prompt.")] = None
    chat: Annotated[
        bool, _data(help="Put prompts into the model's chat template, if it has one.")
    ] = True


def load_prompts(
    options: DataOptions, tokenizer: Any, limit: int | None, **others: Any
) -> Sequence[Example]:
    """The questions; `others` are passed to `bulk.examples.load_examples`."""
    from flowtracer_plugin.bulk.examples import load_examples

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
