"""A tiny random Llama and a byte-level tokenizer that fits it, built in code."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model

CONTEXT = 192
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
PROMPT = "Tom had 3 apples. He ate one. How many?"
RESPONSE = " He had 3. 3 - 1 = 2.\nThe answer is 2."
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PROMPT, RESPONSE] * 4, trainer)
    return backend.to_str()


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """All bytes and the words of `PROMPT` and `RESPONSE`; `chat` adds a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(**overrides: object) -> PreTrainedModel:
    """A random Llama that embeds just the tokens of `tiny_tokenizer`."""
    size = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": CONTEXT}
    return tiny_model("llama", **{**size, **overrides})


def eager_attention(
    model: PreTrainedModel, ids: list[int], layers: tuple[int, ...]
) -> torch.Tensor:
    """The mean over layers and heads of `output_attentions`: [query, key] in float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(torch.tensor([ids], device=model.device), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return torch.stack([out.attentions[layer][0].double().cpu() for layer in layers]).mean((0, 1))
