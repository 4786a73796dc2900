"""A tiny random model of every type, whose attention is as peaked as a trained model's."""

from __future__ import annotations

from copy import deepcopy

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig
from transformers.pytorch_utils import Conv1D

from tests.conformance.tiny_configs import tiny_config
from tests.conformance.type_table import GAINS, PARTS
from tests.families import quiet_transformers

_RECURRENT = ("A_log", "D", "dt_bias", "time_decay", "time_first")
"""Parameters of recurrent layers, which must stay in their range to keep the state finite."""


def tiny_pair(
    model_type: str, *, seed: int = 0, gain: float | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice: on its default attention implementation, and on eager attention."""
    config = tiny_config(model_type)
    with quiet_transformers():
        model = _built(model_type, config, None)
        twin = _built(model_type, config, "eager")
    redraw(model, seed=seed, gain=GAINS.get(model_type, 1.3) if gain is None else gain)
    twin.load_state_dict(model.state_dict())
    return model, twin


def _built(
    model_type: str, config: PreTrainedConfig, implementation: str | None
) -> PreTrainedModel:
    torch.manual_seed(0)  # buffers are drawn as well, and not all of them are saved
    chosen = {} if implementation is None else {"attn_implementation": implementation}
    # Models write the attention implementation that they chose into their configuration.
    own = without_towers(deepcopy(config))
    if model_type in PARTS:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return model_class._from_config(own, **chosen).eval()
    return AutoModelForCausalLM.from_config(own, **chosen).eval()


class NoVisionConfig(Gemma3nVisionConfig):
    """The configuration in the place of Gemma 3n's vision tower, which needs the package timm."""


class NoVision(PreTrainedModel):
    """An empty vision tower: text never runs through it."""

    config_class = NoVisionConfig

    def __init__(self, config: NoVisionConfig) -> None:
        super().__init__(config)
        self.post_init()


AutoModel.register(NoVisionConfig, NoVision)


def without_towers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without a part that needs a package only for images."""
    if type(getattr(config, "vision_config", None)) is Gemma3nVisionConfig:
        config.vision_config = NoVisionConfig(hidden_size=64, vocab_size=16)
    return config


def redraw(model: nn.Module, *, seed: int, gain: float) -> None:
    """Weights so large that attention has peaks: without them every wrong reading looks right."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            attends = "Attention" in type(module).__name__
            for name, parameter in module.named_parameters(recurse=False):
                if name in _RECURRENT or not parameter.is_floating_point():
                    continue
                if isinstance(module, nn.Embedding):
                    parameter.normal_(0, 1, generator=drawn)
                elif parameter.ndim > 1:
                    parameter.normal_(0, gain * _fan_in(module, parameter) ** -0.5, generator=drawn)
                elif "bias" in name or "sink" in name or attends:
                    # Scales stay near the 1 they begin with, and what begins with 0 becomes small.
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=drawn))
                elif name != "weight" and not parameter.any():  # a scale that begins with 0
                    parameter.normal_(1.5, 0.3, generator=drawn)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return weight[0].numel()
    return weight.shape[0 if isinstance(module, Conv1D) else -1]
