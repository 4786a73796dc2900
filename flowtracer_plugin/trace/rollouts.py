"""The flow of padded rollouts, in the form in which trainers hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.flow.streamed import stream_batch
from flowtracer_plugin.flow.substitution import Rows
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.flow.validation import Check
from flowtracer_plugin.model.padding import in_front, moved_back
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.reading.edges import deciding_rows
from flowtracer_plugin.text.answers import AnswerFinder, FoundAnswer, check_finder
from flowtracer_plugin.text.spans import (
    answer_mask,
    prompt_opens_thinking,
    question_mask,
    target_mask,
)

RowErrors = Mapping[int, Exception]
"""Errors by the number of the row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowBatch:
    """The flow of padded rollouts, on the device of the model.

    A row is 0 if it has no answer, if no flow reaches the answer, or if it has failed.

    Attributes:
        prompt_length: Number of columns before the completions.
        throughput: Flow through every token of prompt and completion.
        reach: Influence of every token on the answer.
        target: True on the tokens where flow ends.
        reasoning_share: Share of each row's flow that enters or begins in the completion outside
            the target.
        answers: The answer that was found in each row, or None.
        errors: By its number, the error of each row that has failed, such as that of an answer
            finder or of attention that is not finite. It costs no other row.
    """

    prompt_length: int
    throughput: Float[Tensor, "batch token"]
    reach: Float[Tensor, "batch token"]
    target: Bool[Tensor, "batch token"]
    reasoning_share: Float[Tensor, " batch"]
    answers: tuple[FoundAnswer | None, ...]
    errors: RowErrors = field(default_factory=dict)

    @property
    def completion_throughput(self) -> Float[Tensor, "batch completion"]:
        """The throughput of the completion tokens."""
        return self.throughput[:, self.prompt_length :]

    @property
    def reasoning(self) -> Bool[Tensor, "batch token"]:
        """True on completion tokens before or between the target's; nowhere without an answer."""
        still = self.target.flip(-1).int().cumsum(-1).flip(-1) > 0
        still[:, : self.prompt_length] = False
        return still & ~self.target

    @property
    def found(self) -> Bool[Tensor, " batch"]:
        """True for rows with an answer that flow reaches."""
        return self.reach.sum(-1) > 0


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RolloutMasks:
    """Where flow enters and leaves each row; nowhere in rows without an answer.

    Attributes:
        question: True on the tokens where flow is injected.
        target: True on the tokens where flow ends.
        answer: True on the tokens of the answer.
        answers: The answer that was found in each row, or None.
        errors: The error of each row in which the search has failed, by its number.
        targeted: Whether each row has a target, if the host knows that; else the device is asked.
    """

    question: Bool[Tensor, "batch token"]
    target: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    answers: tuple[FoundAnswer | None, ...]
    errors: RowErrors = field(default_factory=dict)
    targeted: tuple[bool, ...] | None = None

    def with_target(self) -> list[int]:
        """The rows that have a target."""
        marked = self.target.any(-1).tolist() if self.targeted is None else self.targeted
        return [row for row, has_target in enumerate(marked) if has_target]

    def rows(self, rows: slice) -> RolloutMasks:
        """The masks of some rows."""
        return RolloutMasks(
            question=self.question[rows],
            target=self.target[rows],
            answer=self.answer[rows],
            answers=self.answers[rows],
            errors={
                new: self.errors[old]
                for new, old in enumerate(range(len(self.answers))[rows])
                if old in self.errors
            },
            targeted=None if self.targeted is None else self.targeted[rows],
        )

    def each(self) -> Iterator[tuple[slice, RolloutMasks]]:
        """Every row alone, with its place."""
        for row in range(len(self.answers)):
            alone = slice(row, row + 1)
            yield alone, self.rows(alone)


class OnHost(NamedTuple):
    """Rollouts on the host, where answers are found and inputs are checked.

    Attributes:
        ids: Prompts and completions.
        visible: False on padding.
    """

    ids: Int[Tensor, "batch token"]
    visible: Bool[Tensor, "batch token"]


def to_host(
    ids: Int[Tensor, "batch token"], visible: Bool[Tensor, "batch token"], *flags: Bool[Tensor, ""]
) -> tuple[OnHost, list[bool]]:
    """Rollouts and some flags, copied from the device at once."""
    parts = [ids.long().flatten(), visible.to(ids.device).long().flatten()]
    parts += [flag.to(ids.device).long().reshape(1) for flag in flags]
    sizes = [part.numel() for part in parts]
    said, shown, *read = torch.split(torch.cat(parts).cpu(), sizes)
    host = OnHost(said.view(ids.shape).to(ids.dtype), shown.view(ids.shape).bool())
    return host, [bool(flag) for flag in read]


