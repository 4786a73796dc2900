"""How strongly each head's output, in each row, decided the sampled tokens: one backward pass.

The log-odds of a sampled token, `λ = log p − log(1 − p)`, still tell apart two tokens of which the
model is nearly certain, where `log p` does not. The gradient of their sum with respect to a head's
output `o`, before the output projection, says how far that row's decisions hang on the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.causal_lm import (
    embeddings_as_leaves,
    evaluating,
    later_logits,
    text_inputs,
)
from flowtracer_plugin.model.padding import in_front, moved_back, text_first
from flowtracer_plugin.model.parallel import may_stop, tensor_parallel_group, uncompiled

Influence = Float[Tensor, "batch head token"]


def influences(
    model: nn.Module,
    projections: Sequence[nn.Module | None],
    heads: Sequence[int],
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    decided: Bool[Tensor, "batch token"],
    around: Callable[[Callable[[], Tensor]], Tensor] = lambda run: run(),
) -> tuple[Influence, ...]:
    """`‖∂ Σ λ / ∂ o‖` of every head and row of each layer, float32, 0 at padding.

    It takes a forward pass without dropout and a backward pass that changes no gradient of a
    parameter.

    Args:
        model: The model.
        projections: For each layer, the linear map that takes its attention output.
        heads: The number of heads of each layer.
        ids: The texts.
        visible: False on padding, wherever it is.
        decided: The sampled tokens whose log-odds are summed.
        around: Calls its argument, which makes the forward pass, and returns what that returns.

    Raises:
        UnsupportedArchitectureError: The model cannot make a backward pass of its own.
    """
    check_backward(model)
    ordered_ids, ordered = text_first(ids, visible)
    ordered = sent(ordered, ids.device)
    asked = in_front(decided, visible, ordered)
    with _own_pass(model, projections) as outputs:
        total = around(lambda: _total_log_odds(model, ordered_ids, ordered, asked))
        gradients = gradients_of(model, total, _reached(model, outputs))
    return tuple(
        moved_back(_lengths(gradient, count, ordered), visible).transpose(1, 2)
        for gradient, count in zip(gradients, heads, strict=True)
    )


class Outputs:
    """The attention's outputs in the autograd graph of a forward pass that somebody else makes.

    It keeps their places in the graph, not the outputs, which gradient checkpointing frees.

    Args:
        model: The model that runs.
        projections: For each layer, the linear map that takes its attention output.
        heads: The number of heads of each layer.
    """

    def __init__(
        self, model: nn.Module, projections: Sequence[nn.Module | None], heads: Sequence[int]
    ) -> None:
        self._model, self._projections, self._heads = model, projections, heads
        self._edges: list[list[GradientEdge | None]] = [[] for _ in projections]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The context of the forward passes; not of a backward pass that runs layers again."""

        def keep(number: int, output: Tensor) -> None:
            edge = get_gradient_edge(output) if output.requires_grad else None
            self._edges[number].append(edge)

        with _watching(self._projections, keep):
            yield

    def influences(
        self,
        chances: Float[Tensor, "batch completion"],
        visible: Bool[Tensor, "batch token"],
        decided: Bool[Tensor, "batch token"],
    ) -> tuple[Influence, ...] | None:
        """`‖∂ Σ λ / ∂ o‖` of the tokens whose log-probabilities, with their graph, are `chances`.

        The sum is over those that were `decided`. `∂λ / ∂ log p` is `1 / (1 − p)`, at most
        `1 / LEAST`. The graph stays as it is, and no gradient of a parameter changes. None if
        the graph does not hold the output of every layer.
        """
        edges = [edge for layer in self._edges for edge in layer if edge is not None]
        if len(edges) < sum(max(1, len(row)) for row in self._edges) or has_holes(chances):
            return None
        said = decided[:, decided.shape[1] - chances.shape[1] :]
        others = -torch.expm1(chances.detach().float())
        factors = torch.where(said, 1 / others.clamp_min(LEAST), 0.0).to(chances.dtype)
        found = torch.autograd.grad(chances, edges, factors, retain_graph=True)
        gradients, sizes = iter(found), []
        for layer, count in zip(self._edges, self._heads, strict=True):
            runs = torch.cat([next(gradients).detach() for _ in layer])
            lengths = _lengths(runs, count, visible).masked_fill(~visible[..., None], 0.0)
            sizes.append(lengths.transpose(1, 2))
        return tuple(sizes)


