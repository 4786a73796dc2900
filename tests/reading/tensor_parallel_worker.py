"""One of the processes among which the heads of a model are divided."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reading.reader import AttentionReader
from tests.reading.comparison import SOME_LAYERS, prompt

torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = {}
for family in ("llama", "qwen3"):
    model = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto").eval()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.to_local().shape[0] * 2 == attention.q_proj.weight.shape[0]
    reader = AttentionReader(model, backend="interface")
    reader.verify()
    found[family] = reader.read(*prompt("left"), SOME_LAYERS)
try:
    AttentionReader(model)
    found["refused"] = ""
except UnsupportedArchitectureError as error:
    found["refused"] = str(error)
torch.save(found, folder / f"{distributed.get_rank()}.pt")
distributed.destroy_process_group()
