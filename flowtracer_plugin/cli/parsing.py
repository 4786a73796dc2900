"""Parsers for the texts of options; a text that cannot be read raises typer.BadParameter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from flowtracer_plugin.files import check_file, check_folder

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
"""The kinds of figures. Listed here, because matplotlib takes a second to import."""


@contextmanager
def wrong_usage(option: str) -> Iterator[None]:
    """Turn a `ValueError` into wrong usage of this option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def answer_rule(text: str) -> str | re.Pattern[str]:
    """The name of an answer finder, the answer after `text:`, or the pattern after `re:`."""
    from flowtracer_plugin.text.answers import check_finder, itself, named_answer

    names = answer_rules()
    if text in names or named_answer(text):
        return text
    if not text.startswith("re:"):
        raise typer.BadParameter(
            f"wanted {', '.join(names)}, re:PATTERN, or {itself(text)} for the answer itself, "
            f"found {text!r}"
        )
    try:
        pattern = re.compile(text.removeprefix("re:"))
        check_finder(pattern)
    except (ValueError, re.error) as error:
        raise typer.BadParameter(f"{error}, in {text!r}") from error
    return pattern


def answer_rules() -> list[str]:
    """The names of all answer finders."""
    from flowtracer_plugin.text.answers import FINDERS

    return ["auto", *FINDERS]


def layer_selection(text: str) -> str | list[int]:
    """Layers by name or by number. Only the model can tell whether it has them."""
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
    """Heads as `wrap` takes them. Only the model can tell whether it has them."""
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


def token_place(text: str) -> int | str:
    """The number of a token, or `answer`. Only a trace can tell whether it has it."""
    if text == "answer" or text.isdecimal():
        return text if text == "answer" else int(text)
    raise typer.BadParameter(f"wanted the number of a token, or answer, found {text!r}")


def key_and_value(text: str) -> tuple[str, Any]:
    """A name and its value, which is JSON or else a text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"wanted KEY=VALUE, found {text!r}", param_hint="--template-arg")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


TEMPLATE_ARG = (
    "Argument of the chat template, such as enable_thinking=false; the value is JSON or else a "
    "text. May be given several times."
)
"""What `--template-arg` says of itself."""


def keys_and_values(given: Iterable[str] | None) -> dict[str, Any]:
    """The arguments that are given as KEY=VALUE.

    Raises:
        typer.BadParameter: As `key_and_value`.
    """
    return dict(map(key_and_value, given or ()))


def names(text: str) -> list[str]:
    """The names between commas."""
    return [name.strip() for name in text.split(",")]


def pattern(text: str | None) -> str | None:
    """A regular expression that compiles."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no pattern: {error}") from error
    return text


def writable(path: Path | None) -> Path | None:
    """A file that can be written, checked before the long work rather than after it."""
    if path is not None:
        try:
            check_file(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from error
    return path


def writable_folder(path: Path) -> Path:
    """A folder that can be written, or made."""
    try:
        check_folder(path)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def part(text: str) -> tuple[int, int]:
    """Which of how many parts, such as 3/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= numbers[0] <= numbers[1]:
        raise typer.BadParameter(f"wanted such as 3/8, the third of eight parts, found {text!r}")
    return numbers


def check_separate(outputs: Iterable[Path | None], inputs: Iterable[Path] = ()) -> None:
    """Check that no output would replace another one, or a file that the command reads."""
    read = {os.path.realpath(path) for path in inputs}
    written: set[str] = set()
    for path in outputs:
        if path is None or path == Path(os.devnull):
            continue
        real = os.path.realpath(path)
        if real in read:
            raise typer.BadParameter(
                f"{str(path)!r} is read by this command and would be replaced: name another file"
            )
        if real in written:
            raise typer.BadParameter("two files have the same name: each needs its own")
        written.add(real)


def figure_file(path: Path | None) -> Path | None:
    """A file that can be written, and whose suffix names a kind of figure."""
    if path is not None and path.suffix.lower() not in FIGURE_SUFFIXES:
        raise typer.BadParameter(
            f"wanted .png, .svg or .pdf, found {path.suffix!r} in {path.name!r}"
        )
    return writable(path)
