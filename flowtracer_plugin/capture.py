"""Run a model and read its attention: the one module that touches nnsight.

nnsight reads the source of every traced block and runs it beside the forward pass, so the blocks
here stay plain: reads in the order of execution, no decorator, no `no_grad` around a read.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import nnsight
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowtracer_plugin.attention import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    NoAttentionError,
    UnsupportedArchitectureError,
    find_adapter,
)
from flowtracer_plugin.head_mean import add_head_mean, row_probabilities

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""nnsight runs one trace at a time on a model, however many tracers share it."""


CHECK_TOKENS = 17
"""Length of the self-check's input: no model has so many heads, so the axes cannot be mixed up."""


class AttentionReader:
    """Reads the head-averaged attention of one model.

    The model keeps its weights, configuration and attention implementation. nnsight puts a
    controller around every module's `forward` that does nothing outside a trace. Readers of one
    model wait for each other; any other use of the model while one reads fails, in both threads.
    """

    def __init__(
        self, model: nn.Module, adapter: AttentionAdapter | None = None, *, block: int = 64
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1 query row, got {block!r}")
        _check_wrapper(model)
        self.model = model
        self.adapter = find_adapter(model, None if adapter is None else [adapter])
        self.sites = self.adapter.sites(model)
        if not self.sites:
            raise NoAttentionError(f"{type(model).__name__} has no attention to read")
        self.block = block
        self.verified = False
        self._root = _instrumented(model)
        # However the model is wrapped, its first attention module is the same.
        self._lock = _locks.setdefault(model.get_submodule(self.sites[0].module), RLock())
        self._accepted = _accepted_arguments(model)

    def read(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        *,
        heads: Mapping[int, Int[Tensor, " chosen"]] | None = None,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch query key"]:
        """Mean over `layers` and their heads, float32, rows and columns of padding zero.

        The forward pass ends at the last of the layers. `heads` restricts layers to some query
        heads; `model_inputs` are passed on to the model.
        """
        sites = [site for site in self.sites if site.layer in set(layers)]
        inputs = self._inputs(input_ids, attention_mask, model_inputs or {})
        length = input_ids.shape[1]
        total = torch.zeros(len(input_ids), length, length, device=input_ids.device)
        with self._running():
            self._accumulate(inputs, sites, total, heads or {})
        hidden = ~attention_mask.to(total.device)  # filled, not multiplied: 0 times NaN is NaN
        return total.masked_fill_(hidden[:, :, None], 0).masked_fill_(hidden[:, None, :], 0)

    def _accumulate(
        self,
        inputs: dict[str, Any],
        sites: Sequence[AttentionSite],
        total: Float[Tensor, "batch query key"],
        heads: Mapping[int, Int[Tensor, " chosen"]],
    ) -> None:
        operations = [(site, self._operation(site)) for site in sites]
        with self._root.trace(**inputs) as run:
            for site, operation in operations:
                args, kwargs = operation.inputs
                add_head_mean(
                    self.adapter.read(self.model.get_submodule(site.module), args, kwargs),
                    total,
                    weight=1 / len(sites),
                    heads=heads.get(site.layer),
                    block=self.block,
                )
            run.stop()

    def verify(self) -> None:
        """Check once, on a short input, that what is read is what the model computes.

        At every site the probabilities, times the values, must give the attention output that the
        model itself went on with, whatever implementation computed it; and a traced forward pass
        must give the logits of a plain one.

        Raises:
            AdapterMismatchError: They differ.
        """
        if self.verified:
            return
        device = next(self.model.parameters()).device
        token = torch.arange(CHECK_TOKENS, device=device)[None]
        for padding in (0, 5):  # without padding, many models pass no mask at all
            self._verify(token % vocabulary_size(self.model), token >= padding)
        self.verified = True

    def _verify(
        self, input_ids: Int[Tensor, "1 token"], attention_mask: Bool[Tensor, "1 token"]
    ) -> None:
        inputs = self._inputs(input_ids, attention_mask, {})
        with self._running():
            errors, traced = self._reconstruct(inputs, attention_mask[0])
            plain = self.model(**inputs).logits
        if not torch.isfinite(plain).all():
            raise ValueError(
                f"{type(self.model).__name__} computes logits that are not finite on a short text: "
                "its weights are damaged, or too large for its dtype; load it in another dtype"
            )
        for site, error, tolerance in errors:
            if not error <= tolerance:
                raise AdapterMismatchError(
                    f"the adapter {self.adapter.name!r} misreads {site.module}: probabilities "
                    f"times values differ from the attention output by {error:.1e} of its size, "
                    f"wanted at most {tolerance:.0e}; mend its read(), or wrap(..., adapter=...) "
                    "another one"
                )
        if not _difference(traced, plain) <= _rounding(plain):
            raise AdapterMismatchError("a traced forward pass does not give the model's own logits")

    def _reconstruct(
        self, inputs: dict[str, Any], visible: Bool[Tensor, " token"]
    ) -> tuple[list[tuple[AttentionSite, float, float]], Tensor]:
        operations = [(site, self._operation(site)) for site in self.sites]
        errors: list[tuple[AttentionSite, float, float]] = []
        with self._root.trace(**inputs):
            for site, operation in operations:
                args, kwargs = operation.inputs
                call = self.adapter.read(self.model.get_submodule(site.module), args, kwargs)
                errors.append((site, *_output_error(call, operation.output, visible)))
            logits = nnsight.save(self._root.output.logits)
        return errors, logits

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The model in evaluation mode, while other readers of it wait."""
        with self._lock, evaluating(self.model):
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything that a trace needs around it, and an error that a user can act on."""
        with self.exclusive(), torch.no_grad():
            try:
                yield
            except OutOfOrderError as error:
                raise AdapterMismatchError(
                    f"the adapter {self.adapter.name!r} lists an attention call that "
                    f"{type(self.model).__name__} does not make, or makes in another order: "
                    f"{error}; mend its sites(), or wrap(..., adapter=...) another one. Or does "
                    "another thread run the model at the same time?"
                ) from error
            finally:
                self._restore()

    def _restore(self) -> None:
        """Put the attention modules' own code back, so that the model can be compiled.

        nnsight instruments a module's code when its source is first asked for, and would leave it.
        """
        for site in self.sites:
            state = vars(self.model.get_submodule(site.module)).get("__nnsight__")
            if state is not None:
                state.body, state.sourced, state.compiled = state.original, False, None

    def _operation(self, site: AttentionSite) -> Any:
        """Handle on the attention call.

        Its label carries a counter that changes between versions, so it is looked up in the
        listing: the last operation of that name is the call, earlier ones are assignments to it.
        """
        source = self._root.get(site.module).source
        name = site.function.replace(".", "_")
        wanted = [op for op in source if op.name.rpartition("_")[0] == name]
        if not wanted:
            raise AdapterMismatchError(
                f"the adapter {self.adapter.name!r} looks for a call of {site.function!r} in "
                f"{site.module}, which makes these: {', '.join(op.name for op in source)}"
            )
        return wanted[-1]

    def _inputs(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        model_inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), **model_inputs}
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        # Left padding must not shift learned positions. Models that see images count their own.
        if "position_ids" in self._accepted and not model_inputs:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        return inputs


def _instrumented(model: nn.Module) -> nnsight.NNsight:
    with warnings.catch_warnings():
        # Another library may have laid its own `forward` over one that was instrumented before, as
        # TRL does, and calls it: nothing is lost.
        warnings.filterwarnings("ignore", ".*`forward` was replaced after nnsight wrapped")
        return nnsight.NNsight(model)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers such as PEFT's.

    Raises:
        TypeError: There is none.
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


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model can embed."""
    embedding = language_model(model).get_input_embeddings()
    return cast("nn.Embedding", embedding).weight.shape[0]


def _check_wrapper(model: nn.Module) -> None:
    """Refuse PEFT methods that put virtual tokens before the text."""
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


def context_length(model: nn.Module) -> int:
    """How many tokens the model has positions for; without a limit, more than any text has."""
    config = language_model(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_length(model: nn.Module, length: int) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ValueError: There are more.
    """
    if length > (limit := context_length(model)):
        raise ValueError(
            f"prompt and response have {length} tokens, more than the model's context of "
            f"{limit}; shorten them"
        )


def check_input(model: nn.Module, input_ids: Tensor, mask: Tensor) -> None:
    """Refuse what the model cannot read.

    Raises:
        ValueError: Shapes differ, a token is outside the vocabulary, or there are too many.
    """
    if input_ids.ndim != 2 or input_ids.shape != mask.shape:
        raise ValueError(
            "input_ids and attention_mask must both be [batch, token], got "
            f"{tuple(input_ids.shape)} and {tuple(mask.shape)}"
        )
    # Padding does not count: positions begin at the first token that is visible.
    check_length(model, int(mask.bool().sum(-1).max()))
    size = vocabulary_size(model)
    if not bool(((input_ids >= 0) & (input_ids < size)).all()):
        raise ValueError(
            f"token ids must be between 0 and {size - 1}, the model's vocabulary, got "
            f"{int(input_ids.min())} to {int(input_ids.max())}"
        )


def check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        ValueError: It knows tokens that the model does not embed, or fewer than 90 % of them.
    """
    known, embedded = len(tokenizer), vocabulary_size(model)
    # Embeddings are often padded beyond the tokenizer, by at most a few per cent. Of a tokenizer, a
    # token for images may lie beyond the embeddings of its text-only models (Gemma 3).
    if known < 0.9 * embedded or tokenizer.vocab_size > embedded:
        raise ValueError(
            f"the tokenizer knows {known} tokens and the model embeds {embedded}: they do not "
            "belong together; load both from the same path (wrap(..., verify=False) takes them as "
            "they are)"
        )


def _accepted_arguments(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(language_model(model).forward).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with every module's own mode put back: frozen parts may be in eval."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _output_error(
    call: AttentionCall, output: Any, visible: Bool[Tensor, " token"]
) -> tuple[float, float]:
    """How far probabilities times values are from the model's attention output, and the bound."""
    if call.value is None:
        raise AdapterMismatchError("the adapter reads no values, which the self-check needs")
    wanted = output[0] if isinstance(output, tuple) else output
    with torch.autocast(wanted.device.type, enabled=False):
        probabilities = row_probabilities(call, slice(0, call.query.shape[2]))
        value = call.value[:, :, : probabilities.shape[-1]].detach().float()
        folded = rearrange(
            probabilities, "b (group each) q k -> b group (each q) k", group=value.shape[1]
        )
        found = rearrange(
            folded @ value, "b group (each q) width -> b q (group each) width", q=len(visible)
        )
    if wanted.shape == found.transpose(1, 2).shape:  # PyTorch's own functions put heads first
        wanted = wanted.transpose(1, 2)
    if wanted.numel() != found.numel():
        raise AdapterMismatchError(
            f"probabilities times values have the shape {list(found.shape)}, "
            f"the attention output has {list(wanted.shape)}"
        )
    # What a padding token looks at is up to the implementation, and never used.
    wanted, found = wanted.reshape(found.shape)[:, visible], found[:, visible]
    return _difference(found, wanted), _rounding(call.value)


def _difference(found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> float:
    """Root mean square of the difference, as a share of the size of what was wanted."""
    wanted = wanted.detach().float()
    size = wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny)
    return float((found.detach().float() - wanted).norm() / size)


def _rounding(computed: Float[Tensor, "..."]) -> float:
    """The share of a value that the implementation's own rounding may account for."""
    # Half precision keeps 8 to 11 bits of the output; TF32 products on a GPU keep 10.
    return 2e-3 if computed.dtype == torch.float32 else 2e-2
