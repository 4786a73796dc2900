"""The words by which people and models introduce an answer, in several languages.

Each pattern matches up to where the answer begins. Repeats are bounded, so that a search takes
linear time.
"""

from __future__ import annotations

import re


def _any(*patterns: str) -> str:
    return "|".join(patterns)


_COLON = "[:：]"
_MARKS = r"[\s*_]{0,20}"
_KIND = (
    r"(?:(?:final|correct|right|best|exact|numerical|overall|complete|full|simplified)\s{1,3}){0,3}"
)
_IS = r"(?:is|are|was|would be|will be|should be|must be|has to be|equals|becomes|comes out to)"
_ABOUT = r"(?:to|of|for|in|here|choice|option|that|which|we|you|i|then|now)\b[^.!?\n:=]{0,80}?"
_BEFORE_ANSWER = r"(?:the|my|our|your|this|so|thus|hence|therefore,?|and)\s{1,3}"
_LETTER = r"(?=(?:option|answer|choice)?\s?\*{0,2}\(?[A-Ja-j]\b)"

_ENGLISH = _any(
    rf"\b{_BEFORE_ANSWER}{_KIND}answers?(?:\s{{1,3}}{_ABOUT})?\s{{1,3}}{_IS}(?!\w|n't)",
    r"\banswer\s{1,3}(?:is|=)(?!\w|n't)",
    r"\bans(?:wer)?\.?(?:\s(?:choice|key))?\s?(?:\([^()\n]{0,30}\))?"
    rf"[\s*_\"”]{{0,20}}(?:</\w{{1,9}}>)?(?:{_COLON}|=)(?!\s?(?:null|None|\"\"|''|\[\])\s?[,}}])",
    r"^[ \t>]{0,9}(?:#{1,6}[ \t]?)?[*_]{0,3}(?:the )?(?:final |correct )?answer"
    r"[*_]{0,3}[ \t]{0,9}\n",
    r"\A\s{0,9}A:(?=\s)",
)
_OTHER_LANGUAGES = _any(
    r"(?:答案|最终结果|正解|正确选项|正确的选项)[\s*_】\]]{0,9}"
    rf"(?:应该|应当|应|就|便|分别)?(?:选|是|为|為|{_COLON}|=)",
    r"【答案】",
    rf"(?:答え|正解|回答|解答){_MARKS}(?:は|{_COLON})",
    rf"(?:정답|답){_MARKS}(?:은|{_COLON})",
    r"\b(?:Antwort|Lösung|Ergebnis)"
    rf"(?:\s(?:ist|lautet|beträgt)\b{_MARKS}{_COLON}?|{_MARKS}{_COLON})",
    rf"\bréponse(?:\s(?:finale|correcte|exacte))?{_MARKS}(?:est\b|{_COLON})",
    rf"\brespuesta(?:\s(?:final|correcta))?{_MARKS}(?:es\b|{_COLON})",
    rf"\bresposta(?:\s(?:final|correta))?{_MARKS}(?:é\b|{_COLON})",
    rf"\brisposta(?:\s(?:finale|corretta|esatta))?{_MARKS}(?:è\b|{_COLON})",
    rf"\bответ{_MARKS}(?:{_COLON}|[—–]|равен\b)",
    r"(?:\b(?:jawaban|cevap|yanıt|đáp án|odpowiedź|antwoord|svar|vastaus|απάντηση|jibu)"
    r"|الإجابة|الجواب|إجابة|उत्तर|উত্তর|답변|คำตอบ|תשובה)(?: [^\s:：]{1,20}){0,2}"
    rf"{_MARKS}{_COLON}(?=[\s*]{{0,4}}\(?[A-Ja-j]\b)",
)
# After these an answer stands only where it looks like a value.
_WEAK = _any(
    r"\A[\s*_]{0,9}(?:option|choice)\s",
    r"^[\s*_]{0,9}(?:my |final )?(?:choice|selection|selected|verdict|prediction)"
    rf"{_MARKS}{_COLON}",
    r"\b(?:final |end |overall )?(?:result|solution(?:s| set)?(?: (?:to|of) [^.!?\n:]{1,40}?)?"
    r"|outcome|output)\s?[*_]{0,3}"
    rf"(?:{_COLON}|\b{_IS}(?!\w))",
    r"\b(?:correct|right|best)\s(?:option|choice|alternative|letter|statement)\b"
    r"[^.!?\n:]{0,40}?(?:\bis\b|:)",
    rf"\b(?:choose|pick|select|go(?:ing)? with)\s{_LETTER}",
    rf"\b(?:leaves?|left with)\s(?:us with |only )?{_LETTER}",
    r"\bis (?:option|choice)\s(?=\*{0,2}\(?[A-Ja-j\d]\b)",
    r"\[\[(?=[A-J]\]\])",
    r"\banswer[*_]{0,3}\s{0,3}(?:->|→|[-—–])\s",
    r"\b(?:actually|correction|wait|sorry|rather)\b[,:]?\s(?:no, )?"
    r"(?:it's|it is|it should be|that's|make that)\s",
    rf"(?:故|应|應|因此|所以|正确|正確|即|题|題|我|，|^)[选選](?:择|擇|项|項)?(?:是|为)?{_COLON}?",
    rf"^\s{{0,9}}答{_COLON}",
)
CUE = re.compile(
    rf"(?P<sure>{_ENGLISH}|{_OTHER_LANGUAGES})|(?P<weak>{_WEAK})", re.IGNORECASE | re.MULTILINE
)
"""Words such as "the answer is" in the group `sure`; after those in `weak`, only a value counts."""

