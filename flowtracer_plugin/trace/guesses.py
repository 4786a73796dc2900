"""What is passed to a tracer by a natural mistake, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.options import SAID
from flowtracer_plugin.reading.reader import AttentionReader

NOT_CALLED = (
    "a tracer is not called: tracer.generate(prompt) lets the model answer and traces its answer, "
    "tracer.trace(prompt, response) traces a response that you have"
)

_SEVERAL = (
    "flowtracer_plugin.trace_many(tracer, rows) traces many: a row is {'prompt': prompt, "
    "'response': response}, and the model answers one without a response"
)
_IDS = "tracer.trace_tokens(prompt_ids, response_ids) takes token ids"


def check_wrapped(model: Any, tokenizer: Any) -> None:
    """Refuse what is no model, or no tokenizer.

    Raises:
        TypeError: One of them is something else; the message says what to pass.
    """
    if isinstance(getattr(model, "reader", None), AttentionReader):
        raise TypeError(
            "this is a tracer already: use it as it is, or make one with other options by "
            "wrap(tracer.model, tracer.tokenizer, ...)"
        )
    if isinstance(model, PreTrainedTokenizerBase):
        raise TypeError("the model comes first: wrap(model, tokenizer)")
    if type(model).__module__.startswith("transformers.pipelines"):
        raise TypeError("wrap what the pipeline holds: wrap(pipe.model, pipe.tokenizer)")
    if isinstance(tokenizer, str):
        raise TypeError(
            f"wanted a tokenizer, found the text {tokenizer!r:.80}; load it first, with "
            "AutoTokenizer.from_pretrained(...)"
        )


def check_prompt(prompt: Any, template_kwargs: Any = None) -> None:
    """Refuse what is no text and no chat, and arguments of the chat template where none is used.

    Raises:
        TypeError: The prompt is something else; the message says what takes it. Or the arguments
            are no mapping.
        ValueError: A text, which no template shapes, comes with arguments of the template.
    """
    if not isinstance(template_kwargs, Mapping | None):
        raise TypeError(
            "template_kwargs must be a mapping such as {'enable_thinking': False}, got "
            f"{template_kwargs!r:.80}"
        )
    if isinstance(prompt, str):
        if template_kwargs:
            raise ValueError(
                "template_kwargs are for the chat template, and a text is traced without it; pass "
                "chat messages, such as [{'role': 'user', 'content': text}]"
            )
        return
    known = _kind(prompt)
    if known is None:
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            return
        known = f"a {type(prompt).__name__}", "pass a text or a list of chat messages"
    raise TypeError(
        f"the prompt must be a text or a list of chat messages, got {known[0]}; {known[1]}"
    )


def checked_response(prompt: Any, response: Any) -> str:
    """The response, which must be a text.

    Raises:
        TypeError: The response is something else; the message says what takes it.
    """
    if isinstance(response, str):
        return response
    if response is None:
        chat = isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping)
        if chat and prompt[-1].get("role") == "assistant":
            wish = "pass it apart: tracer.trace(messages[:-1], messages[-1]['content'])"
            raise TypeError(f"the chat ends with the response; {wish}")
        raise TypeError(
            "there is no response to trace; tracer.generate(prompt) lets the model answer, and "
            "traces its answer"
        )
    known = _kind(response)
    if isinstance(response, Mapping) and "role" in response:
        known = "a chat message", "pass its text, message['content']"
    known = known or (f"a {type(response).__name__}", "pass the text that the model wrote")
    raise TypeError(f"the response must be a text, got {known[0]}; {known[1]}")


def check_rule(question: Any, wish: str) -> None:
    """Refuse a rule that finds the question in what the user said, where only ids are known.

    Raises:
        ValueError: It is such a rule; `wish` says what to do instead.
    """
    if isinstance(question, str) and question in SAID:
        raise ValueError(
            f"question={question!r} needs to know what the user said, and token ids do not tell; "
            f"{wish}"
        )


def check_marked(question: Tensor | None, prompt_ids: Tensor, rule: str) -> None:
    """Check the mask of the question in padded prompts, or the rule where there is no mask.

    Raises:
        ValueError: The shapes differ, or the rule needs what the user said.
    """
    if question is None:
        check_rule(rule, "wrap the model with question='prompt'")
    elif question.shape != prompt_ids.shape:
        raise ValueError(
            f"question must mark the tokens of prompt_ids, {tuple(prompt_ids.shape)}, got the "
            f"shape {tuple(question.shape)}"
        )


def sampled_ids(output: Any) -> tuple[Any, Any]:
    """The token ids of the prompt and of the response in an output of vLLM, a `RequestOutput`.

    Raises:
        TypeError: It is something else.
        ValueError: It holds another number of responses than one.
    """
    if _is_sampled(output):
        if len(output.outputs) == 1:
            return output.prompt_token_ids, output.outputs[0].token_ids
        raise ValueError(
            f"this output holds {len(output.outputs)} responses; pass one of them, as "
            "tracer.trace_tokens(output.prompt_token_ids, output.outputs[0].token_ids)"
        )
    if isinstance(output, Sequence) and output and all(map(_is_sampled, output)):
        raise TypeError(
            f"got {len(output)} outputs of vLLM; pass each of them: "
            "[tracer.trace_tokens(output) for output in outputs]"
        )
    raise TypeError(
        "response_ids are missing; pass tracer.trace_tokens(prompt_ids, response_ids), or the "
        "RequestOutput of vLLM alone"
    )


def _is_sampled(output: Any) -> bool:
    return hasattr(output, "prompt_token_ids") and hasattr(output, "outputs")


def _kind(given: Any) -> tuple[str, str] | None:
    """What a value is, and what takes it; None for a text, a chat, and what nobody knows."""
    if isinstance(given, Mapping):
        if "role" in given:
            return "one chat message", "put it in a list: [message]"
        if "input_ids" in given:
            return "what a tokenizer returns", _IDS
        return "a row of data", f"pass its texts, such as row['prompt'], or {_SEVERAL}"
    if _is_sampled(given):
        return "an output of vLLM", "tracer.trace_tokens(output) takes it"
    if hasattr(given, "column_names") or hasattr(given, "columns"):
        return "a table of rows", _SEVERAL
    if isinstance(given, np.ndarray | Tensor):
        return f"an array of shape {tuple(given.shape)}", _IDS
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        return None
    if all(isinstance(one, int | np.integer) for one in given):
        return "a list of whole numbers", _IDS
    if all(isinstance(one, str) for one in given):
        return f"a list of {len(given)} texts", _SEVERAL
    if all(isinstance(one, Sequence) for one in given):
        numbers = all(isinstance(one, int) for row in given for one in row)
        return f"a list of {len(given)} lists", _IDS if numbers else _SEVERAL
    return None
