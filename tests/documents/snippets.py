"""Code blocks of documents, and the names that a reader has defined before a snippet."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples" / "reasoner" / "model"

_ANSI_C = re.compile(r"\$'([^']*)'")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; `printed` is the block of text right after it, if there is one."""

    language: str
    text: str
    line: int
    printed: str | None = None


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    printed = {
        one.start(): two[2]
        for one, two in pairwise(found)
        if two[1] == "text" and not text[one.end() : two.start()].strip()
    }
    return [
        Block(one[1], one[2], text[: one.start()].count("\n") + 2, printed.get(one.start()))
        for one in found
    ]


def run(block: Block, names: dict[str, Any], document: str) -> str:
    """Run a block and return its output; a traceback shows the document's lines."""
    output = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, document, "exec")
    with contextlib.redirect_stdout(output):
        exec(code, names)
    return output.getvalue()


def commands(document: Path, program: str = "flowtracer") -> Iterator[list[str]]:
    """The arguments of every call of `program`, in shell blocks and in running text."""
    text = document.read_text(encoding="utf-8")
    shell = "\n".join(block.text for block in blocks(document) if block.language == "bash")
    inline = re.findall(rf"`({program} [^`]+)`", _BLOCK.sub("", text))
    for line in [*shell.replace("\\\n", " ").splitlines(), *inline]:
        words = shlex.split(_ANSI_C.sub(_unescaped, line), comments=True)
        if words[:1] == [program]:
            yield words[1:]


def _unescaped(quoted: re.Match[str]) -> str:
    """The same argument without the quoting of bash that shlex does not know."""
    return shlex.quote(quoted[1].replace("\\n", "\n"))


def load_reasoner() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(REASONER), AutoTokenizer.from_pretrained(REASONER)


def names_at_hand(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Names for snippets that continue earlier code."""
    from datasets import Dataset
    from trl import GRPOTrainer

    import flowtracer_plugin as ft
    from examples.demo import accuracy_reward
    from flowtracer_plugin.grpo import FlowGRPOConfig

    prompt, response = "Ann has 4 apples. How many apples?\n", r"The answer is \boxed{4}"
    data = Dataset.from_list([{"prompt": prompt, "answer": 4}])
    config = FlowGRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[])
    tracer = ft.wrap(model, tokenizer)
    trace = tracer.trace(prompt, response)
    return {
        "ft": ft,
        "model": model,
        "tokenizer": tokenizer,
        "load": lambda: (model, tokenizer),
        "prompt": prompt,
        "response": response,
        "tracer": tracer,
        "trace": trace,
        "attention": trace.attention,
        "question": trace.spans.question,
        "answer": trace.spans.answer,
        "accuracy": accuracy_reward,
        "config": config,
        "data": data,
        "GRPOTrainer": lambda *args, **named: GRPOTrainer(*args, args=config, **named),
        "your_trainer": GRPOTrainer(model, accuracy_reward, args=config, train_dataset=data),
    }