CHOSEN = re.compile(
    r"(?:\b(?:option|choice|answer|statement)\s\*{0,2}\(?(?P<named>[A-Ja-j])\)?\*{0,2}"
    r"|\((?P<held>[A-Ja-j])\)\*{0,2}|(?<![\w'*])\*{0,2}(?P<bare>[A-J])\*{0,2})[.:]?"
    r"(?:\s[^.!?\n:,]{1,60}?)??\s(?:is|as|must be)\s(?:therefore |thus )?(?:the )?(?:only )?"
    r"(?:correct|right|best|true)\b(?!\s(?:about|that|in|when|if))"
    r"|\b(?:which is|match(?:es|ing)?|corresponds? to|corresponding to)\s"
    r"(?:option|choice|answer)\s\*{0,2}\(?(?P<last>[A-J])\b"
    r"|\b[Oo]nly (?:option|choice|answer|statement)\s\*{0,2}\(?(?P<only>[A-J])\b"
    r"|[选選][项項]\s?\*{0,2}(?P<chinese>[A-J])\*{0,2}\s?(?:是|为|為)?(?:正确|正確|对的)",
)
"""Options chosen afterwards: "(D) is correct", "so E is the best answer", "which is choice D"."""

WRONG = re.compile(
    r"(?:\b(?:wrong|incorrect|naive|naïve|tempting|mistaken|obvious|intuitive|first)\s"
    r"(?:\w{1,20}\s)?"
    r"|\b(?:impossible|unable|not able) to \w{1,20}\s(?:the\s)?)\Z",
    re.IGNORECASE,
)
"""Words before "answer" that do not stand by it."""

NO_ANSWER = re.compile(
    r"(?:not|never|obtained|found|computed|calculated|determined|as follows|below|above|correct|"
    r"right|wrong|incorrect|unknown|unclear|clear|obvious|in (?:the )?form|of the form|based|going|"
    r"to be|that|what|how|why|when|because|due|still|already|supposed|required|needed|placed|"
    r"inside|within|shown|written|given(?! by)|provided|stated|expressed|"
    r"presented|rounded|we|i(?='|\s[a-z]{2})|it|you|they|as|in|on|by|from|only|always|yet|also|hidden|"
    r"different)\b(?![.)])",
    re.IGNORECASE,
)
"""Words after "the answer is" that go on about the answer and do not name it."""

