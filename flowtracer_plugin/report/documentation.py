"""The pages of the documentation as Markdown, which an installed package carries along."""

from __future__ import annotations

from pathlib import Path

_GENERATED = {"api", "command_line", "index"}
"""Pages that show their content only when the site is built."""


class UnknownTopicError(ValueError):
    """The documentation has no such page."""


def topics() -> dict[str, str]:
    """The title of each page, by its topic."""
    return {topic: _title(path.read_text("utf-8")) for topic, path in _pages().items()}


def page(topic: str) -> str:
    """The page of a topic, as Markdown.

    Raises:
        UnknownTopicError: There is none; the message lists the topics.
    """
    pages = _pages()
    if topic.removesuffix(".md") not in pages:
        raise UnknownTopicError(f"wanted {', '.join(pages)}, found {topic!r}")
    return pages[topic.removesuffix(".md")].read_text("utf-8")


def _pages() -> dict[str, Path]:
    """The file of each topic, in an installed package or in a clone of the repository."""
    package = Path(__file__).parents[1]
    if (package / "docs").is_dir():
        found = {path.stem: path for path in (package / "docs").glob("*.md")}
    else:
        clone = package.parent
        found = {path.stem: path for path in (clone / "docs").glob("*.md")}
        found["adapters"] = clone / "adapters" / "README.md"
    return {topic: found[topic] for topic in sorted(found.keys() - _GENERATED)}


def _title(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
