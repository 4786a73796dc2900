"""The value inside a piece of text: without the marks, hedges and reasons around it."""

from __future__ import annotations

import re

from flowtracer_plugin.text.numbers import NUMBER

Span = tuple[int, int]

_OPENERS = {
    "***": "***",
    "**": "**",
    "__": "__",
    "*": "*",
    "_": "_",
    "$$": "$$",
    "$": "$",
    r"\[": r"\]",
    r"\(": r"\)",
    "`": "`",
    '"': '"',
    "'": "'",
    "“": "”",
    "‘": "’",
    "「": "」",
    "『": "』",
    "«": "»",
    "„": "“",
}
_OPENER = re.compile(
    r"(?P<fence>(?:```|~~~)(?:[\w+-]{0,20}[ \t]{0,9}\n)?)"
    r"|\\begin\{(?P<env>(?!\w?(?:matrix|array|cases))\w{1,20}\*?)\}(?:\{[^{}\n]{0,20}\})?"
    r"|(?P<pair>\*{1,3}|__?|\$\$?|\\\[|\\\(|`|[\"“‘「『«„]|'(?=[^'\n]{1,80}'(?:\W|\Z)))"
)
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt|bb)|mbox|bm|boldsymbol|emph)\s?\{"
)
_HEDGES = (
    r"approximately|approx\.|approx\b|about|roughly|around|exactly|precisely|simply|just|nearly|"
    r"almost|indeed|clearly|therefore|thus|hence|then|now|equal to|given by|ca\.|circa|"
    r"donc|environ|also|daher|etwa|por lo tanto|aproximadamente|circa|大约|约为?|大概|約"
)
BULLET = r"•(?=\s)|-(?=\s(?![\d.\\]))|(?<=\n)-(?=\s)"
"""The mark of an item in a list, which is no minus."""
_HTML = r"</?(?:b|strong|i|em|u|p|br|span|code|center|h\d)\s?/?>"
_BEFORE = re.compile(
    rf"(?:{_HTML}|[\s:：=>,，、]|{BULLET}|[€£₹¥₩]|\\\$|→"
    r"|\\(?:displaystyle|therefore|implies|Rightarrow)\b|\\[,;! ]|\\quad\b|&|[≈≃~]"
    rf"|\\approx\b|\\sim\b|(?:{_HEDGES})(?![\w-])\s?)",
    re.IGNORECASE,
)
_SPECIAL = r"<\|[^|<>\s]{1,40}\|>|</s>|<eos>|<end_of_turn>"
_AFTER = re.compile(
    rf"(?:{_SPECIAL}|{_HTML}|[\s.,;:!?…。．，；：！？|~]|\\\\|\\[,; ]|\\quad|&"
    r"|\\blacksquare|\\square|[\u2600-\u27bf\ufe0f\U0001f300-\U0001faff]|です|になります|となります|입니다|이다|である|だ(?=$))$"
)
_REASON = (
    r"because|since|which|who|whose|where|whereas|though|although|even though|while|due to|"
    r"et non|y no|e non|und nicht|nicht|so that|not|and not|rather than|instead|"
    r"as (?=(?:we|it|the|shown|required|desired|expected|there)\b)|assuming|hence|therefore|"
    r"given that|if|when|for which|ya que|porque|car|puisque|denn|weil|da"
)
_COMMENT = (
    r"so|but|or (?:about|approximately|roughly|equivalently|simply|in|around)|"
    r"and (?:the|this|that|we|it|not|so)|with|after|i\.e\.|that|this|it|then|meaning|representing|"
    r"leaving|making"
)
_CLAUSE = re.compile(
    rf"\s{{0,2}}[,，;；(（—–]?\s{{0,2}}(?:(?<!\\)\b(?:{_REASON})\b|因为|因為|而不是|потому)"
    r"|\s\((?!mod\b)(?=[^()]{0,200}(?<!\\)\b[^\W\d_]{3}[^()]{0,200}\s|or\b|≈|=)"
    rf"|[,，;；](?=\s(?:{_COMMENT})\b)",
    re.IGNORECASE,
)
_NOUN = r"(?:option|choice|letter|letra|alternativa|opción|вариант|选项)"
_ARTICLE = r"(?:(?:the|la|le|el|a|die|l['’])\s{0,3})"
_OPTION = re.compile(
    rf"(?:{_ARTICLE}?(?:{_NOUN}|answer|statement)\s*|(?:la|le)\s)?"
    r"(?:\\(?:text|math)(?:bf|rm|it)?\{\s?)?"
    r"(?:[(\[（](?P<a>[A-Ja-j])[)\]）]|(?P<b>[A-Ja-j])[)）]"
    r"|(?P<c>[A-J](?=[.:：．](?!\s?[A-Z]\.)|$)|(?-i:[A-J])(?=、|\]\]|[,，]\s|\s+[-–—]\s)))"
    rf"|{_ARTICLE}?{_NOUN}\s*(?P<d>[A-Ja-j]|\d|[IV]{{1,4}})(?!\w)",
    re.IGNORECASE,
)
_MORE_OPTIONS = re.compile(
    r"\s{0,3}(?:[,，、/&]|and\b|or\b|und\b|和)\s{0,3}(?:and\s)?\*{0,2}[(\[]?[A-J](?![\w'])"
)
_FACTORIAL = re.compile(r"(?<=[\w)}])!(?=[}$\\.]|</\w{5})")
"""What ends a formula, not a sentence: the end of its marks follows."""
_ITEM = r"(?:\$[^\s$][^$\n]{0,80}\$|\\\([^()\n]{1,80}\\\)|\*\*[^*\n]{1,80}\*\*)(?!\d)"
_LISTED = re.compile(
    rf"{_ITEM}(?:(?:,|,? (?:and|or)) {_ITEM}){{1,8}}(?=\W*(?:\n|\Z))"
)  # "$2$ and $3$"
JOINT = re.compile(r"\b(?:and|or)\b")
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>\w{0,6}matrix|array|cases)\}[\s\S]{1,1500}?\\end\{(?P=kind)\}"
)
_QUOTES = "'\"“‘「『«„"  # what stands between them is one value
BLOCK = 2_000  # characters between marks that are looked at


