"""Does a trace cost more than the forward pass that it looks into?

    python benchmarks/trace_against_forward.py [--lengths 512 1024 2048] [--rounds 5]

One random Llama of 12 layers, one sequence, one thread, float32 on the CPU. In each round the three
run one after the other, so that what else the machine does hits all of them; medians are compared.
The trace includes the flow. `output_attentions` is the eager model that keeps every map.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import flowtracer_plugin as ft

RESULTS = Path(__file__).parent / "results" / "trace_against_forward.json"
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=8192,
)


def build(implementation: str) -> LlamaForCausalLM:
    # Two models must not share a configuration: the second would switch the first one's attention.
    config = copy.deepcopy(CONFIG)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def ways(model: LlamaForCausalLM, length: int) -> dict[str, Callable[[], object]]:
    """What is compared, on the same ids."""
    ids = torch.randint(0, CONFIG.vocab_size, (1, length))
    place = torch.arange(length)[None]
    question, answer = (place > 0) & (place < length // 4), place >= length - 4
    tracer = ft.wrap(model)
    eager = build("eager")
    eager.load_state_dict(model.state_dict())
    return {
        "forward": lambda: model(input_ids=ids, use_cache=False),
        "trace": lambda: ft.solve_flow(tracer.attention(ids), question, answer),
        "output_attentions": lambda: eager(input_ids=ids, use_cache=False, output_attentions=True),
    }


@torch.no_grad()
def seconds(length: int, rounds: int) -> dict[str, float]:
    """Median seconds of each way."""
    torch.manual_seed(0)
    model = build("sdpa")
    compared = ways(model, length)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for run in compared.values():
        run()
    for _ in tqdm(range(rounds), desc=f"{length} tokens", unit="round"):
        for name, run in compared.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for length in arguments.lengths:
        row = seconds(length, arguments.rounds)
        ratios = {f"trace / {name}": row["trace"] / row[name] for name in row if name != "trace"}
        rows.append({"tokens": length, "seconds": row, "ratios": ratios})
        print(length, {name: round(ratio, 2) for name, ratio in ratios.items()})
    packages = ("torch", "transformers", "nnsight")
    report = {
        "command": " ".join(["python", "benchmarks/trace_against_forward.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {platform.system()}, one thread, CPU",
        "versions": {name: version(name) for name in packages},
        "rounds": arguments.rounds,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
