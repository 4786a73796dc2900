"""Models that also see images: the text part is read, with and without an image."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)

import flowtracer_plugin as ft
from flowtracer_plugin.reading.runner import BACKENDS
from tests.families import quiet_transformers
from tests.reading.comparison import assert_close

IMAGE = 120
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1,
            "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE, video_token_id=121, vision_start_token_id=122,
        vision_end_token_id=123,
    ),
    "gemma3": Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
        vision_config=SIGHT, image_token_index=IMAGE, boi_token_index=121, eoi_token_index=122,
        mm_tokens_per_image=4,
    ),
    "smolvlm": SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGHT, image_token_id=IMAGE,
        scale_factor=2,
    ),
}  # fmt: skip
KINDS = tuple(CONFIGS)


def tiny_model(kind: str) -> PreTrainedModel:
    with quiet_transformers():
        model = AutoModelForImageTextToText.from_config(deepcopy(CONFIGS[kind])).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, 1.3 * fan_in**-0.5, generator=drawn)
    return model


def inputs(kind: str, *, image: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token ids, and what else the model is given; an image takes the place of four tokens."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (1, 30), generator=drawn)
    if not image:
        return ids, {}
    ids[0, 5:9] = IMAGE
    places = (ids == IMAGE).long()
    if kind == "qwen2_5_vl":
        pixels = torch.randn(16, 48, generator=drawn)
        size = torch.tensor([[1, 4, 4]])
        return ids, {"pixel_values": pixels, "image_grid_thw": size, "mm_token_type_ids": places}
    if kind == "gemma3":
        pixels = torch.randn(1, 3, 16, 16, generator=drawn)
        return ids, {"pixel_values": pixels, "token_type_ids": places}
    return ids, {"pixel_values": torch.randn(1, 1, 3, 16, 16, generator=drawn)}


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_mean_equals_what_eager_reports(kind, image):
    ids, others = inputs(kind, image=image)
    twin = tiny_model(kind)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        reported = twin(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True,
            use_cache=False, **others,
        ).attentions  # fmt: skip
    assert reported[1][:, :, 8:].amax(-1).mean() > 0.15
    wanted = torch.stack([reported[layer].mean(1) for layer in (1, 2)]).mean(0)
    for backend in BACKENDS:
        tracer = ft.wrap(tiny_model(kind), layers=[1, 2], backend=backend, preset="paper")
        assert_close(tracer.attention(ids, model_inputs=others), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_changes_what_the_text_looks_at(kind):
    ids, others = inputs(kind, image=True)
    tracer = ft.wrap(tiny_model(kind), layers=[1, 2], preset="paper")
    first = tracer.attention(ids, model_inputs=others)
    other = {**others, "pixel_values": others["pixel_values"].flip(-1)}
    assert (tracer.attention(ids, model_inputs=other) - first).abs().max() > 1e-3


def test_only_the_text_is_read():
    for kind in KINDS:
        modules = [site.module for site in ft.wrap(tiny_model(kind), preset="paper").reader.sites]
        assert len(modules) == 4
        assert not any("vision" in module or "visual" in module for module in modules)
