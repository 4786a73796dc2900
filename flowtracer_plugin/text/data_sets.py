"""Data for a training script: rows of a file or of a data set on the hub, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

KINDS: Mapping[str, str] = MappingProxyType(
    {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
)
"""Files that are read, and how `datasets` calls their kind."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "hash": "{prompt}\nThink step by step. End with a line that holds #### and then the final "
        "answer alone.",
        "boxed": "{prompt}\nThink step by step. Put the final answer into \\boxed{}.",
    }
)
"""Prompt templates by name: they ask for an answer where the finders look for it."""

_SLOT = "{prompt}"


def load_rows(name: str, split: str, *, config: str | None = None, streaming: bool = False) -> Any:
    """Rows of a local file, or of a data set by its folder or its name on the hub.

    A split may be a slice, such as `train[:95%]`; all of a local file is `train`.

    Raises:
        ValueError: There is no such file, data set or split, it is empty, or it cannot be read.
        ModuleNotFoundError: The package datasets is missing; it comes with the extra `trl`.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    kind = KINDS.get(path.suffix.lower())
    if kind and not path.is_file():
        raise ValueError(f"there is no file {name!r}; wanted a file or a data set")
    source, options = (kind, {"data_files": name}) if kind else (name, {"name": config})
    try:
        return load_dataset(source, split=split, streaming=streaming, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = str(error.__cause__ or error).partition("\n")[0].rstrip(" .")
        raise ValueError(
            f"cannot load split {split!r} of {name!r}: {cause}; wanted a .jsonl, .csv or .parquet "
            "file, a folder of such, or a data set on the hub, and a split of it or a slice such "
            "as train[:95%]"
        ) from error


def with_prompts(
    rows: Any,
    *,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    template: str | None = None,
    system: str | None = None,
    chat: bool = False,
) -> Any:
    """The rows with the columns `prompt` and, if it is named, `answer`; the others stay as well.

    Args:
        rows: From `load_rows`.
        prompt_column: Texts, or lists of chat messages.
        answer_column: What becomes `answer`.
        template: A key of `TEMPLATES`, or a text with `{prompt}` in it.
        system: What a first message of the system says; for texts that become messages.
        chat: Whether texts become messages of a user.

    Raises:
        ValueError: There is no such column or template, or a template or system message for prompts
            that cannot have one.
    """
    names = columns(rows)
    for option, name in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if name is not None and name not in names:
            raise ValueError(
                f"the data have no column {name!r}, which --{option} names; "
                f"they have {', '.join(map(repr, names))}"
            )
    text = TEMPLATES.get(template or "", template)
    if text is not None and _SLOT not in text:
        raise ValueError(
            f"--prompt_template must be {', '.join(TEMPLATES)} or a text with {_SLOT} where the "
            f"question goes, got {template!r}"
        )
    if system is not None and not chat:
        raise ValueError(
            "--system_prompt needs chat messages, and this tokenizer has no chat template or "
            "--no_chat was given; write it into --prompt_template"
        )
    options = {
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "template": text,
        "system": system,
        "chat": chat,
    }
    return rows.map(_row, fn_kwargs=options)


def columns(rows: Any) -> list[str]:
    """The names of the columns; a stream says them with its first row."""
    return list(rows.column_names or next(iter(rows)))


def _row(
    row: Mapping[str, Any],
    prompt_column: str,
    answer_column: str | None,
    template: str | None,
    system: str | None,
    chat: bool,
) -> dict[str, Any]:
    made = {} if answer_column is None else {"answer": row[answer_column]}
    return made | {"prompt": as_prompt(row[prompt_column], template, system, chat)}


def as_prompt(asked: Any, template: str | None, system: str | None, chat: bool) -> Any:
    """A prompt out of a column's value: as it is, in a template, or as messages if `chat`.

    Raises:
        ValueError: It is no text and no list of messages, or messages with a template.
    """
    if not isinstance(asked, str):
        if template is not None or system is not None or not isinstance(asked, list):
            raise ValueError(
                "--prompt_template and --system_prompt are for prompts that are texts, and one is "
                f"{asked!r}; leave them out for chat messages, and name another --prompt_column "
                "for anything else"
            )
        return asked
    # Not str.format, which would read the braces of \boxed{}.
    text = asked if template is None else template.replace(_SLOT, asked)
    if not chat:
        return text
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]
