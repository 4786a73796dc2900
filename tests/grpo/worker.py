"""A policy that trains in a second, its data, and one process of a distributed run."""

import gc
import inspect
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from flowtracer_plugin.credit import read_rollouts
from flowtracer_plugin.grpo import FlowCreditMixin, FlowGRPOConfig, FlowGRPOTrainer, script
from tests.families import tiny_model

# Half of TrainingArguments' fields do not hold what they declare, which the tests' type checker
# would refuse.
FlowGRPOConfig.__init__ = inspect.unwrap(FlowGRPOConfig.__init__)

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "so", "then", "plus", "is", "apples", "####"]
METRICS = (
    "answer_found",
    "weight_mean",
    "top_share",
    "entropy",
    "prompt_jump",
    "errors",
    "seconds",
)
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
    """The folder, with a random model and its tokenizer."""
    model = tiny_model("llama", vocab_size=len(WORDS))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def reward(prompts, completions, completion_ids, **columns):
    """Rewards that differ between completions and depend on their tokens only."""
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
    eval_dataset=False,
    **options,
):
    """A trainer of this kind; a policy is a folder or a model."""
    config_kind = FlowGRPOConfig if issubclass(kind, FlowCreditMixin) else GRPOConfig
    data = Dataset.from_dict(rows or {"prompt": PROMPTS * 4})
    return kind(
        policy,
        reward_funcs,
        args=config(config_kind, folder, **options),
        processing_class=word_tokenizer(),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if eval_dataset else None,
        peft_config=peft_config,
        rollout_func=rollout_func,
    )


def build_rloo(policy, folder, reward_funcs, rows=None):
    """The same for RLOO, which has no token-level credit."""
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


def shard(trainer):
    """The trainer with FSDP2 as accelerate applies it, which it does on accelerators only."""
    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    trainer.accelerator.prepare_model = lambda model, **_: model
    return trainer


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "communication_data_type": "fp32",
}
"""DeepSpeed's sharding, which the processes' environment asks for."""


def whole(model):
    """Every parameter of a sharded model."""
    if sharded_by_deepspeed(model):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: part.detach().clone() for name, part in model.named_parameters()}
    return {
        name: part.full_tensor() if isinstance(part, DTensor) else part
        for name, part in model.state_dict().items()
    }


def sharded_by_deepspeed(model):
    return all(hasattr(part, "ds_id") for part in model.parameters())


def fail_once():
    """Let the next call that solves flow fail."""
    solve = read_rollouts.solve_rollouts

    def failing(*args):
        read_rollouts.solve_rollouts = solve
        raise ArithmeticError("no flow on this rank")

    read_rollouts.solve_rollouts = failing


def run(policy, folder, *, flow, sharded, fails=False, **options):
    """A report of one training run as one rank, and the parameters at its end.

    The first rank finds an answer in every completion, the second finds none.
    """
    answers = int(os.environ["RANK"]) == 0
    texts = ["so 3 is 7", "so then 5"] if answers else ["so then", "is then plus apples so"]
    kind = FlowGRPOTrainer if flow else GRPOTrainer
    if sharded == "ZeRO-3":
        options["deepspeed"] = dict(ZERO3)
    trainer = build(kind, policy, folder, rollout_func=scripted(texts), **options)
    if sharded == "FSDP2":
        shard(trainer)
    if fails and not answers:
        fail_once()
    passes = []
    trainer.model.model.layers[3].register_forward_pre_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    trainer.train()
    said = {
        "processes": trainer.accelerator.num_processes,
        "ZeRO-3": sharded_by_deepspeed(trainer.model),
        "passes": passes,
        "training": all(module.training for module in trainer.model.modules()),
        "random": torch.rand(3).tolist(),
        "log": [step for step in trainer.state.log_history if "loss" in step],
    }
    return said, whole(trainer.model)


def main(policy, folder, runs):
    """Train every run as one rank, and write its report and its parameters."""
    rank = os.environ["RANK"]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # each run collects garbage
    for name, options in runs.items():
        if "script" in options:  # the last run, since it ends the process group
            script.main(options["script"])
            return
        said, state = run(policy, folder / name, **options)
        torch.save(state, folder / f"{name}-{rank}.pt")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else its threads may abort the process as it ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
