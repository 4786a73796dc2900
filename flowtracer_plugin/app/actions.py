"""What the app does: let the model answer, trace a response, show its page, knock lines out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from markupsafe import escape
from torch import nn

from flowtracer_plugin.evaluation import knockout
from flowtracer_plugin.options import preset_over
from flowtracer_plugin.report.carried import is_template, nats
from flowtracer_plugin.report.display import percent, shorten, show
from flowtracer_plugin.report.drawing import step_row
from flowtracer_plugin.report.pages.trace_page import render_page
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.encoding import Prompt, user_text
from flowtracer_plugin.text.spans import AnswerNotFoundError, shown_text
from flowtracer_plugin.text.visible import visible
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

_HEIGHT = 900  # of a page's frame, in pixels


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered.

    Attributes:
        text: The response without the tokens that end it.
        prompt_ids: The tokens of the prompt.
        ids: The tokens that the model chose; those of the text may be others.
    """

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line or sentence of a text that can be knocked out.

    Attributes:
        number: Its number among the steps of the trace's page.
        tokens: Its tokens of the question and the response before the answer.
        text: Their text on one line, with invisible characters spelled out.
    """

    number: int
    tokens: Bool[np.ndarray, " token"]
    text: str


@dataclass(frozen=True, kw_only=True)
class KnockedOut:
    """What becomes of an answer without some lines.

    Attributes:
        before: The probability of the whole answer with all lines.
        after: Its probability without them.
        drop: The fall of its mean log-probability, in nats a token.
        flipped: Whether the model would choose another token somewhere in the answer.
    """

    before: float
    after: float
    drop: float
    flipped: bool


def answer(
    tracer: FlowTracer, prompt: str, *, chat: bool = True, max_new_tokens: int = 256
) -> Answer:
    """The model's own response to `prompt`, the likeliest token each time.

    Raises:
        ValueError: The prompt is empty or too long.
    """
    asked = as_prompt(tracer, prompt, chat=chat)
    prompt_ids, ids = tracer.sample(asked, max_new_tokens=max_new_tokens)
    text = shown_text(tracer.require_tokenizer(), ids).text
    return Answer(text=text, prompt_ids=tuple(prompt_ids), ids=tuple(ids))


def trace(
    tracer: FlowTracer,
    prompt: str,
    response: str | Answer,
    *,
    preset: str,
    finder: str = "auto",
    words: str = "",
    chat: bool = True,
) -> FlowTrace:
    """The trace of a response to `prompt`.

    Args:
        tracer: The tracer; its layers and its question stay where the preset sets none.
        prompt: The text of the prompt.
        response: The response, as a text or as the model's answer, whose own tokens are traced.
        preset: The preset of the flow.
        finder: The name of the answer finder.
        words: The answer itself, which is looked for in place of the finder's; its last place
            counts.
        chat: Whether the prompt goes into the model's chat template, if it has one.

    Raises:
        AnswerNotFoundError: The response has no answer.
        TooLittleMemoryError: The trace would not fit in the free memory.
        ValueError: Prompt or response is empty or too long, there is no such preset or finder, or
            no token reaches the answer.
    """
    options = preset_over(preset, tracer.chosen)
    chosen = re.compile(f"({re.escape(words.strip())})") if words.strip() else finder
    tokenizer = tracer.require_tokenizer()
    own = FlowTracer(tracer.reader, tokenizer, options, chosen, tracer.mode, tracer.chosen)
    asked = as_prompt(tracer, prompt, chat=chat)
    if isinstance(response, str):
        return own.trace(asked, response)
    found = own.find(response.prompt_ids, response.ids, user_text=user_text(asked))
    return own.trace_found([found])[0]


def trace_html(trace: TraceData) -> str:
    """The page of a trace in a frame, which can neither reach nor change what is around it."""
    return (
        '<iframe sandbox="allow-scripts" allow="clipboard-write" title="Trace" '
        f'srcdoc="{inert(render_page(trace))}" '
        f'style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'
    )


def lines(trace: TraceData) -> tuple[Line, ...]:
    """The lines and sentences before the answer that can be knocked out, in reading order.

    A line that holds the answer ends before it. Lines of the chat template are left out.
    """
    regions, place = np.array(trace.spans.regions), np.arange(len(trace.tokens))
    told = np.isin(regions, ("question", "response")) & (place < trace.spans.answer.argmax())
    shown = show(trace)
    found = []
    for index, step in enumerate(shown.steps.steps):
        tokens, row = told & (step.start <= place) & (place < step.stop), step_row(shown, index)
        pieces = [trace.tokens[token] for token in tokens.nonzero()[0]]
        text = visible(" ".join("".join(pieces).split()))
        if text and not is_template(shown, row):
            found.append(Line(number=row.number, tokens=tokens, text=text))
    return tuple(found)


def knock_out(model: nn.Module, trace: TraceData, numbers: Iterable[int] = ()) -> KnockedOut:
    """The answer's probability if no later token can attend to the lines with these numbers.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: There is no such line.
    """
    known = {line.number: line.tokens for line in lines(trace)}
    wanted = set(numbers)
    if strangers := sorted(wanted - known.keys()):
        raise ValueError(f"wanted lines among {sorted(known)}, found {strangers}")
    hidden = np.zeros((1, len(trace.tokens)), bool)
    for number in wanted:
        hidden[0] |= known[number]
    found = knockout.knock_out(
        model,
        torch.from_numpy(trace.token_ids),
        torch.from_numpy(trace.spans.answer),
        torch.from_numpy(hidden),
    )
    drop, size = float(found.drop[0]), int(trace.spans.answer.sum())
    return KnockedOut(
        before=float(np.exp(found.log_prob * size)),
        after=float(np.exp((found.log_prob - drop) * size)),
        drop=drop,
        flipped=bool(found.flipped[0]),
    )


def said(trace: TraceData, found: KnockedOut, numbers: Iterable[int] = ()) -> str:
    """What happened to the answer, in a sentence of HTML."""
    words = inert(shorten(visible(trace.spans.answer_text.replace("\n", "⏎"))))
    hidden = sorted(numbers)
    if not hidden:
        rule = trace.spans.rule
        how = "as you named it" if rule == "regex" else f"found by the rule “{inert(rule)}”"
        return (
            f"The answer is <b>{words}</b>, {how}. The model gives it a probability of "
            f"<b>{percent(found.before)}</b>."
        )
    named = ("line " if len(hidden) == 1 else "lines ") + ", ".join(map(str, hidden))
    choice = "now choose other tokens" if found.flipped else "still choose the same tokens"
    return (
        f"Without {named}, the probability of <b>{words}</b> is <b>{percent(found.after)}</b> "
        f"instead of {percent(found.before)} ({nats(found.drop)} nats lost a token). "
        f"The model would {choice}."
    )


def trouble(error: BaseException) -> str:
    """The message of an error, as HTML and in terms of the app."""
    told = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AnswerNotFoundError):
        found, _, _ = told.rpartition("; say how to find it")
        told = f"{found}; the options take another finder, or the answer itself"
    return f'<span role="alert">{inert(told[:1].upper() + told[1:])}.</span>'


def inert(text: str) -> str:
    """The text as HTML with no character that is special in HTML, JavaScript or a template."""
    return re.sub(r"[{}$`\\]", lambda found: f"&#{ord(found[0])};", str(escape(text)))


def as_prompt(tracer: FlowTracer, prompt: str, *, chat: bool) -> Prompt:
    """The prompt as a message of the user if the model has a chat template, or as it is."""
    template: Any = tracer.require_tokenizer().chat_template
    return [{"role": "user", "content": prompt}] if chat and template else prompt
