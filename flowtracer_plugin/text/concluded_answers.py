"""Answers that a text does not announce: "So there are 7 apples left", or its last formula."""

from __future__ import annotations

import re

from flowtracer_plugin.text.cues import CONCLUSION, NO_ANSWER, REASONS, REMARK, VERB
from flowtracer_plugin.text.numbers import NUMBER
from flowtracer_plugin.text.sentences import SENTENCE, sentence_end
from flowtracer_plugin.text.stated_answers import LAST
from flowtracer_plugin.text.values import Span, has_words, is_quantity, value_in

_EMPHASISED = re.compile(
    r"\*\*(?P<bold>[^*\n]{1,80})\*\*|`(?P<code>[^`\n]{1,80})`"
    r"|(?<![*\w])\*(?P<italic>[^*\s][^*\n]{0,60})\*(?![*\w])"
)
_MATH = re.compile(
    r"\$\$(?P<display>(?:(?!\$\$)[\s\S]){1,600})\$\$"
    r"|\$(?P<inline>[^\s$\n](?:[^$\n]{0,300}[^\s$\n])?)\$(?!\d)"
    r"|\\\((?P<round>(?:(?!\\[()])[^\n]){1,300})\\\)"
    r"|\\\[(?P<square>(?:(?!\\[\[\]])[\s\S]){1,600})\\\]"
)
_DISPLAY = re.compile(r"[\s:]{0,9}(?:\$\$|\\\[)")
_RELATIVE = re.compile(r",\s(?:which|where|since|because|so|not|or|and not)\b", re.IGNORECASE)
_PREDICATE = re.compile(
    r"\b(?:is|are|was|were|be)\s"
    r"(?!(?:not|it|this|that|done|finished|ready|able|left|correct|possible)\b)"
    r"(?P<value>\w[\w'-]{0,30}(?:\s\w[\w'-]{0,30}){0,2})\W{0,9}\Z",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"[\s*_(\[]{0,9}(?:(?P<option>[A-J](?:(?=[)\]])|(?=[.:][\s*]))"
    r"|(?-i:[A-HJ])(?=[*_]{0,3}(?: [-–—] |\n|\s{0,9}\Z)))"
    r"|(?P<word>yes|no|true|false)[*]{0,2}(?:[,.!;]|\Z)(?![^\n]{0,400}\n))",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"(?:\n|\A|, )(?:[Tt]he|This|That|My)\b[^.!?\n]{1,80}?\b(?:is|was|will be) "
    r"([A-Z][\w'-]{1,30}(?: [A-Z][\w'-]{1,30}){0,2}|true|false|yes|no)\W{0,9}\Z"
    r"|\b(?:is|it's) \W{0,4}([A-J]|true|false)\W{0,9}\Z"
    r"|\b(?:has|have|is|are) (no (?:real |integer )?solutions?)\W{0,9}\Z"
)
_OTHER_OPTIONS = re.compile(r"\n[\s*_(\[-]{0,9}[A-J][)\].:]")


def concluded_answer(text: str) -> Span | None:
    """The value of the last sentence that concludes, such as "So there are 7 apples left".

    Without such a sentence: the option, yes or no with which the text begins, what is bold, or the
    value of the last line before remarks such as "To verify: ...".
    """
    body = _without_remarks(text)
    last = max(body.rfind("\n\n"), 0)
    open_end = not NUMBER.search(body, last)
    for conclusion in reversed(list(CONCLUSION.finditer(body))[-LAST:]):
        if conclusion.start("word") < last and not (open_end and "=" not in body[last:]):
            break
        value = _value_of_sentence(body, conclusion.end())
        if value:
            return value
    leading = _LEADING.match(text)
    if leading and not _OTHER_OPTIONS.search(text, leading.end()):
        return leading.span(leading.lastgroup or 0)
    named = _NAMED.search(body)
    if named and open_end:
        return named.span(named.lastindex or 0)
    found = _emphasised_value(body)
    if found or len(body) == len(text.rstrip()):
        return found
    return _last_value(body, body.rfind("\n") + 1, len(body))


def first_sentence_answer(text: str) -> Span | None:
    """The number in the first sentence of a short text that neither calculates nor reasons."""
    stripped = text.strip()
    if not stripped or len(stripped) > SENTENCE or "\n\n" in stripped or "=" in stripped:
        return None
    if REASONS.search(stripped):
        return None
    start = text.index(stripped)
    return _last_value(text, start, sentence_end(text, start, start + len(stripped)))


