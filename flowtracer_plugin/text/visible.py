"""Text in which invisible characters are spelled out, and that a stream can show."""

from __future__ import annotations

import re
import sys
import unicodedata

from rich.cells import cell_len

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp"})


def visible(text: str) -> str:
    """`text` with every character spelled out that is invisible or reorders others.

    Line breaks and tabs stay. The result can be encoded as UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _BIDI.sub(_code, _CONTROLS.sub(_picture, text))
    if text and all(unicodedata.category(one) in _UNSEEN for one in text if one not in "\n\t"):
        return re.sub(r"[^\n\t]", _code, text)
    return text


_PLAIN = str.maketrans(
    {
        **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
        **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)),
        **dict.fromkeys("‐‑–—−·", "-"),  # noqa: RUF001
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("“”", '"'),
        **dict(zip("⟨⟩«»→⏎∅…×≤≥", "<><>>/o.x<>", strict=True)),
        "\N{NO-BREAK SPACE}": " ",
    }
)


def encodable(text: str, encoding: str) -> str:
    """`text`, of the same width, with something plain for what the encoding cannot hold."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_encodable(char, encoding) for char in text)
    return text


def shown_on_stdout(text: str) -> str:
    """`text` as standard output can show it."""
    return encodable(text, getattr(sys.stdout, "encoding", None) or "utf-8")


def _encodable(char: str, encoding: str) -> str:
    for shown in (char, char.translate(_PLAIN)):
        try:
            shown.encode(encoding)
        except UnicodeEncodeError:
            continue
        return shown
    return "?" * cell_len(char)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else _code(match)


def _code(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match[0]):04X}⟩"
