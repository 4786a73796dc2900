"""The parts of `first_gpu`, each in steps that take at most a few minutes on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import flowtracer_plugin as ft
from benchmarks.elsewhere import ROOT
from benchmarks.harness import Case, measured, peak_on_device, seconds_of
from benchmarks.models import SMALL, build, device, forward, number_tokenizer
from benchmarks.tables import module_of
from flowtracer_plugin.options import PRESETS
from flowtracer_plugin.reading.reader import AttentionReader
from tests.conformance.compare import BACKENDS, REFUSALS, prompts
from tests.conformance.test_dozen import DOZEN
from tests.conformance.tiny_models import tiny_pair
from tests.families import CONFIGS, quiet_transformers

Left = Callable[[], float]
"""The seconds that are left."""

Step = Callable[[Left], Mapping[str, Any]]

DEFAULT, FLASH_KERNEL, FLASH_2 = "default", "flash kernel", "flash_attention_2"
"""A type's own attention, which mostly is SDPA; SDPA's flash kernel; the package `flash_attn`."""

TRACED = ("paper", "decided", "derivation")
"""The presets of traces that are measured by length, beside a plain forward pass."""

QUESTIONS = (
    "trace_against_forward",
    "presets",
    "rollout_batches",
    "growth",
    "sparse_against_dense",
    "flow_stage",
)
"""Benchmarks that use a GPU if there is one, and need no pretrained model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is run.

    Attributes:
        types: Types of models.
        implementations: Of attention.
        lengths: Tokens of the texts whose traces are measured.
        cases: For each benchmark, the cases that are measured; by default all.
        rounds: Runs of each, of which the median is taken.
        tests: What pytest runs.
    """

    types: tuple[str, ...] = tuple(dict.fromkeys((*DOZEN, *CONFIGS)))
    implementations: tuple[str, ...] = (DEFAULT, FLASH_KERNEL, FLASH_2)
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    cases: Mapping[str, tuple[Case, ...]] = field(
        default_factory=lambda: {name: tuple(module_of(name).CASES) for name in QUESTIONS}
    )
    rounds: int = 3
    tests: tuple[str, ...] = ("-m", "gpu or cuda")


FULL = Size()
REHEARSAL = Size(
    types=("llama", "bloom"),
    implementations=(DEFAULT, FLASH_KERNEL),
    lengths=(64, 128),
    cases={"trace_against_forward": ({"tokens": 24},)},
    rounds=1,
    tests=("-m", "gpu or cuda", "tests/credit/test_weights.py"),
)


def models(size: Size) -> Mapping[str, Step]:
    """Types of models in bfloat16: is what we read what they compute, and how near to float32?"""
    return {
        f"{type_}, {implementation}, {backend}": partial(_model, type_, implementation, backend)
        for type_ in size.types
        for implementation in size.implementations
        if implementation != FLASH_2 or find_spec("flash_attn")
        for backend in BACKENDS
    }


def _model(type_: str, implementation: str, backend: str, _left: Left) -> Mapping[str, Any]:
    """The self-check, and the largest difference of the attention to that in float32 on the CPU."""
    model, twin = tiny_pair(type_)
    prompt = prompts(together=False)[0]  # one text without padding, as flash kernels take it
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's models
        try:
            with _attention_by(model.to(device(), torch.bfloat16), implementation):
                reader = AttentionReader(model, backend=backend)
                reader.verify()
                layers = sorted({site.layer for site in reader.sites})
                found = reader.read(prompt.ids.to(device()), prompt.mask.to(device()), layers)
        except (_NotOfThisTypeError, *REFUSALS) as error:
            return {"said": f"refused: {error}"}
    wanted = AttentionReader(twin, backend=backend).read(prompt.ids, prompt.mask, layers)
    return {
        "said": "read as the model computes it",
        "device": found.device.type,
        "difference": float((found.cpu().float() - wanted).abs().max()),
    }


class _NotOfThisTypeError(Exception):
    """A type of model has no such implementation of attention, or gives it what it cannot take."""


@contextmanager
def _attention_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model on an implementation of attention, by default its own."""
    kernel = implementation == FLASH_KERNEL
    wanted = "sdpa" if kernel else implementation
    if implementation != DEFAULT:
        with suppress(ValueError):  # which says that the type has none
            model.set_attn_implementation(wanted)
        if model.config._attn_implementation != wanted:
            raise _NotOfThisTypeError(f"the type has no {wanted}")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if kernel else nullcontext():
        try:
            yield
        except RuntimeError as error:
            if kernel and "No available kernel" in str(error):  # its own mask, or another shape
                raise _NotOfThisTypeError("no flash kernel takes what the type computes") from error
            raise