def check_rollouts(
    prompt_ids: Tensor, completion_ids: Tensor, prompt_mask: Tensor, completion_mask: Tensor
) -> list[Check]:
    """Checks of the masks of rollouts, which are not read yet.

    Their errors are ValueErrors: prompts are padded on the right, or masks hold other numbers than
    0 and 1.

    Raises:
        TypeError: Ids or masks are no tensors, or of a kind that cannot be read.
        ValueError: Shapes differ, or there are no rows.
    """
    for name, ids, mask in (
        ("prompt", prompt_ids, prompt_mask),
        ("completion", completion_ids, completion_mask),
    ):
        for kind, part in (("ids", ids), ("mask", mask)):
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"{name}_{kind} must be a torch tensor, got a {type(part).__name__}; "
                    "pad and convert it first, for example with tokenizer.pad"
                )
            check_readable(f"{name}_{kind}", part)
        if ids.ndim != 2 or ids.shape != mask.shape or len(ids) != len(prompt_ids):
            raise ValueError(
                f"{name}_ids and {name}_mask must both be [batch, {name}] with the batch of "
                f"prompt_ids, got {tuple(ids.shape)} and {tuple(mask.shape)} beside prompt_ids "
                f"{tuple(prompt_ids.shape)}"
            )
    if not len(prompt_ids):
        raise ValueError("wanted at least one rollout, found none")
    checks = [
        Check(
            ((mask == 0) | (mask == 1)).all(),
            _refuse(f"{name}_mask must be 1 on tokens and 0 on padding, got other numbers"),
        )
        for name, mask in (("prompt", prompt_mask), ("completion", completion_mask))
    ]
    seen = prompt_mask.bool()
    padded = _refuse(
        "prompts must be padded on the left, as for generation, and some have padding after "
        "their tokens; encode them with padding_side='left'"
    )
    return [*checks, Check(~(seen[:, :-1] & ~seen[:, 1:]).any(), padded)]


def _refuse(message: str) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise ValueError(message)

    return refuse


def rollout_masks(
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    prompt_length: int,
    options: FlowOptions,
    finder: AnswerFinder,
    fallback: AnswerFinder | None = None,
    *,
    question: Bool[Tensor, "batch prompt"] | None = None,
    device: torch.device | None = None,
) -> RolloutMasks:
    """The masks of rollouts, whose answers are found on the host; only ids and masks are copied.

    Where `finder` finds no answer, `fallback` is tried. `question` are the prompt tokens that are
    the question; without it the options say which they are. With `device`, the masks are made
    there, for ids and a mask that are on the host already.

    Raises:
        ValueError: There is no such finder.
    """
    check_finder(finder)
    rows, visible = ids.cpu().numpy(), mask.cpu().numpy()
    given = None if question is None else question.cpu().numpy()
    asked_tokens, answer = np.zeros_like(visible), np.zeros_like(visible)
    answers: list[FoundAnswer | None] = []
    errors: dict[int, Exception] = {}
    for row, seen in enumerate(visible):
        asked, said = np.flatnonzero(seen[:prompt_length]), np.flatnonzero(seen[prompt_length:])
        prompt, sampled = rows[row, asked].tolist(), rows[row, prompt_length:][said].tolist()
        answers.append(None)
        try:
            # A row without a prompt has no question, so its answer is not searched.
            opened = prompt_opens_thinking(tokenizer, prompt) if prompt else False
            found = answer_mask(tokenizer, sampled, finder, in_thinking=opened) if prompt else None
            if found is None and fallback is not None and prompt:
                found = answer_mask(tokenizer, sampled, fallback)
            if found is not None:
                rule = options.question if given is None else given[row, asked]
                asked_tokens[row, asked] = question_mask(tokenizer, prompt, rule)
                answer[row, prompt_length + said], answers[row] = found
        except (ValueError, TypeError) as error:
            errors[row] = error
    target = target_mask(answer, options.target)
    masks = sent(np.stack([asked_tokens, target, answer]), device or ids.device)
    return RolloutMasks(
        question=masks[0],
        target=masks[1],
        answer=masks[2],
        answers=tuple(answers),
        errors=errors,
        targeted=tuple(bool(row.any()) for row in target),
    )


def solve_rollouts(
    attention: Float[Tensor, "batch query key"],
    masks: RolloutMasks,
    prompt_length: int,
    options: FlowOptions,
) -> FlowBatch:
    """The flow of all rows; 0 in rows in which no flow reaches an answer, or that fail."""
    try:
        return _solved(attention, masks, prompt_length, options)
    except (ValueError, ArithmeticError) as error:
        if len(attention) == 1:
            return _failed(masks, prompt_length, error)
    parts = [
        solve_rollouts(attention[row], part, prompt_length, options) for row, part in masks.each()
    ]
    return join_batches(parts)


