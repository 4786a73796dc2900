"""A policy that trains in a second, what it is trained on, and one process of a distributed run."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, RLOOConfig, RLOOTrainer

from flowtracer_plugin.grpo import FlowCreditMixin, FlowGRPOConfig, FlowGRPOTrainer
from tests.families import tiny_model

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "so", "then", "plus", "is", "apples", "####"]
PROMPTS = ["3 plus 4 is", "so 2 apples plus 5 apples is", "1 plus 1 plus 1 is", "9 apples is"]
CHAT = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}so then{% endif %}"
)


def word_tokenizer():
    """One token a word; a third of the words are digits, so that random text has answers."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def save_policy(folder):
    """Write a random model and its tokenizer, and return where."""
    model = tiny_model("llama", vocab_size=len(WORDS))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def reward(prompts, completions, completion_ids, **columns):
    """Differs between completions, and depends on nothing but their tokens."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def config(kind, folder, **options):
    """A `GRPOConfig`, or a subclass, for a few short steps on the CPU."""
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        **options,
    }
    return kind(str(folder / "out"), **settings)


def build(
    kind,
    policy,
    folder,
    reward_funcs=reward,
    *,
    rows=None,
    peft_config=None,
    rollout_func=None,
    **options,
):
    """A trainer of this kind; a policy is a folder or a model."""
    config_kind = FlowGRPOConfig if issubclass(kind, FlowCreditMixin) else GRPOConfig
    return kind(
        policy,
        reward_funcs,
        args=config(config_kind, folder, **options),
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_dict(rows or {"prompt": PROMPTS * 4}),
        peft_config=peft_config,
        rollout_func=rollout_func,
    )


def build_rloo(policy, folder, reward_funcs, rows=None):
    """The same for RLOO, which knows nothing of token-level credit."""
    return RLOOTrainer(
        policy,
        reward_funcs,
        args=config(RLOOConfig, folder),
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_dict(rows or {"prompt": PROMPTS * 4}),
    )


def scripted(texts, masks=None):
    """A `rollout_func` that gives these completions in turn; `masks` are 0 on a tool's tokens."""
    tokenizer = word_tokenizer()

    def rollout(prompts, trainer):
        turns = [i % len(texts) for i in range(len(prompts))]
        rollouts = {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": [tokenizer(texts[turn])["input_ids"] for turn in turns],
            "logprobs": None,
        }
        return rollouts if masks is None else {**rollouts, "env_mask": [masks[i] for i in turns]}

    return rollout


def main(policy, folder):
    """Train as one rank, and write what must agree with the other ranks.

    The first rank finds an answer in every completion, the second finds none.
    """
    answers = int(os.environ["RANK"]) == 0
    texts = ["so 3 is 7", "so then 5"] if answers else ["so then", "is then plus apples so"]
    trainer = build(FlowGRPOTrainer, policy, folder, rollout_func=scripted(texts))
    passes, spread = [], trainer._flow_credit.spread

    def counted(rollouts):
        count = trainer.model.model.embed_tokens.register_forward_pre_hook(
            lambda *_: passes.append(trainer.model.training)
        )
        try:
            return spread(rollouts)
        finally:
            count.remove()

    trainer._flow_credit.spread = counted
    trainer.train()
    rank = trainer.accelerator.process_index
    torch.save(trainer.model.state_dict(), folder / f"{rank}.pt")
    said = {
        "processes": trainer.accelerator.num_processes,
        "passes": passes,
        "log": [step for step in trainer.state.log_history if "flow/seconds" in step],
    }
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
