"""Cut attention between tokens while a model runs, and check that nothing gets around the cut.

transformers builds every mask from a function of query and key. During a cut, that function allows
fewer pairs. The model, its weights and its attention implementation stay unchanged, and so do
sliding windows, chunks, padding and caches, which a mask passed to the model would replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
)

from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    context_length,
    evaluating,
    first_output,
    input_device,
    language_model,
    unwrapped,
    vocabulary_size,
)
from flowtracer_plugin.model.parallel import uncompiled

CHECK_TOKENS = 17
"""Number of tokens of the text on which a model is checked."""

Edges = Bool[Tensor, "cut query key"]


class KnockOutError(RuntimeError):
    """Cutting attention does not stop information from reaching a model's later tokens."""


def hidden_from_later(tokens: Bool[Tensor, "cut token"]) -> Edges:
    """The edges that hide each set of tokens from all later ones."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens[:, None, :] & (place[:, None] > place)


@contextmanager
def cutting(removed: Edges) -> Iterator[None]:
    """Remove edges from the attention of models that this thread runs inside the `with` block.

    Row `n` of a batch loses the edges of cut `n`. If the text grows, `removed` must have as many
    queries and keys as the text has tokens in the end. Edges from a token to itself stay.
    """
    table = ALL_MASK_ATTENTION_FUNCTIONS
    with _turn, ExitStack() as entries:
        for name in list(table):
            entries.enter_context(_narrowed(table, name))
        before = _removed.set(removed)
        entries.callback(_removed.reset, before)
        yield


_removed: ContextVar[Edges | None] = ContextVar("removed", default=None)
"""The cut of this thread: all threads share the table of masks."""

_turn = RLock()


@contextmanager
def _narrowed(table: MutableMapping[str, Any], name: str) -> Iterator[None]:
    original = table[name]

    def build(*args: Any, mask_function: Any = causal_mask_function, **options: Any) -> Any:
        removed = _removed.get()
        if removed is not None:
            _check_size(removed, options)
            mask_function = and_masks(mask_function, _kept(removed))
            options["allow_is_causal_skip"] = False
        return original(*args, mask_function=mask_function, **options)

    table[name] = build
    try:
        yield
    finally:
        del table[name]
        # The original may have been an entry of this table only, not one that all tables share.
        if table.get(name) is not original:
            table[name] = original


def _check_size(removed: Edges, options: Mapping[str, Any]) -> None:
    for side, size in (("q", removed.shape[1]), ("kv", removed.shape[2])):
        end = int(options.get(f"{side}_offset", 0)) + int(options.get(f"{side}_length", 0))
        if end > size:
            raise KnockOutError(
                f"the model builds a mask of {end} places where the text that is cut has {size} "
                "tokens: it attends to other things than tokens, or the cut is for another text"
            )


def _kept(removed: Edges) -> Callable[..., Any]:
    def kept(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return ~removed.to(query.device)[batch, query, key] | (query == key)

    return kept


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, gradients and compilation."""
    with evaluating(model), torch.no_grad(), uncompiled(model):
        yield


def read_prefix(model: nn.Module, ids: Int[Tensor, "1 token"]) -> DynamicCache:
    """The keys and values of the text."""
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def prefix_copies(cache: DynamicCache, length: int, copies: int) -> DynamicCache:
    """The first `length` tokens of a cache, `copies` times as a batch."""
    fresh = DynamicCache()
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
        fresh.update(keys.expand(copies, -1, -1, -1), values.expand(copies, -1, -1, -1), number)
    return fresh


_checked: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Results of `check_model`, by model and attention implementation."""


def check_model(model: nn.Module) -> bool:
    """Whether a cached text gives the same logits as the whole; refuse the model if cuts fail.

    A short text is read twice, the second time with another token in its middle. When attention to
    this token is cut, no later token may notice; a cut of nothing must change nothing. Each model
    is checked once.

    Raises:
        KnockOutError: The model's attention cannot be cut.
    """
    model = unwrapped(model)
    known = _checked.setdefault(model, {})
    name = str(getattr(language_model(model).config, "_attn_implementation", ""))
    if name not in known:
        with plainly(model):
            known[name] = _inspect(model, name)
    return known[name]


def _inspect(model: nn.Module, implementation: str) -> bool:
    length = min(CHECK_TOKENS, context_length(model))
    ids = torch.arange(length, device=input_device(model))[None] % vocabulary_size(model)
    middle = length // 2
    other = ids.clone()
    other[0, middle] = (ids[0, middle] + 1) % vocabulary_size(model)
    removed = torch.zeros(1, length, length, dtype=torch.bool, device=ids.device)
    more = {"use_cache": False} if "use_cache" in accepted_inputs(model) else {}

    def logits(read: Int[Tensor, "1 token"]) -> Float[Tensor, "token word"]:
        found = first_output(model(input_ids=read, **more))[0]
        return found.masked_fill(found == -torch.inf, 0.0)  # tokens that are never generated

    plain, changed = logits(ids), logits(other)
    with cutting(removed):
        uncut = logits(ids)
    removed[0, middle + 1 :, middle] = True
    with cutting(removed):
        blind, still = logits(ids), logits(other)
    seen = difference(changed[middle + 1 :], plain[middle + 1 :])
    leaked = difference(still[middle + 1 :], blind[middle + 1 :])
    kind = type(model).__name__
    if not difference(uncut, plain) <= rounding(plain):
        raise KnockOutError(f"{kind} computes other logits as soon as its masks are written out")
    if torch.equal(blind, plain):
        raise KnockOutError(
            f"cutting attention has no effect on {kind} with {implementation!r} attention: either "
            "this takes no mask for each token, then load it with attn_implementation='sdpa' or "
            "'eager', or the model makes its masks itself, or does not attend"
        )
    if leaked > (1e-3 if plain.dtype == torch.float32 else 0.1) * seen:
        raise KnockOutError(
            f"tokens of {kind} reach later ones by other ways than attention, such as recurrent "
            "states or convolutions, or not all of its layers can be cut: a token whose attention "
            f"is cut still has {leaked / max(seen, 1e-9):.0%} of its effect"
        )
    return _continues(model, ids, plain)


def _continues(
    model: nn.Module, ids: Int[Tensor, "1 token"], plain: Float[Tensor, "token word"]
) -> bool:
    if not {"past_key_values", "use_cache"} <= accepted_inputs(model):
        return False
    # Models with caches of their own keep more than keys and values, or share them between layers.
    own = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if not isinstance(own, DynamicCache) or {type(layer) for layer in own.layers} - _PLAIN:
        return False
    half = ids.shape[1] // 2
    cache = read_prefix(model, ids)
    if len(cache.layers) != len(own.layers) or cache.get_seq_length() != ids.shape[1]:
        return False
    inputs = {"past_key_values": prefix_copies(cache, half, 1), "use_cache": True}
    continued = first_output(model(input_ids=ids[:, half:], **inputs))[0]
    return difference(continued, plain[half:]) <= rounding(plain)


_PLAIN = {DynamicLayer, DynamicSlidingWindowLayer}