DESCRIPTION = re.compile(
    r"(?:the|a|an|its|their)\b(?:\s\w{1,20}){0,4}?\s?\b(?:remainder|sum|product|difference|number|"
    r"value|total|quotient|ratio|result|area|probability|count|amount|smallest|largest|minimum|"
    r"maximum|same|answer|one|average|length|distance|cost|price|time|coefficient|digits?|integer|"
    r"root)\b",
    re.IGNORECASE,
)
"""The beginning of a description, such as "the remainder of 3 times the sum of the digits"."""

NAMELY = re.compile(
    r"(?:\bwhich (?:is|equals)\b|\bnamely\b|\bi\.e\.,?|=|:|\bis\b(?=\s[^\sa-z])|\bequals\b)\s{0,9}"
)
"""Words that name what was described."""

CONCLUSION = re.compile(
    r"(?:\A|[\n.!?。！？:：>]|\*\*)[\s>*_#✅-]{0,9}(?:and |or )?(?P<word>\b(?:"
    r"so|thus|hence|therefore|consequently|accordingly|in total|altogether|finally|overall|that's|"
    r"that (?:means|leaves|makes)|this (?:means|leaves|gives|makes)|as a result|in conclusion|"
    r"it follows|the (?:total|sum|result)(?: \w{1,20}){0,3}? (?:is|was)|"
    r"putting everything together|we (?:conclude|get|find|obtain)|"
    r"por lo tanto|donc|ainsi|somit|daher|folglich|итак)\b|"
    r"因此|所以|于是|於是|综上|따라서|よって|したがって|ゆえに|合計は)",
    re.IGNORECASE,
)
"""The first words of a sentence that concludes."""

VERB = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|equal to|has|have|had|costs?|takes?|needs?|pays?|earns?|"
    r"makes?|leaves?|gets?|gives|ends? up with|left with|remains?|contains?|requires?|lasts|"
    r"travels|weighs|sells|saves|spends|owes|receives|es|est|ist|beträgt)\b|[=≈：是为為]|:(?=\s)|剩|共)\s{0,9}",
    re.IGNORECASE,
)
"""Words and signs after which a sentence names its value."""

REMARK = re.compile(
    r"(?:^|(?<=[.!?]\s))[\s*_#>(]{0,9}(?:to verify|verification|check\b|checking|to check|"
    r"let me know|let's (?:verify|check)|note\b|hope (?:this|that)|would you like|feel free|"
    r"explanation|reasoning:|steps?:|why\?|further|question:|q:|验算|解析|【解析】)",
    re.IGNORECASE | re.MULTILINE,
)
"""The first words of remarks that follow an answer."""

REASONS = re.compile(
    r"[.!?]\s{1,3}(?:since|so|then|thus|therefore|hence|because|in total)\b", re.IGNORECASE
)
"""The first words of a later sentence that reasons."""

REFUSAL = re.compile(
    r"\bI'?m sorry, but|\bI (?:can't|cannot|can not) (?:help|answer)|"
    r"\bI (?:do not|don't) know the answer|"
    r"\b(?:could|can) you (?:please )?(?:provide|upload|share|send|tell)|"
    r"\bplease (?:provide|upload|share|send)|\bcannot be (?:answered|determined)|"
    r"\banswer[\"']\s?:\s?(?:null|None|\"\"|''|\[\])|"
    r"\bdo not have access|\bimpossible to (?:find|answer|determine|say)",
    re.IGNORECASE,
)
"""Words of a response that gives no answer."""

RUN_ON = re.compile(r"\n\s{0,9}(?:question|q|problem|user|human)\s?\d{0,3}[:：]", re.IGNORECASE)
"""The beginning of a question that a model asks itself."""
