r"""One spelling for the many ways of writing an answer: Unicode, LaTeX, Markdown and plain text."""

# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata

# A line a spelling, and the signs that are spelled so.
_SIGNS = {
    sign: f"\\{spelling} " if spelling.isalpha() and len(spelling) > 1 else spelling
    for spelling, signs in (
        ("-", "−‐‑‒–—﹣－"),
        (" ", "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"),
        ("", "\u200b\u200c\u200d\u2060\ufeff"),
        ("cdot", "×⋅·∙∗"),
        ("'", "’‘′ʼ"),
        ('"', "“”„«»"),
        ("/", "÷⁄∕"),
        ("°", "º˚"),
        ("|", "∣"),
        (".", "。"),
        (",", "、"),
        ("u", "µ"),
        ("°C", "℃"),
        ("°F", "℉"),
        ("...", "…"),
        ("sqrt", "√"),
        ("infty", "∞"),
        ("pm", "±"),
        ("mp", "∓"),
        ("le", "≤⩽"),
        ("ge", "≥⩾"),
        ("ne", "≠"),
        ("approx", "≈"),
        ("cup", "∪"),
        ("cap", "∩"),
        ("in", "∈"),
        ("emptyset", "∅"),
        ("int", "∫"),
        ("sum", "∑"),
        ("prod", "∏"),
        ("lor", "∨"),
        ("land", "∧"),
        ("mu", "μ"),
        ("lambda", "λ"),
        ("Delta", "Δ"),
        ("Sigma", "Σ"),
        ("Omega", "Ω"),
        ("Pi", "Π"),
        ("phi", "ϕ"),
    )
    for sign in signs
} | {"ℝ": r"\R "}
_GREEK = {
    chr(code): rf"\{name.rpartition(' ')[2].lower()} "
    for code in range(0x3B1, 0x3CA)
    if (name := unicodedata.name(chr(code))).startswith("GREEK SMALL LETTER ")
    and name.count(" ") == 3
}
_TABLE = str.maketrans(_GREEK | _SIGNS)

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉ₙₖᵢ]+")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|emph|"
    r"operatorname\*?|boxed|fbox|bm|boldsymbol|displaystyle|ensuremath|mathnormal)\s*\{([^{}]*)\}"
)
_ROOM = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|quad|qquad|(?:hspace|phantom)\{[^{}]*\}|space|thinspace|enspace)|~"
)
_NOTHING = re.compile(
    r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])"
)
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-zA-Z])\s*")
_ARGUMENT = re.compile(r"(\d|[a-zA-Z]|\\[a-zA-Z]+)")
_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\(?:degree|circ)(?![a-zA-Z])", "°"),
        (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=|\\not\s*=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:approx|simeq|thickapprox|doteq)(?![a-zA-Z])|~=", r"\\approx "),
        (r"\\(?:times|ast)(?![a-zA-Z])", r"\\cdot "),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\+/-|\+-(?=\s*[\d\\])", r"\\pm "),
        (r"\\langle(?![a-zA-Z])|⟨", "("),
        (r"\\rangle(?![a-zA-Z])|⟩", ")"),
        (r"\\\\\[\d+(?:pt|mm|cm|em|ex)\]", r"\\\\"),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"\\(?:lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rparen)(?![a-zA-Z])", ")"),
        (r"\\(?:[lr]?vert|mid)(?![a-zA-Z])", "|"),
        (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:R|Reals?)(?![a-zA-Z])|\\mathbb\s*R|\\mathbf\s*R", r"\\mathbb{R}"),
        (r"\{((?:[^{}\\]|\\(?!choose))*+)\\choose\s*+([^{}]*+)\}", r"\\binom{\1}{\2}"),
        (r"\\(vec|bar|hat|tilde|overline)\s+([a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}"),
        (r"(?<=\d) x (?=\d)", r" \\cdot "),
        (r"^half an?(?= )", "1/2"),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
        (r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])", "..."),
        (r"\\(?:colon|ratio)(?![a-zA-Z])", ":"),
        (r"\{\s*([,.:])\s*\}", r"\1"),
        (r"\\([%#&_])", r"\1"),
        (r"\\var(epsilon|phi|theta|rho)(?![a-zA-Z])", r"\\\1"),
        (r"(?<![a-zA-Z\\])(?:infinity|oo|inf)(?![a-zA-Z])", r"\\infty "),
    )
]