def value_in(text: str, start: int, end: int, *, assigned: bool = False) -> Span | None:
    """The value in `text[start:end]`, which ends where a sentence or a block does.

    Marks of Markdown and LaTeX, quotes, hedges such as "approximately", currency signs in front,
    reasons and remarks after it are left out. Of a calculation such as "3 + 4 = 7" the value is its
    result; with `assigned`, that of "x = 7" is 7, too. Of "(B) Paris" it is the option's letter.
    """
    return _value(text, start, end, assigned=assigned, whole=False)


def _value(text: str, start: int, end: int, *, assigned: bool, whole: bool) -> Span | None:
    start = _skipped(text, start, end)
    matrix = _MATRIX.match(text, start)
    if matrix:
        return matrix.span()
    block = _block(text, start, end)
    if block is not None:
        several = _LISTED.match(text, start, end)
        equal = several and " or " in several[0] and "=" not in several[0]  # "$1/2$ or $0.5$"
        if several and not equal and not has_words(JOINT.sub("", several[0])):
            return several.span()
        inner = _value(text, *block, assigned=assigned, whole=text[start] in _QUOTES)
        if inner is not None:
            return inner
    start = _skipped(text, start + (text[start : start + 1] == "$"), end)  # the price's sign
    end = end if whole else _cut(text, start, end)
    start, end = _trimmed(text, start, end)
    start, end = _unwrapped(text, start, end)
    start, end = _result(text, start, end, assigned)
    end += bool(_FACTORIAL.match(text, end))
    option = _OPTION.match(text, start, end)
    if option and not _MORE_OPTIONS.match(text, option.end(), end):
        return option.span(option.lastgroup or 0)
    return (start, end) if start < end else None


def _skipped(text: str, start: int, end: int) -> int:
    while start < end and (skipped := _BEFORE.match(text, start, end)):
        start = skipped.end()
    return start


def _block(text: str, start: int, end: int) -> Span | None:
    """The inside of the block that begins at `start`: a fence, an environment, or paired marks."""
    opener = _OPENER.match(text, start, end)
    if not opener:
        return None
    close = _closer(opener)
    if opener["pair"] == "$" and text[opener.end() : opener.end() + 1].isspace():
        return None
    limit = min(end, opener.end() + BLOCK)
    closing = text.find(close, opener.end(), limit)
    if opener["pair"] == "$" and closing >= 0:
        before, after = text[closing - 1], text[closing + 1 : closing + 2]
        if before.isspace() or after.isdigit() or "\n" in text[opener.end() : closing]:
            return None  # the signs of two prices
    if closing < 0:
        return (opener.end(), limit) if opener["fence"] or opener["env"] else None
    return opener.end(), closing


def _closer(opener: re.Match[str]) -> str:
    if opener["fence"]:
        return opener["fence"][:3]
    return rf"\end{{{opener['env']}}}" if opener["env"] else _OPENERS[opener["pair"]]


