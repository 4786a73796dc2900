"""What a loaded transformers model says about itself, and which inputs it can take."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
from flowtracer_plugin.flow.arrays import check_readable, dtype_name


def unwrapped(model: Any) -> nn.Module:
    """The model inside the wrappers of nnsight, `torch.compile` and data parallelism.

    They run the same modules, but compile them, or share gradients with other processes.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return unwrapped(model._orig_mod)
    if type(model).__module__.partition(".")[0] in {"nnsight", "nnterp"}:
        return unwrapped(model._module)
    return model


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers such as PEFT's.

    Raises:
        TypeError: There is no transformers model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"wanted a loaded model, found {model!r}; load it first, with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"wanted a transformers model, found {type(model).__name__}")


def model_name(model: nn.Module) -> str:
    """The model's folder or hub id, or else the name of its class."""
    return language_model(model).config.name_or_path or type(model).__name__


def first_output(output: Any) -> Tensor:
    """The logits, or the last hidden state if the model has no head.

    Raises:
        TypeError: The model returned something else first.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())))
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"wanted a model that returns a tensor first, found {type(found).__name__}")
    return found


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """The arguments that the model takes; a wrapper that takes any has those of its inner model."""
    for forward in (model.forward, language_model(model).forward):
        parameters = inspect.signature(forward).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return frozenset(parameters)


def check_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse misspelt names of inputs, which many models ignore, as they pass any on to others.

    Raises:
        ValueError: No module of the model takes one of these names, and the model one like it.
    """
    for name in names:
        meant = get_close_matches(name, accepted_inputs(model), n=1, cutoff=0.8)
        takers = (inspect.signature(module.forward).parameters for module in model.modules())
        if meant and not any(name in parameters for parameters in takers):
            raise ValueError(f"the model takes no input {name!r}; did you mean {meant[0]!r}?")


def text_inputs(
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    **others: Any,
) -> dict[str, Any]:
    """The arguments of one pass over these texts, without a cache; only those the model takes."""
    if ids.is_inference() and not torch.is_inference_mode_enabled():
        ids = ids.clone()  # what inference mode has made cannot be kept for a backward pass
    inputs = {"input_ids": ids, "attention_mask": visible.long(), "use_cache": False, **others}
    accepted = accepted_inputs(model)
    return {name: value for name, value in inputs.items() if name in accepted}


def later_logits(
    model: nn.Module, inputs: Mapping[str, Any], first: int, tokens: int
) -> Float[Tensor, "batch row word"]:
    """The logits of the rows from `first` on, of texts that have `tokens` in all.

    Earlier rows skip the model's large head, if it can leave them out.
    """
    count = tokens - first
    kept = {"logits_to_keep": count} if "logits_to_keep" in accepted_inputs(model) else {}
    return first_output(model(**inputs, **kept))[:, -count:]