def formula_answer(text: str) -> Span | None:
    """The text if it is only an expression or a block, or its last formula before any number."""
    whole = text.strip()
    if r"\boxed" in whole:  # it is empty
        return None
    fence = whole[:3]
    if fence in ("```", "~~~") and whole.endswith(fence) and whole.count(fence) == 2:
        return value_in(text, text.index(whole), len(text))
    if 0 < len(whole) <= _EXPRESSION and "\n" not in whole and not has_words(whole):
        start = text.index(whole)
        value = value_in(text, start, start + len(whole), assigned=True)
        said = text[slice(*value)] if value else ""
        if re.search(r"[(\[{^\\a-zA-Z∞]", said) and not _WITH_UNIT.match(said):
            return value
    formulas = [match for match in _MATH.finditer(text) if r"\boxed" not in match[0]]
    if not formulas or NUMBER.search(text, formulas[-1].end()):
        return None
    return _formula_value(text, formulas[-1])


_EXPRESSION = 120  # characters
_WITH_UNIT = re.compile(r"\A\d++\W?[a-zA-Z]{1,3}\Z")


def _without_remarks(text: str) -> str:
    firsts = [match.start() for match in (NUMBER.search(text), _EMPHASISED.search(text)) if match]
    if not firsts:
        return text.rstrip()
    remark = REMARK.search(text, min(firsts))
    return text[: remark.start() if remark else None].rstrip()


def _value_of_sentence(text: str, start: int) -> Span | None:
    end = sentence_end(text, start, len(text))
    display = _DISPLAY.match(text, end)
    if display:  # a displayed formula ends the sentence
        end = min(len(text), display.end() + 600)
    for strong in reversed(list(_EMPHASISED.finditer(text, start, end))):
        if strong[strong.lastgroup or 0].strip()[-1:] not in ":：":
            return value_in(text, *strong.span(strong.lastgroup or 0), assigned=True)
    clause = _RELATIVE.search(text, start, end)
    end = clause.start() if clause else end
    return _last_value(text, start, end) or _short_predicate(text, start, end)


def _short_predicate(text: str, start: int, end: int) -> Span | None:
    """The last words of a whole sentence such as "So the statement is false."."""
    if text[end : end + 1] not in tuple(".!。！"):
        return None
    predicate = _PREDICATE.search(text[:end], start)
    if predicate is None or NO_ANSWER.match(text, *predicate.span("value")):
        return None
    return predicate.span("value")


def _last_value(text: str, start: int, end: int) -> Span | None:
    """The first value after the last verb that has one, or the last number."""
    verbs = list(VERB.finditer(text, start, end))
    for place, verb in reversed(list(enumerate(verbs))):
        if place and verb[0].strip() == ":" and NUMBER.search(text, verbs[0].end(), verb.start()):
            continue  # what follows "There are 7 of them:" lists them
        first = _first_value(text, verb.end(), end)
        if first:
            return first
    numbers = list(NUMBER.finditer(text, start, end))
    return numbers[-1].span(1) if numbers else None


def _first_value(text: str, start: int, end: int) -> Span | None:
    rest = value_in(text, start, end, assigned=True)
    said = text[slice(*rest)] if rest else ""
    if not has_words(said) and any(char.isdigit() for char in said):
        return rest
    formula, number = _MATH.search(text, start, end), NUMBER.search(text, start, end)
    if formula and (not number or formula.start() <= number.start()):
        return _formula_value(text, formula)
    return number.span(1) if number else None


def _formula_value(text: str, formula: re.Match[str]) -> Span | None:
    value = value_in(text, *formula.span(formula.lastgroup or 0), assigned=True)
    said = text[slice(*value)] if value else ""
    return value if re.search(r"\d|\\pi|\\sqrt|\\infty|∅|\\emptyset", said) else None


def _emphasised_value(text: str) -> Span | None:
    """The last number in bold or as code, or any emphasised words in a text without numbers."""
    has_numbers = NUMBER.search(text)
    for match in reversed(list(_EMPHASISED.finditer(text))[-LAST:]):
        inside = match.span(match.lastgroup or 0)
        value = value_in(text, *inside, assigned=True)
        if value is None or text[inside[1] - 1] in ":：":
            continue
        if not has_numbers:
            return value
        if match.lastgroup != "italic" and is_quantity(text[slice(*value)]):
            number = NUMBER.match(text, *value)
            return number.span(1) if number else value
    return None