def _cut(text: str, start: int, end: int) -> int:
    """Where the value ends: before a reason, a remark, or the end of marks opened earlier."""
    for mark in ("**", "__", "`", "$$", r"\]", r"\)"):
        if text.count(mark, start, end) % 2:
            end = text.find(mark, start, end)
    clause = _CLAUSE.search(text, start + 1, end)
    end = clause.start() if clause else end
    aside = _ASIDE.search(text, max(start + 1, end - 80), end)
    if aside and (
        _ENDS_IN_WORD.search(text, max(start, aside.start() - 40), aside.start())
        or NUMBER.fullmatch(text, start, aside.start())
    ):
        end = aside.start()
    number = NUMBER.match(text, start, end)
    if number:  # "7, leaving ..." but not "7, 8 and 9"
        after = _AFTER_NUMBER.match(text, number.end(), end)
        end = after.start("rest") if after else end
    return end


_ENDS_IN_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{1,40}\s{0,3}$")  # no command such as \\cup
_ASIDE = re.compile(
    r"(?:\s\((?!(?:p?mod|base)\b|[a-z]\s?[-+^*/]|\\)[^()]{1,70}\)|（[^（）]{1,70}）)\W*$"
)
_AFTER_NUMBER = re.compile(
    r"(?:[ \t]?[^\W\d]{1,30}(?:[ \t][^\W\d]{1,30}){0,2})?(?P<rest>[,;，；] ?[^\W\d]{2})"
)


def _trimmed(text: str, start: int, end: int) -> Span:
    while start < end and (after := _AFTER.search(text, max(start, end - 48), end)):
        end = after.start()
    start = _skipped(text, start, end)
    for mark in ("***", "**", "__", "*", "`", "$"):
        if text.endswith(mark, start, end) and text.count(mark, start, end) == 1:
            return _trimmed(text, start, end - len(mark))
    return start, end


def _unwrapped(text: str, start: int, end: int) -> Span:
    """The inside of a LaTeX command for a font around the whole value."""
    wrapper = _WRAPPER.match(text, start, end)
    if wrapper and text.find("}", wrapper.end(), end) == end - 1:
        return _trimmed(text, wrapper.end(), end - 1)
    return start, end


_EQUALS = re.compile(r"(?<![<>!:=≤≥≠\\])\s{0,9}&?=\s{0,9}(?!=)")
_SEVERAL = re.compile(
    r"(?:(?<!\\)[,;]|\b(?:and|or)\b|\\(?:text|quad|wedge|vee|lor|land)\b[^=]{0,20}?)\s{0,3}"
    r"\\?[a-zA-Z](?:_?\{?\w\}?)?\s?&?="
)
_LETTERS = re.compile(r"\\[a-zA-Z]+|[^\W\d_]")


def _result(text: str, start: int, end: int, assigned: bool) -> Span:
    """The right side of a chain of equations, or of one whose left side is a calculation."""
    signs = list(_EQUALS.finditer(text, start, end))
    if not signs:
        return start, end
    left = text[start : signs[0].start()]
    names = [letters[0] for letters in _LETTERS.finditer(left)]
    calculated = not any(len(name) == 1 for name in names) and any(c.isdigit() for c in left)
    if len(signs) > 1 and _SEVERAL.search(text, signs[0].end(), signs[-1].end()):
        return start, end  # "x = 1, y = 2" is no chain
    if len(signs) > 1 or calculated or assigned:
        return _trimmed(text, signs[-1].end(), end)
    return start, end


_UNIT = r"(?:[^\W\d]|[%°$€£/²³]){1,20}"
_QUANTITY = re.compile(rf"{NUMBER.pattern}(?:[ \t]?{_UNIT}(?:[ \t]{_UNIT}){{0,2}})?", re.IGNORECASE)
_WORD = re.compile(r"\\[a-zA-Z]+|[^\W\d_]{2,}")
_FUNCTIONS = frozenset(["sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi"])
_FUNCTIONS |= {"mod", "gcd", "lcm", "max", "min"}


def is_quantity(said: str) -> bool:
    """Whether a text is a number with at most three words for its unit."""
    return bool(_QUANTITY.fullmatch(said))


def has_words(said: str) -> bool:
    """Whether a text has words of a language, not only signs, numbers and names of functions."""
    words = (word[0] for word in _WORD.finditer(said))
    return any(not word.startswith("\\") and word.lower() not in _FUNCTIONS for word in words)
