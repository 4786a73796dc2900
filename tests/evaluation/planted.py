"""A model whose weights were written by hand, so that we know what its answer depends on.

A text holds edges `a>b` of a graph, one from and one to every node, then a question `?a`, then the
node that is two steps away from `a`. In the first layer the token `a>b` looks up `b>c` before it
and takes over `c`; in the second the question looks up `a>b` and takes over that `c`. So the answer
depends on exactly two tokens, and the token that chooses it attends to one of them only.
"""

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.families import quiet_transformers

NODES = "abcdefghijkl"
COUNT = len(NODES)
START = ["^ ", "@ "]
VOCABULARY = (
    START
    + [f"{a}>{b} " for a in NODES for b in NODES]
    + [f"?{a} " for a in NODES]
    + [f"={a}" for a in NODES]
)
IDS = {name: number for number, name in enumerate(VOCABULARY)}
SHARP = 40.0


def planted_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="^ "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S+ ?"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def planted_model():
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=5 * COUNT,
        n_layer=2,
        n_head=1,
        n_positions=64,
        n_inner=4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with quiet_transformers():
        model = GPT2LMHeadModel(config).eval()
    start, end, asked, found, result = (slice(n * COUNT, (n + 1) * COUNT) for n in range(5))
    one = torch.eye(COUNT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        for name, number in IDS.items():
            row = model.transformer.wte.weight[number]
            if ">" in name:
                row[start][NODES.index(name[0])] = row[end][NODES.index(name[2])] = 1.0
            elif name[0] == "?":
                row[asked][NODES.index(name[1])] = 1.0
            elif name[0] == "=":
                model.lm_head.weight[number, result] = SHARP * one[NODES.index(name[1])]
        heads = [(end, start, end, found), (asked, start, found, result)]
        for block, (query, key, value, output) in zip(model.transformer.h, heads, strict=True):
            width = 5 * COUNT
            block.attn.c_attn.weight[query, :COUNT] = SHARP * one
            block.attn.c_attn.weight[key, width : width + COUNT] = one
            block.attn.c_attn.weight[value, 2 * width : 2 * width + COUNT] = one
            block.attn.c_proj.weight[:COUNT, output] = one
    return model


def planted_text(seed):
    """Ids of prompt and response, places of the two true tokens, and the right node."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(list(NODES)).tolist()
    after = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    first = NODES[rng.integers(COUNT)]
    middle = after[first]
    edges = [f"{a}>{after[a]} " for a in rng.permutation(list(NODES))]
    near, far = f"{first}>{middle} ", f"{middle}>{after[middle]} "
    places = sorted([edges.index(near), edges.index(far)])
    edges[places[0]], edges[places[1]] = far, near
    response = [*edges, f"?{first} ", f"={after[middle]}"]
    prompt = [IDS[name] for name in START]
    true = {"far": len(START) + places[0], "near": len(START) + places[1]}
    return prompt, [IDS[name] for name in response], true, after[middle]


def planted_story(seed):
    """Prompt and response of `planted_text` as strings."""
    prompt, response, *_ = planted_text(seed)
    return tuple("".join(VOCABULARY[token] for token in ids) for ids in (prompt, response))
