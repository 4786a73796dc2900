"""Steps of GRPO on a device: TRL's own forward pass and loss, with rollouts that are given.

TRL cannot sample on the simulated device, and its loop moves models itself. So a trainer is built
on the host, its model is moved, and its three methods are called as its loop calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowtracer_plugin.grpo import FlowGRPOTrainer
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.device.paths import Place
from tests.families import tiny_model
from tests.grpo.worker import WORDS, build, word_tokenizer

ASKED = ["3 plus 4 is", "3 plus 4 is"]
SAID = ["then 4 plus 3 is 7 apples so", "so 1 then #### 9"]


class Steps:
    """A trainer on a device, step by step.

    Args:
        folder: The trainer's folder.
        place: Moves tensors and models to the device.
        **options: Options of the trainer.
    """

    def __init__(self, folder: Path, place: Place, **options: Any) -> None:
        policy = tiny_model("llama", vocab_size=len(WORDS), num_hidden_layers=2)
        shared = {"per_device_train_batch_size": 2, "flow_page_steps": 0}
        shared["gradient_checkpointing"] = False
        self.trainer = build(FlowGRPOTrainer, policy, folder, **{**shared, **options})
        self.trainer.model = place(self.trainer.model).train()
        self.trainer.model_wrapped = self.trainer.model
        self.trainer.current_gradient_accumulation_steps = 1
        self.scores = self.trainer.num_iterations > 1
        self._place = place
        tokenizer = word_tokenizer()
        asked = tokenizer(ASKED, return_tensors="pt", padding=True, padding_side="left")
        said = tokenizer(SAID, return_tensors="pt", padding=True)
        self._given = {
            "prompt_ids": asked["input_ids"],
            "prompt_mask": asked["attention_mask"],
            "completion_ids": said["input_ids"],
            "completion_mask": said["attention_mask"],
            "advantages": torch.tensor([1.0, -0.5]),
        }

    def __call__(self) -> dict[str, torch.Tensor]:
        """The weights, the advantages, the loss and a gradient of one step."""
        trainer, credit = self.trainer, self.trainer._flow_credit
        with torch.no_grad():
            rollouts = credit.generation(self._generate, [])
        rollouts["num_items_in_batch"] = rollouts["completion_mask"].sum()
        loss = trainer._compute_loss(trainer.model, rollouts)
        loss.backward()
        first = trainer.model.model.layers[0].self_attn.q_proj.weight
        found = {
            "weights": rollouts[WEIGHTS],
            "advantages": rollouts["advantages"],
            "loss": loss.detach(),
            "gradient": first.grad,
        }
        trainer.model.zero_grad()
        return found

    def _generate(self, _inputs: Any) -> dict[str, torch.Tensor]:
        """Rollouts as TRL returns them, with a scoring pass if the trainer would make one."""
        found = {name: self._place(value) for name, value in self._given.items()}
        if self.scores:
            ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
            mask = torch.cat([found["prompt_mask"], found["completion_mask"]], 1)
            kept, trainer = found["completion_ids"].shape[1], self.trainer
            found["old_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, kept, batch_size=2
            )[0]
        return found
