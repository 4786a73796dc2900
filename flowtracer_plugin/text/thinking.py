"""Where a response thinks, and which parts of it are meant for the reader.

Reasoning models write their thoughts between marks of their own. What stands there is no answer:
a model tries several, and may reject all of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class ThinkingMark(NamedTuple):
    """Regular expressions for the marks around thoughts, and the models that write them."""

    opens: str
    closes: str
    written_by: str


_TAG = (
    r"(?:think(?:ing)?(?:_process)?|thoughts?|reason(?:ing)?|reflection|scratchpad|\w+:think"
    r"|longcat_think)"
)

THINKING_MARKS = (
    ThinkingMark(
        rf"<{_TAG}(?: [^<>\n]{{0,60}})?>",
        rf"</{_TAG}>",
        "<think>: DeepSeek-R1, Qwen 3, QwQ, GLM 4.5, Phi-4-reasoning, MiniMax M2, Olmo 3 and many; "
        "<thought>: EXAONE Deep, Marco-o1; <seed:think>: Seed-OSS; <mm:think>: MiniMax M3; "
        "<longcat_think>: LongCat; <thinking>, <reasoning>, <reason>, <reflection>, <scratchpad>: "
        "formats asked for by prompts, such as Reflection 70B's and the first GRPO recipes'",
    ),
    ThinkingMark(r"\[THINK\]", r"\[/THINK\]", "Mistral's Magistral and later models"),
    ThinkingMark(
        r"<\|channel\|>(?:analysis|commentary)\b[^<\n]{0,80}(?:<\|constrain\|>\w{0,20})?<\|message\|>",
        r"<\|channel\|>final\b[^<\n]{0,80}<\|message\|>",
        "OpenAI's gpt-oss, in its format harmony",
    ),
    ThinkingMark(
        r"\A\s*analysis(?=[A-Z])",
        r"assistantfinal",
        "gpt-oss, decoded without its special tokens",
    ),
    ThinkingMark(r"<\|channel>thought\b", r"<channel\|>", "Gemma 4"),
    ThinkingMark(r"<unused94>(?:thought\b)?", r"<unused95>", "MedGemma 1.5"),
    ThinkingMark(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", "Cohere's Command A Reasoning"),
    ThinkingMark(r"<\|inner_prefix\|>", r"<\|inner_suffix\|>", "Apertus"),
    ThinkingMark(r"◁think▷", r"◁/think▷", "Kimi-VL-Thinking"),
    ThinkingMark(
        r"<\|open\|>think<\|sep\|>",
        r"<\|close\|>think<\|sep\|>|<\|open\|>response<\|sep\|>",
        "Kimi K3",
    ),
    ThinkingMark(
        r"<\|begin_of_thought\|>",
        r"<\|end_of_thought\|>|<\|begin_of_solution\|>",
        "OpenThinker, Sky-T1",
    ),
    ThinkingMark(r"<\|plamo:begin_think:plamo\|>", r"<\|plamo:end_think:plamo\|>", "PLaMo 3"),
    ThinkingMark(r"\[unused16\]", r"\[unused17\]", "openPangu"),
    ThinkingMark(r"<\|im_start\|>think\b", r"<\|im_start\|>answer\b", "s1"),
    ThinkingMark(
        r"to=self<\|message\|>", r"(?:to=user|<\|start\|>assistant)<\|message\|>", "Muse Glimmer"
    ),
    ThinkingMark(r"^Thinking\.\.\.\s*$", r"\.\.\.done thinking\.", "Ollama's command line"),
    ThinkingMark(
        r"\bHere(?: is|'s) my thought process:", r"\bHere(?: is|'s) my response:", "Granite 3.2"
    ),
)
"""The marks that `visible_parts` knows. Models are named as in vLLM's and SGLang's parsers of
reasoning (https://docs.vllm.ai/en/latest/features/reasoning_outputs), the rest in model cards.
"""

# Marks around the response itself: it begins where thinking ends, and nothing of it follows.
_RESPONSE_OPENS = r"<response>|<\|START_RESPONSE\|>"
_RESPONSE_ENDS = (
    r"</response>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|close\|>response<\|sep\|>"
)

_MARK = re.compile(
    rf"(?P<opens>{'|'.join(mark.opens for mark in THINKING_MARKS)})"
    rf"|(?P<closes>{'|'.join(mark.closes for mark in THINKING_MARKS)}|{_RESPONSE_OPENS})"
    rf"|(?P<ends>{_RESPONSE_ENDS})",
    re.IGNORECASE | re.MULTILINE,
)


class VisiblePart(NamedTuple):
    """The characters `[start, end)` of a response, meant for the reader.

    `after_thinking` says whether they follow thinking, and the response does not end in thinking.
    """

    start: int
    end: int
    after_thinking: bool


def visible_parts(text: str, *, in_thinking: bool = False) -> list[VisiblePart]:
    """The parts of a response outside its thinking, in order; thinking may have no end.

    Args:
        text: The response.
        in_thinking: Whether the prompt has opened the thinking, as many chat templates do. Without
            it, what precedes an end of thinking that nothing opened is thinking, too.

    Example:
        >>> visible_parts("<think>3 + 4</think>7")
        [VisiblePart(start=20, end=21, after_thinking=True)]
    """
    parts: list[VisiblePart] = []
    start, after, thinking = 0, False, in_thinking
    for mark in _MARK.finditer(text):
        if mark["closes"]:
            if not thinking:  # its opener is in the prompt
                parts.clear()
            start, after, thinking = mark.end(), True, False
        elif not thinking:
            parts.append(VisiblePart(start, mark.start(), after))
            start, thinking = mark.end(), bool(mark["opens"])
    if thinking:  # that never ends: what precedes it is no final answer
        parts = [part._replace(after_thinking=False) for part in parts]
    else:
        parts.append(VisiblePart(start, len(text), after))
    return [part for part in parts if part.start < part.end]


def mark_places(text: str) -> list[tuple[int, int]]:
    """The characters `[start, end)` of every mark in the text."""
    return [mark.span() for mark in _MARK.finditer(text)]


def leaves_thinking_open(prompt: str) -> bool:
    r"""Whether the prompt ends in thinking that it has opened, so that the response thinks first.

    Example:
        >>> leaves_thinking_open("<|user|>3 + 4?<|assistant|><think>\n")
        True
    """
    tail = prompt[-_TAIL:].rstrip()
    return any(mark["opens"] and mark.end() == len(tail) for mark in _MARK.finditer(tail))


_TAIL = 200  # characters, more than the longest mark