def _solved(
    attention: Float[Tensor, "batch query key"],
    masks: RolloutMasks,
    prompt_length: int,
    options: FlowOptions,
) -> FlowBatch:
    throughput, reach = attention.new_zeros(2, *attention.shape[:2])
    share = attention.new_zeros(len(attention))
    solved = masks.with_target()
    if solved:
        # Not a copy if all rows are solved.
        rows = ... if len(solved) == len(attention) else sent(solved, attention.device)
        target = masks.target[rows]
        flow = solve_flow(
            attention[rows],
            masks.question[rows],
            target,
            **options.solving,
            unreached="zero",
        )
        reached = flow.source.any(-1, keepdim=True)
        throughput[rows], reach[rows] = flow.throughput, flow.reach * reached
        prompt = (torch.arange(target.shape[1], device=target.device) < prompt_length).expand_as(
            target
        )
        entered = flow.inflow(prompt) + flow.source
        share[rows] = entered.masked_fill(prompt | target, 0.0).sum(-1)
    return FlowBatch(
        prompt_length=prompt_length,
        throughput=throughput,
        reach=reach,
        target=masks.target,
        reasoning_share=share,
        answers=masks.answers,
        errors=masks.errors,
    )


def _failed(masks: RolloutMasks, prompt_length: int, error: Exception) -> FlowBatch:
    """The only row, without flow."""
    nothing = torch.zeros_like(masks.target, dtype=torch.float32)
    return FlowBatch(
        prompt_length=prompt_length,
        throughput=nothing,
        reach=nothing,
        target=masks.target,
        reasoning_share=nothing[:, 0],
        answers=masks.answers,
        errors={0: error.with_traceback(None), **masks.errors},  # its frames hold the attention
    )


def stream_rollouts(
    rows: Rows,
    ordered: Bool[Tensor, "batch most"],
    visible: Bool[Tensor, "batch token"],
    masks: RolloutMasks,
    prompt_length: int,
    options: FlowOptions,
) -> FlowBatch:
    """The result of `solve_rollouts`, from attention by rows with all padding behind the text.

    `ordered` marks the text in these rows, `visible` in the original ones.
    """

    def moved(values: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch most"]:
        return in_front(values, visible, ordered)

    def back(values: Float[Tensor, "batch most"]) -> Float[Tensor, "batch token"]:
        return moved_back(values, visible)

    prompt = torch.arange(visible.shape[1], device=visible.device) < prompt_length
    try:
        nodes, entered = stream_batch(
            rows,
            moved(masks.question),
            moved(masks.target),
            moved(prompt.expand_as(visible)),
            **options.solving,
        )
    except (ValueError, ArithmeticError) as error:
        if len(visible) == 1:
            return _failed(masks, prompt_length, error)
        parts = [
            stream_rollouts(
                _row_of(rows, row), ordered[row], visible[row], part, prompt_length, options
            )
            for row, part in masks.each()
        ]
        return join_batches(parts)
    reached = nodes.source.any(-1, keepdim=True)
    return FlowBatch(
        prompt_length=prompt_length,
        throughput=back(nodes.throughput),
        reach=back(nodes.reach * reached),
        target=masks.target,
        reasoning_share=back(entered + nodes.source)
        .masked_fill(prompt | masks.target, 0.0)
        .sum(-1),
        answers=masks.answers,
        errors=masks.errors,
    )


def _row_of(rows: Rows, row: slice) -> Rows:
    return lambda start, stop: rows(start, stop)[row]


def join_batches(parts: Sequence[FlowBatch]) -> FlowBatch:
    """One batch with the rows of all parts, in order."""
    return FlowBatch(
        prompt_length=parts[0].prompt_length,
        throughput=torch.cat([part.throughput for part in parts]),
        reach=torch.cat([part.reach for part in parts]),
        target=torch.cat([part.target for part in parts]),
        reasoning_share=torch.cat([part.reasoning_share for part in parts]),
        answers=tuple(answer for part in parts for answer in part.answers),
        errors=join_errors([(len(part.answers), part.errors) for part in parts]),
    )


def join_errors(parts: Iterable[tuple[int, RowErrors]]) -> RowErrors:
    """The errors of consecutive parts of a batch, each given with its number of rows."""
    joined: dict[int, Exception] = {}
    first = 0
    for rows, errors in parts:
        joined |= {first + row: error for row, error in errors.items()}
        first += rows
    return joined


def asked_edges(
    attention: Float[Tensor, "batch query key"],
    mask: Bool[Tensor, "batch key"],
    response: Bool[Tensor, "batch query"],
    options: FlowOptions,
) -> Float[Tensor, "batch query key"]:
    """The edges of the flow from those that were read: the options first_token, rows, damping."""
    if options.first_token == "drop":
        attention = drop_first_token(attention, mask)
    if options.rows == "decision":
        attention = deciding_rows(attention, mask, response)
        return attention.mul_(options.damping)  # it is new, so that no further map is made
    return attention if options.damping == 1 else attention * options.damping


def drop_first_token(
    attention: Float[Tensor, "batch query key"], mask: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch query key"]:
    """The attention without the first visible token, whose share of each row goes to the others."""
    first = mask.int().argmax(-1)
    column = torch.zeros_like(mask).scatter_(1, first[:, None], value=True)[:, None, :]
    kept = attention.masked_fill(column, 0.0)
    before, after = attention.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    return kept * torch.where(after > 0, before / after.clamp_min(1e-30), 0.0)