def waits(_size: Size) -> Mapping[str, Step]:
    """How often PyTorch itself says that the host waits in a trace, to hold against our count."""
    return {preset: partial(_waits, preset) for preset in PRESETS}


def _waits(preset: str, _left: Left) -> Mapping[str, Any]:
    if not torch.cuda.is_available():
        return {"said": "refused: only CUDA counts them"}
    tracer, prompt, response = _traced(preset, 256)
    tracer.trace_tokens(prompt, response)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            tracer.trace_tokens(prompt, response)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [one for one in caught if "synchroniz" in str(one.message)]
    ours = [f"{one.filename}:{one.lineno}" for one in said if "flowtracer" in one.filename]
    return {"ours": len(ours), "others": len(said) - len(ours), "lines": ours}


def lengths(size: Size) -> Mapping[str, Step]:
    """Seconds and memory of traces of a random Llama of 12 layers, in bfloat16."""
    return {
        f"{tokens} tokens, {name}": partial(_length, tokens, name)
        for tokens in size.lengths
        for name in ("forward", *TRACED)
    }


def _length(tokens: int, name: str, _left: Left) -> Mapping[str, Any]:
    plain = name == "forward"
    tracer, prompt, response = _traced("paper" if plain else name, tokens)
    ids = torch.tensor([[*prompt, *response]], device=device())
    if plain:
        return _measured(lambda: forward(tracer.model, ids, logits_to_keep=1))
    return _measured(lambda: tracer.trace_tokens(prompt, response))


def questions(size: Size) -> Mapping[str, Step]:
    """The questions of `make bench`, case by case, on the device."""
    return {
        f"{name}, {', '.join(f'{key} {value}' for key, value in case.items())}": partial(
            _question, name, case, size.rounds
        )
        for name, cases in size.cases.items()
        for case in cases
    }


def _question(name: str, case: Case, rounds: int, _left: Left) -> Mapping[str, Any]:
    row = measured(module_of(name), case, rounds=rounds)
    said = ", ".join(f"{way} {seconds:.4g} s" for way, seconds in row["seconds"].items())
    return {"said": said, "row": row}


def training(_size: Size) -> Mapping[str, Step]:
    """GRPO with credit: the demo, which trains the small reasoner."""
    demo = [sys.executable, "examples/demo.py", "--out", "build/first_gpu_demo"]
    return {"demo": partial(_command, demo, {})}


def tests(size: Size) -> Mapping[str, Step]:
    """The tests that need a GPU."""
    required = {"FLOWTRACER_REQUIRE": "cuda"} if torch.cuda.is_available() else {}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return {"gpu": partial(_command, [*command, *size.tests], required)}


def _command(command: list[str], environment: Mapping[str, str], left: Left) -> Mapping[str, Any]:
    """The last lines that a command prints.

    Raises:
        RuntimeError: It ends with an error.
        subprocess.TimeoutExpired: It does not end in time.
    """
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=left(),
        capture_output=True,
        text=True,
    )
    tail = (done.stdout + done.stderr).strip().splitlines()[-60:]
    if done.returncode:
        raise RuntimeError("\n".join(tail))
    return {"said": tail[-1] if tail else "", "tail": tail}


def _traced(preset: str, tokens: int) -> tuple[ft.FlowTracer, list[int], list[int]]:
    """A tracer of a random model, and the ids of a prompt and a response."""
    config = deepcopy(SMALL)
    config.max_position_embeddings = max(FULL.lengths)
    model = build(config).to(device(), torch.bfloat16)
    ids = torch.randint(3, SMALL.vocab_size, (tokens,)).tolist()
    tracer = ft.wrap(
        model, number_tokenizer(), answer="last_number", preset=preset, backend="interface"
    )
    return tracer, ids[: tokens // 4], ids[tokens // 4 :]


def _measured(work: Callable[[], Any]) -> Mapping[str, Any]:
    """Seconds of the second run, and the megabytes that it takes on a GPU above what was held."""
    try:
        work()
        seconds = seconds_of(work)
        return {"run": round(seconds, 4), "mb": round(peak_on_device(work), 1)}
    except (MemoryError, torch.OutOfMemoryError, ft.TooLittleMemoryError) as error:
        return {"said": f"does not fit: {str(error).splitlines()[0]}"}


PARTS: Mapping[str, Callable[[Size], Mapping[str, Step]]] = {
    "models": models,
    "waits": waits,
    "training": training,
    "tests": tests,
    "lengths": lengths,
    "questions": questions,
}
"""The parts, in the order in which they are run: the shortest first."""