def keeps_graph(
    model: nn.Module,
    projections: Sequence[nn.Module | None],
    ids: Int[Tensor, "1 token"],
    visible: Bool[Tensor, "1 token"],
) -> bool:
    """Whether the graph of a forward pass serves two backward passes.

    Fused kernels may overwrite what they have saved for the backward pass, and a second one would
    then give wrong gradients without an error. Layers that are checkpointed in a reentrant way are
    not in the graph.
    """
    if _reentrant(model):
        return False
    with _own_pass(model, projections) as outputs:
        asked = torch.ones_like(visible)
        total, reached = _total_log_odds(model, ids, visible, asked), _reached(model, outputs)
        first = gradients_of(model, total, reached, retain_graph=True)
        before = [gradient.float().clone() for gradient in first]
        again = torch.autograd.grad(total, reached)
    return all(
        bool((one - other.float()).norm() <= _SAME * one.norm())
        for one, other in zip(before, again, strict=True)
    )


def graph_bytes(
    model: nn.Module,
    projections: Sequence[nn.Module | None],
    ids: Int[Tensor, "1 token"],
    visible: Bool[Tensor, "1 token"],
) -> tuple[int, int]:
    """The bytes that the graph of `influences` keeps per token, and per pair of tokens.

    They are counted in a pass over a short text: a tensor with two axes as long as the text has a
    number for each pair. Parameters and what depends on no token are not counted.

    Raises:
        UnsupportedArchitectureError: The model cannot make a backward pass of its own.
    """
    tokens = ids.shape[1]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, tuple[int, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        held, pairs = tensor.untyped_storage(), list(tensor.shape).count(tokens) > 1
        if held.data_ptr() not in own and tensor.numel() >= tokens:
            each = held.nbytes() // (tokens**2 if pairs else tokens)
            sizes[held.data_ptr()] = (0, each) if pairs else (each, 0)
        return tensor

    with _own_pass(model, projections), saved_tensors_hooks(keep, lambda tensor: tensor):
        total = _total_log_odds(model, ids, visible, torch.ones_like(visible))
        found = tuple(sum(size) for size in zip(*sizes.values(), strict=True))
        del total  # its graph keeps what was counted, so that no address comes twice
    return found[0], found[1]


LEAST = 2.0**-16
"""The least `1 − p` that is told from 0. Logits up to 32 are rounded by 2e-6 in float32, so below
this, `1 − p` would be off by more than an eighth."""

_SAME = 0.01
"""The relative difference up to which gradients are the same: some kernels add in any order."""


def _reentrant(model: nn.Module) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get(
            "use_reentrant", True
        )
        for module in model.modules()
    )


