"""Rows of a local file or of a data set on the hub, and their prompts."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flowtracer_plugin.files import parsed

KINDS: Mapping[str, str] = MappingProxyType(
    {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
)
"""The suffixes of files that can be read, and the names that `datasets` has for their formats."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "hash": "{prompt}\nThink step by step. End with a line that holds #### and then the final "
        "answer alone.",
        "boxed": "{prompt}\nThink step by step. Put the final answer into \\boxed{}.",
    }
)
"""Prompt templates by name. They ask for the answer in a form that the finders find."""

_SLOT = "{prompt}"


def load_rows(name: str, split: str, *, config: str | None = None, streaming: bool = False) -> Any:
    """The rows of a local file, of a data set in a folder, or of a data set on the hub.

    A split may be a slice, such as `train[:95%]`; the only split of a local file is `train`.

    Raises:
        ValueError: The file, data set or split does not exist, is empty, or cannot be read.
        ModuleNotFoundError: The package datasets is missing; it comes with the extra `trl`.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    kind = KINDS.get(path.suffix.lower())
    if kind and not path.is_file():
        raise ValueError(f"there is no file {name!r}; wanted a file or a data set")
    source, options = name, dict[str, Any](name=config)
    try:
        if kind:
            source, options = kind, {"data_files": name, **_checked(path, kind, streaming)}
        return load_dataset(source, split=split, streaming=streaming, **options)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"cannot load split {split!r} of {name!r}: {_cause(error, path)}; wanted a "
            ".jsonl, .csv or .parquet file, a folder of such files, or a data set on the hub, and "
            "a split of it or a slice such as train[:95%]"
        ) from error


def _cause(error: Exception, path: Path) -> str:
    """Why `datasets` could not load a data set, in one line."""
    said = _damaged_line(path) or str(error.__cause__ or error)
    first, _, rest = said.partition("\n")
    if first.startswith("Config name is missing"):
        names = rest.partition("\n")[0].rpartition(": ")[2]
        return f"it has the configurations {names}; name one with --dataset-config"
    return first.rstrip(" .")


def _checked(path: Path, kind: str, streaming: bool) -> dict[str, Any]:
    """The options for a file, which is checked: `datasets` names no line, and may even crash."""
    with path.open("rb") as file:
        start = file.read(len(BOM_UTF8))
    if not start:
        raise ValueError(f"there are no rows in {str(path)!r}")
    if kind == "json" and not streaming:
        _check_json(path)
    return {"encoding": "utf-8-sig"} if kind in ("json", "csv") and start == BOM_UTF8 else {}


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines; a byte order mark and empty lines are skipped.

    Raises:
        ValueError: There is no such file, or a line is not an object; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; wanted a JSON Lines file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield json_row(line, number, path)


def json_row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """The row in one line of a file of JSON lines.

    Raises:
        ValueError: The line is not an object; the message names it.
    """
    try:
        row = parsed(line.strip())
    except ValueError as error:
        raise ValueError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} of {str(path)!r} is not an object: {row!r:.80}")
    return row


def _damaged_line(folder: Path) -> str | None:
    """Where a file of the folder is damaged, which `datasets` does not say."""
    files = sorted(folder.rglob("*.json*")) if folder.is_dir() else []
    try:
        for file in files:
            _check_json(file)
    except ValueError as error:
        return str(error)
    return None


def _check_json(path: Path) -> None:
    """Check a file of JSON lines, or of one list."""
    try:
        for _ in json_lines(path):
            pass
    except ValueError as lines:
        try:
            whole = parsed(path.read_bytes())
        except ValueError:
            whole = None
        if not isinstance(whole, list | dict):
            raise ValueError(str(lines)) from None


def with_prompts(
    rows: Any,
    *,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
    template: str | None = None,
    system: str | None = None,
    chat: bool = False,
) -> Any:
    """The rows with a column `prompt` and, if `answer_column` is given, a column `answer`.

    All other columns stay.

    Args:
        rows: Rows from `load_rows`.
        prompt_column: The column with the prompts: texts, or lists of chat messages.
        answer_column: The column that becomes `answer`.
        template: A key of `TEMPLATES`, or a text with `{prompt}` in it; for prompts that are texts.
        system: A system message before the prompt; needs `chat`.
        chat: Whether a text becomes a chat message of the user.

    Raises:
        ValueError: There is no such column or template, or the prompts cannot have a template or a
            system message.
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
    """The names of the columns; those of a stream are read from its first row."""
    return list(rows.column_names or next(iter(rows)))


def _row(
    row: Mapping[str, Any], prompt_column: str, answer_column: str | None, **options: Any
) -> dict[str, Any]:
    answer = {} if answer_column is None else {"answer": row[answer_column]}
    return answer | {"prompt": as_prompt(row[prompt_column], **options)}


def as_prompt(value: Any, template: str | None, system: str | None, chat: bool) -> Any:
    """The prompt for a column's value: unchanged, in a template, or as chat messages if `chat`.

    Raises:
        ValueError: The value is neither a text nor a list of messages, or it is a list of messages
            and there is a template or system message.
    """
    if not isinstance(value, str):
        if not isinstance(value, list):
            raise ValueError(
                f"wanted a text or a list of chat messages as each prompt, found {value!r:.80} in "
                "a row; leave that row out, or name another --prompt-column"
            )
        if template is not None or system is not None:
            raise ValueError(
                "--prompt-template and --system-prompt are for prompts that are texts, and one is "
                f"{value!r:.80}; leave them out for chat messages"
            )
        return value
    # Not str.format, which would interpret the braces of \boxed{}.
    text = value if template is None else template.replace(_SLOT, value)
    if not chat:
        return text
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]