@contextmanager
def embeddings_as_leaves(model: nn.Module, added: Tensor | None = None) -> Iterator[list[Tensor]]:
    """A list to which each pass appends its embeddings, where its autograd graph then begins.

    `added` is added to them before, such as noise. Passes of other threads are left alone.
    """
    embedded: list[Tensor] = []
    owner = get_ident()

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if get_ident() != owner:
            return None
        moved = output.detach() if added is None else output.detach() + added.to(output)
        embedded.append(moved.requires_grad_())
        return embedded[-1]

    hook = language_model(model).get_input_embeddings().register_forward_hook(begin)
    try:
        yield embedded
    finally:
        hook.remove()


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs; weights that accelerate has offloaded do not count."""
    devices = (parameter.device for parameter in model.parameters())
    held = next((device for device in devices if device.type != "meta"), None)
    if held is not None:
        return held
    hooks = (vars(module).get("_hf_hook") for module in model.modules())
    placed = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in placed if device is not None), "cpu"))


def vocabulary_size(model: nn.Module) -> int:
    """The number of token ids that the model can embed."""
    inner = language_model(model)
    embedding = inner.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings  # the weight of one that DeepSpeed has sharded is empty
    weight = getattr(embedding, "weight", None)
    return inner.config.get_text_config().vocab_size if weight is None else weight.shape[0]


def context_length(model: nn.Module) -> int:
    """The number of tokens that the model has positions for; `sys.maxsize` without a limit."""
    config = language_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 0
    return limit if limit > 0 else sys.maxsize  # XLNet says -1


def check_positions(model: nn.Module) -> None:
    """Refuse models whose positions are not the positions of tokens.

    Raises:
        UnsupportedArchitectureError: The model has both an encoder and a decoder, reads several
            tokens at each position, or a PEFT method puts virtual tokens before the text.
    """
    inner = language_model(model)
    if inner.config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"{type(inner).__name__} encodes one text and decodes another, shifted by one token; "
            "wrap a model that continues its text, such as AutoModelForCausalLM makes, also of "
            "this model's decoder"
        )
    embedding = inner.get_input_embeddings()
    if isinstance(embedding, nn.ModuleList) and len(embedding) > 1:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} reads {len(embedding)} tokens at every position, one of each "
            "codebook, and attention between positions does not tell them apart"
        )
    if "peft" not in sys.modules:
        return
    from peft import PeftModel

    for module in model.modules():
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            raise UnsupportedArchitectureError(
                f"{module.active_peft_config.peft_type.value} puts virtual tokens before the text, "
                "and attention to them belongs to no token; trace the base model, or a model with "
                "LoRA or another method that changes weights"
            )


def check_length(model: nn.Module, length: int) -> None:
    """Refuse texts that are longer than the model's context.

    Raises:
        ValueError: The text is longer.
    """
    if length > (limit := context_length(model)):
        raise ValueError(
            f"prompt and response have {length} tokens, more than the model's context of "
            f"{limit}; shorten them"
        )


def check_input(
    model: nn.Module, input_ids: Tensor, mask: Tensor | None, *, cached: int = 0
) -> Bool[Tensor, "batch key"]:
    """The mask as booleans, all True by default; refuse inputs that the model cannot read.

    There may be `cached` tokens before the input.

    Raises:
        TypeError: Ids or mask are not tensors, or sparse, nested or on the meta device, or ids are
            not whole numbers.
        ValueError: Shapes differ, the text is empty or too long, a token is outside the vocabulary,
            or the mask holds other numbers than 0 and 1.
    """
    for name, given in (("input_ids", input_ids), ("attention_mask", mask)):
        if not isinstance(given, Tensor | None if name == "attention_mask" else Tensor):
            parts = isinstance(given, Mapping)
            wish = "its parts, with ** before it" if parts else f"torch.as_tensor({name})"
            raise TypeError(
                f"{name} must be a torch tensor, got a {type(given).__name__}; pass {wish}"
            )
        check_readable(name, given)
    if not dtype_name(input_ids).startswith(("int", "uint")):
        raise TypeError(f"input_ids must be whole numbers, got {input_ids.dtype}")
    wanted = (*input_ids.shape[:1], input_ids.shape[-1] + cached)
    shown = torch.ones(wanted, device=input_ids.device) if mask is None else mask
    if input_ids.ndim != 2 or tuple(shown.shape) != wanted:
        raise ValueError(
            "input_ids and attention_mask must both be [batch, token], got "
            f"{tuple(input_ids.shape)} and {tuple(shown.shape)}"
            + (f"; the mask must cover the {cached} cached tokens too" if cached else "")
        )
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids are empty: {tuple(input_ids.shape)}; pass at least one token")
    if not bool(((shown == 0) | (shown == 1)).all()):
        raise ValueError("attention_mask must be 1 on tokens and 0 on padding, got other numbers")
    # Padding does not count: positions begin at the first visible token.
    check_length(model, int(shown.bool().sum(-1).max()))
    check_vocabulary(model, input_ids)
    return shown.bool()


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Refuse tokens that the model does not embed.

    Raises:
        ValueError: There is such a token.
    """
    size = vocabulary_size(model)
    if not bool(((ids >= 0) & (ids < size)).all()):
        raise ValueError(
            f"token ids must be between 0 and {size - 1}, the model's vocabulary, got "
            f"{int(ids.min())} to {int(ids.max())}"
        )


def check_packing(mask: Tensor | None, positions: Tensor | None) -> None:
    """Refuse packed texts with a mask: with one, transformers takes them for a single text.

    Raises:
        ValueError: Positions restart between visible tokens.
    """
    if mask is None or positions is None or positions.ndim != 2:
        return
    both = mask[:, 1:].bool() & mask[:, :-1].bool()
    restarts = (positions.diff(dim=-1) != 1).to(both.device)
    if restarts.shape[-1] == both.shape[-1] and bool((restarts & both).any()):
        raise ValueError(
            "position_ids restart, as for packed texts, but transformers takes these for one text "
            "if there is a mask; leave attention_mask out, and the padding"
        )


def check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        ValueError: It knows tokens that the model does not embed, or fewer than 90 % of those that
            the model embeds, and not because these are padded to a multiple of 64.
    """
    known, embedded = len(tokenizer), vocabulary_size(model)
    # Embeddings are often padded beyond the tokenizer, by at most a few per cent. A tokenizer's
    # image token may lie beyond the embeddings of a text-only model (Gemma 3).
    padded = -(-known // _PADDING) * _PADDING
    if known < 0.9 * embedded > 0.9 * padded or tokenizer.vocab_size > embedded:
        raise ValueError(
            f"the tokenizer knows {known} tokens and the model embeds {embedded}: they do not "
            "belong together; load both from the same path (wrap(..., verify=False) takes them as "
            "they are)"
        )


_PADDING = 64  # the multiple to which embeddings are often padded, which shows in small models

_in_evaluation: WeakKeyDictionary[nn.Module, list[list[nn.Module]]] = WeakKeyDictionary()
_modes = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore each module's own mode afterwards.

    Several threads may be inside at once; the last one out restores the modes.
    """
    key = language_model(model)
    with _modes:
        training = [module for module in model.modules() if module.training]
        _in_evaluation.setdefault(key, []).append(training)
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _modes:
            if len(_in_evaluation[key]) > 1:
                # Other threads still need evaluation mode: the last one restores these modules too.
                mine = _in_evaluation[key].pop()
                _in_evaluation[key][0].extend(mine)
            else:
                for module in _in_evaluation.pop(key)[0]:
                    module.training = True