def spelled(text: str) -> str:
    r"""The answer with one spelling for each sign: no LaTeX around words, no Markdown, no `$`.

    Example:
        >>> spelled("$\\text{about } 2½ × 10³.$"), spelled("**x − 1**")
        ('about 2\\frac{1}{2} \\cdot 10^{3}', 'x - 1')
    """
    text = _LOWERED.sub(lambda found: f"_{{{_plain(found[0])}}}", text)
    text = _RAISED.sub(lambda found: f"^{{{_plain(found[0])}}}", text)
    text = "".join(map(_character, text)).translate(_TABLE)
    text = _without_marks(text)
    text = _NOTHING.sub("", _ROOM.sub(" ", text.replace(r"\\!", "")))
    for _ in range(4):  # wrappers in wrappers
        text, found = _WRAPPED.subn(r" \1 ", text)
        if not found:
            break
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    text = _with_braces(text)
    return _trimmed(" ".join(text.split()))


def compact(text: str) -> str:
    """The spelled answer without spaces beside signs, for comparing it as it stands."""
    return re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text)


def _plain(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs).replace("\u2212", "-")


def _character(sign: str) -> str:
    if sign.isascii() or sign in _SIGNS or sign in _GREEK:
        return sign
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return unicodedata.normalize("NFKC", sign)


def _without_marks(text: str) -> str:
    """The text without the marks of mathematics and of Markdown around it."""
    text = re.sub(r"\\[\[\]()]", " ", text).strip()
    text = text.replace(r"\$", "\ue000")
    # An opening sign and a closing one, which no amount follows: `$5$`, not `$5 and $6`.
    text = re.sub(r"\$\$", "$", text)
    text = re.sub(r"\$([^$]*[^$\s]|[^$\s])\s*\$(?!\d)", r"\1", text)
    text = text.replace("\ue000", "$")
    text = re.sub(r"(?:(?<=\s)|^)(\*\*|__|`+)(?=\S)([^*`]+?)\1", r"\2", text)
    text = re.sub(r"^\*(?=\S)([^*]+)\*$", r"\1", text)
    return text.replace("**", "^").replace("*", r" \cdot ")


def _with_braces(text: str) -> str:
    r"""Fractions and roots with braces around each part: `\frac12` as `\frac{1}{2}`."""
    first, *others = _FRACTION.sub(r"\\frac", text).split(r"\frac")
    text = r"\frac".join([first, *map(_braced, others)])
    return re.sub(r"\\sqrt\s*(\d+|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}", text)


def _braced(text: str) -> str:
    upper, rest = _argument(text)
    lower, rest = _argument(rest)
    return f"{upper}{lower}{rest}"


def _argument(text: str) -> tuple[str, str]:
    """The first argument in braces, and what follows it."""
    text = text.lstrip()
    if text.startswith("{"):
        end = closing(text, 0)
        return text[:end], text[end:]
    if found := _ARGUMENT.match(text):
        return f"{{{found[1]}}}", text[found.end() :]
    return "", text


def closing(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`; the end of the text without it."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth and len(found[0]) == 1:
            return found.end()
    return len(text)


_CUE = re.compile(  # "the answer is", "it equals", but no "none of them is"
    r"^(?:so|thus|hence|therefore)?,?\s*(?:(?:the|its|this|it)\b(?!.*\b(?:not|no|none|never|nor)\b)"
    r"[^=<>,;]{0,60}?\s?(?:\b(?:is|are|equals|be)\b(?:\s+equal\s+to\b)?\s*:?|:)|[a-z]\s+is\s)\s*"
    r"|^(?:final\s+|correct\s+|right\s+)?answer\s*(?:is|:)\s*:?\s*",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?:,?\s(?:because|since)\b|,\swhere\b|\s\((?!mod|base|or\b|and\b|not\b)(?=[a-zA-Z]{3})"
    r"[a-zA-Z ,.'-]++\)$).*",
    re.IGNORECASE | re.DOTALL,
)
_MARK = r"(?:(?<!\\)[,;:?\\]|(?<!\.)\.|(?<![\d)}a-z])!)"
_ENDING = re.compile(rf"(?<!{_MARK}){_MARK}++$")


def _trimmed(text: str) -> str:
    """The text without the marks of a sentence around it; `5!` and `...` stay."""
    while True:
        shorter = _ENDING.sub("", text.strip())
        if len(shorter) > 1 and shorter[0] == shorter[-1] and shorter[0] in "\"'`":
            shorter = shorter[1:-1]
        shorter = _REASON.sub("", _CUE.sub("", shorter)) or shorter
        shorter = re.sub(r"^(?:(?:\\approx|=)\s*)+", "", shorter)
        if shorter == text:
            return text
        text = shorter
