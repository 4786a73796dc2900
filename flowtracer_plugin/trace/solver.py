"""From token ids to flow, in dense or in streamed mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from flowtracer_plugin.flow.backbone import outline
from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.flow.streamed import stream_flow
from flowtracer_plugin.flow.substitution import Rows, kept_between
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.causal_lm import (
    check_input,
    check_inputs,
    check_packing,
    input_device,
)
from flowtracer_plugin.model.padding import in_front
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.reading.edges import (
    EdgeChoice,
    completions,
    deciding_blocks,
    edge_choice,
)
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.removal import (
    EDGES as CAUSAL,
    asked_texts,
    edge_losses,
    helpful_edges,
)
from flowtracer_plugin.reading.rows import AttentionRows
from flowtracer_plugin.result.attention_map import LastMaps
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.choice import first_chosen, flow_order
from flowtracer_plugin.trace.found_text import FoundText, padded_texts
from flowtracer_plugin.trace.memory import Budget
from flowtracer_plugin.trace.rollouts import (
    FlowBatch,
    OnHost,
    RolloutMasks,
    asked_edges,
    drop_first_token,
    solve_rollouts,
    stream_rollouts,
)

Ids = Int[Tensor, "batch token"]
Mask = Bool[Tensor, "batch token"]
HeadPairs = tuple[tuple[int, int], ...]


def _copies(options: FlowOptions) -> int:
    """The maps that are made of a dense map of edges, beside it."""
    if options.first_token == "drop":
        return 3
    if options.edges == CAUSAL:
        return 2
    return 1 if options.rows == "decision" or options.damping != 1 else 0


class Solver:
    """Reads the attention of a model and solves the flow, in the mode that fits.

    Args:
        reader: Reads the model.
        layers: Numbers of the layers to average.
        options: Options of the flow.
        mode: `"auto"`, `"dense"` or `"streamed"`.
    """

    def __init__(
        self, reader: AttentionReader, layers: Sequence[int], options: FlowOptions, mode: str
    ) -> None:
        self.reader, self.layers, self.options, self.mode = reader, layers, options, mode
        self.budget = Budget(
            reader,
            layers,
            copies=_copies(options),
            keeps=options.heads != "all",
            gradients=options.edges == "influence",
        )
        plain = Budget(reader, layers, copies=0)
        self._kept = LastMaps()
        self._plain_budget = plain if options.edges == "influence" else self.budget

    def attention(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Int[Tensor, "batch key"] | Bool[Tensor, "batch key"] | None,
        others: dict[str, Any],
    ) -> Float[Tensor, "batch query key"]:
        """The mean attention of all heads; `others` are further inputs of the model."""
        if self.mode == "streamed":
            raise ValueError(
                "attention() returns the attention between all pairs of tokens, which "
                "mode='streamed' avoids; wrap(..., mode='dense')"
            )
        check_inputs(self.reader.model, others)
        cache = others.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        mask = check_input(self.reader.model, input_ids, attention_mask, cached=cached)
        if attention_mask is None and "position_ids" in others:
            others["attention_mask"] = None  # transformers detects packing only without a mask
        check_packing(attention_mask, others.get("position_ids"))
        self.reader.verify()
        self._plain_budget.prepare()
        padded = not bool(mask.all())
        batch, tokens = input_ids.shape
        self._plain_budget.choose("dense", tokens, batch, padded=padded, fixed=True)
        return self.reader.read(input_ids, mask, self.layers, model_inputs=others)

    def texts(self, texts: Sequence[FoundText], *, progress: bool = False) -> list[dict[str, Any]]:
        """For each text, the fields of a trace that follow from its attention.

        Several texts are read at once, with padding behind the shorter ones, if the heads need not
        be chosen for each text and the attention of all fits; otherwise one after another.
        """
        apart = self.options.heads != "all" or self.options.edges == CAUSAL
        if len(texts) == 1 or apart or self.mode == "streamed":
            return [self._text(text, progress=progress) for text in texts]
        host = padded_texts(texts)
        if self._ready(host[0], host[1]) != "dense":
            return [self._text(text, progress=progress) for text in texts]
        ids, mask, masks = self._sent(*host)
        choice = edge_choice(self.options, masks["target"], masks["response"], masks["answer"])
        edges, _ = self._edges(
            ids, mask, masks["response"], choice, masks["answer"], progress=progress
        )
        found = []
        for row, text in enumerate(texts):
            length = len(text.ids)
            # A copy, even of a whole row: a trace must not keep the maps of the other texts.
            own = edges[row, :length, :length].clone(memory_format=torch.contiguous_format)
            found.append(self._solved(own, text, ()))
        return found

    def _sent(
        self, ids: Ids, mask: Mask, masks: Mapping[str, Mask]
    ) -> tuple[Ids, Mask, dict[str, Mask]]:
        """Ids and masks on the model's device; the mask of padding also serves on the host."""
        device = input_device(self.reader.model)
        return sent(ids, device), mask, {name: sent(one, device) for name, one in masks.items()}

    def _solved(
        self, edges: Float[Tensor, "query key"], text: FoundText, heads: HeadPairs
    ) -> dict[str, Any]:
        # On the host, numpy's arrays are solved faster than torch's.
        attention = edges.numpy() if edges.device.type == "cpu" else edges
        spans = text.spans
        flow = solve_flow(attention, spans.question, spans.target, **self.options.solving)
        found: dict[str, Any] = {"attention": attention, "heads": heads}
        if isinstance(attention, Tensor):
            reach, throughput = torch.stack([flow.reach, flow.throughput]).cpu().numpy()
            found["attention"] = self._kept.keep(attention)
            return {**found, "reach": reach, "throughput": throughput}
        return {**found, "reach": flow.reach, "throughput": flow.throughput}

    def _text(self, text: FoundText, *, progress: bool) -> dict[str, Any]:
        spans = text.spans
        host = padded_texts([text])
        mode = self._ready(host[0], host[1])
        ids, mask, masks = self._sent(*host)
        target, response, answer = masks["target"], masks["response"], masks["answer"]
        choice = edge_choice(self.options, target, response, answer)
        if mode == "dense":
            edges, heads = self._edges(ids, mask, response, choice, answer, progress=progress)
            found = self._solved(edges[0], text, heads)
            if self.options.edges == CAUSAL:
                found["chosen"] = self._chosen(ids, mask, spans)
            return found
        prompt = spans.prompt_length
        rows, _, heads = self._rows(ids, mask, response, prompt, choice, progress=progress)
        twice = 2 * (int(spans.target.nonzero()[0].max()) + 1)
        with tqdm(total=twice, desc="streaming", unit="row", disable=not progress) as bar:

            def one(start: int, stop: int) -> Float[Tensor, "row key"]:
                part = rows(start, stop)[0]
                bar.update(stop - start)
                return part

            nodes, backbone = stream_flow(
                one,
                sent(spans.question, ids.device),
                target[0],
                outline(text.tokens, spans.prompt_length),
                **self.options.solving,
            )
        found = {"reach": nodes.reach, "throughput": nodes.throughput}
        return {"attention": None, "heads": heads, "streamed": backbone, **found}

    def rollouts(
        self, ids: Ids, host: OnHost, masks: RolloutMasks, prompt_length: int
    ) -> FlowBatch:
        """The flow of padded rollouts, which are on the host, too, in one forward pass."""
        mask = host.visible
        response = completions(sent(mask, masks.answer.device), prompt_length)
        choice = edge_choice(self.options, masks.target, response, masks.answer)
        if self._ready(*host) == "dense":
            attention, _ = self._edges(ids, mask, response, choice, masks.answer)
            return solve_rollouts(attention, masks, prompt_length, self.options)
        prompt = int(mask[:, :prompt_length].sum(1).min())
        rows, ordered, _ = self._rows(ids, mask, response, prompt, choice)
        visible = sent(mask, ordered.device)
        return stream_rollouts(rows, ordered, visible, masks, prompt_length, self.options)

    def _ready(self, ids: Ids, mask: Mask) -> str:
        """The mode, after all checks of the input, the adapter and the memory.

        Ids and mask are on the host, so that no check waits for the device.
        """
        self._kept.release()
        check_input(self.reader.model, ids, mask)
        self.reader.verify()
        self.budget.prepare()
        padded = not bool(mask.all())
        if self.options.edges == CAUSAL:
            tokens = ids.shape[1]
            return self.budget.choose("dense", tokens, len(ids), padded=padded, fixed=True)
        return self.budget.choose(self.mode, ids.shape[1], len(ids), padded=padded)

    def _edges(
        self,
        ids: Ids,
        mask: Mask,
        response: Mask,
        choice: EdgeChoice | None,
        answer: Mask,
        *,
        progress: bool = False,
    ) -> tuple[Float[Tensor, "batch query key"], HeadPairs]:
        """All edges, and the heads chosen for the first text."""
        heads: HeadPairs = ()
        if self.options.edges == CAUSAL:
            start = int(response.any(0).int().argmax())
            with self.reader.exclusive():
                texts = asked_texts(self.reader, ids, sent(mask, ids.device), answer, start)
                attention = helpful_edges(edge_losses(self.reader, texts, self.layers))
        elif choice is None or choice.heads == "all":
            attention = self.reader.read(ids, mask, self.layers, choice=choice, progress=progress)
        else:
            attention, rows = self.reader.read_edges(
                ids, mask, self.layers, choice, progress=progress
            )
            heads = self._pairs(rows)
        visible = sent(mask, attention.device)
        return asked_edges(attention, visible, response, self.options), heads

    def _chosen(self, ids: Ids, mask: Mask, spans: Spans) -> tuple[int, ...]:
        """The tokens through which most flow passes, chosen and hidden one after another."""
        question, target, answer = (
            sent(part, ids.device)[None] for part in (spans.question, spans.target, spans.answer)
        )
        masks = RolloutMasks(question=question, target=target, answer=answer, answers=(None,))
        with self.reader.exclusive():
            order, errors = flow_order(
                self.reader,
                ids,
                sent(mask, ids.device),
                masks,
                spans.prompt_length,
                self.options,
            )
        for error in errors.values():
            raise error
        candidates = int(spans.answer.argmax()) - spans.prompt_length
        return first_chosen(order[0].tolist(), candidates)

    def _rows(
        self,
        ids: Ids,
        mask: Mask,
        response: Mask,
        prompt: int,
        choice: EdgeChoice | None,
        *,
        progress: bool = False,
    ) -> tuple[Rows, Bool[Tensor, "batch most"], HeadPairs]:
        """The edges by rows with padding behind the text, their mask, and the chosen heads.

        `prompt` is the length of the shortest prompt.
        """
        rows, ordered = self.reader.read_rows(
            ids, mask, self.layers, choice=choice, progress=progress
        )

        def edges(start: int, stop: int) -> Float[Tensor, "batch row key"]:
            kept = self.options.first_token == "keep"
            block = rows(start, stop)
            block = block if kept else drop_first_token(block, ordered[:, :stop])
            return block.mul_(self.options.damping)

        batch, tokens = mask.shape
        room = self.budget.room(tokens, batch, padded=not bool(mask.all()))
        found = kept_between(edges, room)
        if self.options.rows == "decision":
            found = deciding_blocks(found, in_front(response, mask, ordered), prompt)
        return found, ordered, self._pairs(rows)

    def _pairs(self, rows: AttentionRows) -> HeadPairs:
        """Layer and number of each head chosen for the first text; empty if all heads count."""
        if rows.heads is None:
            return ()
        numbers = [site.layer for site in self.reader.sites if site.layer in set(self.layers)]
        return tuple(
            (layer, head)
            for layer, chosen in zip(numbers, rows.heads[0], strict=True)
            for head in chosen.tolist()
        )
