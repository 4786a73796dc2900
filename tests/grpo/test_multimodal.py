"""GRPO on prompts with images: the pass that sees them is the pass that is read."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from flowtracer_plugin.grpo import FlowCreditMixin, FlowGRPOConfig
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.grpo.trained import same_parameters, watched
from tests.grpo.worker import WORDS, config, reward
from tests.reading.test_vision_language import IMAGE, tiny_model

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

SAID = "so 2 apples plus 5 is 7"


def tokenizer():
    """A word for every id that the tiny models embed."""
    names = [*WORDS, *(f"word{number}" for number in range(len(WORDS), 128))]
    names[IMAGE] = "<image>"
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


class Seeing(GRPOTrainer):
    """Its rollouts are about images, as TRL's are with a processor."""

    flipped = False

    def _generate_and_score_completions(self, inputs):
        rows = len(inputs)
        drawn = torch.Generator().manual_seed(self.state.global_step)
        prompt = torch.randint(30, 100, (rows, 12), generator=drawn)
        prompt[:, 3:7] = IMAGE
        said = torch.tensor([tokenizer()(SAID)["input_ids"]] * rows)
        places = (torch.cat([prompt, said], dim=1) == IMAGE).long()
        pixels = torch.randn(16 * rows, 48, generator=drawn)
        return {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": said,
            "completion_mask": torch.ones_like(said),
            "advantages": torch.linspace(-1, 1, rows) + 0.1,
            "num_items_in_batch": torch.tensor(said.numel()),
            "pixel_values": pixels.flip(0) if self.flipped else pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
            "mm_token_type_ids": places,
            "num_images": [1] * rows,
        }


class FlowSeeing(FlowCreditMixin, Seeing):
    pass


def trained(kind, folder, *, flipped=False, **options):
    settings = FlowGRPOConfig if kind is FlowSeeing else GRPOConfig
    trainer = kind(
        tiny_model("qwen2_5_vl"),
        reward,
        args=config(settings, folder, max_steps=2, **options),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": ["so"] * 16}),
    )
    trainer.flipped = flipped
    seen = watched(trainer)
    trainer.train()
    return trainer, torch.cat([step[WEIGHTS] for step in seen]) if kind is FlowSeeing else None


def test_the_training_pass_and_an_extra_one_see_the_same_images(tmp_path):
    _, training = trained(FlowSeeing, tmp_path)
    _, extra = trained(FlowSeeing, tmp_path, flow_pass="extra")
    assert torch.equal(training, extra)
    assert sorted(training.unique().tolist()) == [1.0, 1.5]


def test_the_images_matter(tmp_path):
    _, weights = trained(FlowSeeing, tmp_path)
    _, others = trained(FlowSeeing, tmp_path, flipped=True)
    assert not torch.equal(weights, others)


@pytest.mark.parametrize("chosen", ["training", "extra"])
def test_uniform_credit_is_plain_grpo(tmp_path, chosen):
    ours, _ = trained(FlowSeeing, tmp_path, flow_gamma=1.0, flow_pass=chosen)
    plain, _ = trained(Seeing, tmp_path)
    assert same_parameters(ours, plain)
