"""Text in which invisible characters are spelled out."""

from __future__ import annotations

import re
import unicodedata

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


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else _code(match)


def _code(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match[0]):04X}⟩"