@contextmanager
def own_graph(model: nn.Module, added: Tensor | None = None) -> Iterator[list[Tensor]]:
    """A context in which the model runs without dropout, with a graph from the embeddings on.

    The embeddings of each pass are appended to the list; `added` is added to them before.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled(model))
        yield stack.enter_context(embeddings_as_leaves(model, added))


@contextmanager
def _own_pass(
    model: nn.Module, projections: Sequence[nn.Module | None]
) -> Iterator[dict[int, Tensor]]:
    """The context of a pass with a graph of its own, and the outputs that it will have."""
    kept: dict[int, Tensor] = {}
    with own_graph(model), _watching(projections, kept.__setitem__):
        yield kept
        if len(kept) < len(projections):
            raise without_gradients(model)


def _total_log_odds(
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    asked: Bool[Tensor, "batch token"],
) -> Float[Tensor, ""]:
    row, place = asked[:, 1:].cpu().nonzero(as_tuple=True)
    tokens = ids.shape[1]
    first = int(place.min()) if len(place) else tokens - 1
    logits = later_logits(model, text_inputs(model, ids, visible), first, tokens)
    row, place = (sent(one, logits.device) for one in (row, place))
    chosen = ids.to(logits.device)[row, place + 1]
    return log_odds(logits[row, place - first].float(), chosen).sum()


def _reached(model: nn.Module, outputs: dict[int, Tensor]) -> list[Tensor]:
    """The outputs of all layers, in order.

    Raises:
        UnsupportedArchitectureError: One has no gradient.
    """
    if not all(output.requires_grad for output in outputs.values()):
        raise without_gradients(model)
    return [outputs[number] for number in sorted(outputs)]


def log_odds(
    logits: Float[Tensor, "token vocabulary"], chosen: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`log p − log(1 − p)` of the chosen tokens; `1 − p` is summed over the others, not rounded."""
    others = logits.scatter(-1, chosen[:, None], -torch.inf)
    return logits.gather(-1, chosen[:, None])[:, 0] - others.logsumexp(-1)


def check_backward(model: nn.Module, edges: str = "influence") -> None:
    """Refuse models that cannot run the backward pass of their own that such edges need.

    Raises:
        UnsupportedArchitectureError: Parameters are spread over processes, or offloaded.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise without_gradients(model, edges)
    if not may_stop(model) or tensor_parallel_group(model) is not None:
        raise UnsupportedArchitectureError(
            f"edges={edges!r} needs a forward and a backward pass of its own, which a sharded or "
            "offloaded model cannot make; use edges='value' (preset='decided')"
        )


def without_gradients(model: nn.Module, edges: str = "influence") -> UnsupportedArchitectureError:
    """The error of a model in which attention's output has no gradient."""
    return UnsupportedArchitectureError(
        f"edges={edges!r} needs the gradient at the attention's output, and in "
        f"{type(model).__name__} there is none: it is quantized without gradients, or was loaded "
        "in inference mode; use edges='value' (preset='decided')"
    )


def gradients_of(
    model: nn.Module,
    total: Float[Tensor, ""],
    reached: Sequence[Tensor],
    edges: str = "influence",
    *,
    retain_graph: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of a number by tensors of the model's forward pass.

    Raises:
        UnsupportedArchitectureError: Some operation of the model passes no gradient on.
    """
    if has_holes(total):
        raise without_gradients(model, edges)
    found = torch.autograd.grad(total, reached, retain_graph=retain_graph, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise without_gradients(model, edges)
    return found


def has_holes(found: Tensor) -> bool:
    """Whether the graph of a tensor is missing, or lacks the gradient of an operation.

    Kernels for quantized weights often come without one. PyTorch then warns and goes on without
    what would flow through them, so that all gradients below are wrong, or there are none.
    """
    if found.grad_fn is None:
        return True
    waiting, seen = [found.grad_fn], {found.grad_fn}
    while waiting:
        node = waiting.pop()
        if node.name().endswith(_NO_KERNEL):
            return True
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        waiting += new
    return False


_NO_KERNEL = "NotImplemented"
"""How PyTorch's name of an operation without a gradient ends."""


def _lengths(
    gradient: Tensor, heads: int, ordered: Bool[Tensor, "batch most"]
) -> Float[Tensor, "batch most head"]:
    return gradient.detach().float().reshape(*ordered.shape, heads, -1).norm(dim=-1)


@contextmanager
def _watching(
    projections: Sequence[nn.Module | None], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """A context in which `keep` gets what each projection takes, and the projection's number.

    Passes of other threads are left alone.
    """
    owner = get_ident()
    with ExitStack() as stack:
        for number, projection in enumerate(projections):

            def take(_module: nn.Module, args: Any, number: int = number) -> None:
                if get_ident() == owner:
                    keep(number, args[0])

            if projection is not None:
                stack.callback(projection.register_forward_pre_hook(take).remove)
        yield
