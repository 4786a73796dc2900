"""Traces on disk, as safetensors with a JSON header. Reading a file never runs code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.flow.backbone import Backbone, FlowPath, StrongEdges, bin_starts, step_bounds
from flowtracer_plugin.options import FlowOptions, head_pairs
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.spans import Spans

Trace = TypeVar("Trace", bound=TraceData)

FORMAT = "flowtracer.trace"
VERSION = 3
"""The newest version that can be read. Traces with attention are written as version 1, and streamed
traces, which have a backbone instead, as version 3. Version 2, without bins, was never released."""

_ARRAYS = ("token_ids", "reach", "throughput")
_MASKS = ("question", "answer", "target")
_BACKBONE = ("source", "sink", "hubs", "checkpoints", "prompt_inflow", "steps", "bins")

_EDGES = ("sources", "targets")
_BACKBONE_ARRAYS = [
    *_BACKBONE,
    *(f"{name}.{part}" for name in _EDGES for part in ("token", "flow")),
]


def save(trace: TraceData, path: Path) -> Path:
    """Write `trace` to `path`, whole or not at all, and return `path`."""
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {name: getattr(trace.spans, name) for name in _MASKS}
    version = 1
    if trace.attention is not None:
        # Without the zeros above the diagonal, the file is half as large.
        arrays["attention"] = trace.attention[np.tril_indices(len(trace.attention))]
    header: dict[str, Any] = {
        "tokens": trace.tokens,
        "prompt_length": trace.spans.prompt_length,
        "rule": trace.spans.rule,
        "answer_text": trace.spans.answer_text,
        "model": trace.model,
        "options": asdict(trace.options),
        "layers": trace.layers,
        "heads": trace.heads,
    }
    if trace.streamed is not None:
        version = VERSION
        arrays |= _backbone_arrays(trace.streamed)
        header["paths"] = [asdict(path) for path in trace.streamed.paths]
        header["question_reached"] = trace.streamed.question_reached
    metadata = {"format": FORMAT, "version": str(version), "trace": json.dumps(header)}
    write_atomically(path, to_bytes(arrays, metadata))
    return path


def load_trace(path: Path, kind: type[Trace]) -> Trace:
    """The trace that `FlowTrace.save` wrote to `path`, as a `kind`, bit for bit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a trace, is damaged, or was written by a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no trace at {str(path)!r}; wanted a file that FlowTrace.save() or "
            "flowtracer trace --save wrote"
        )
    try:
        return _read(path, kind)
    except SafetensorError as error:
        raise ValueError(
            f"cannot read {str(path)!r} as a trace: it is damaged, or not a file that "
            f"FlowTrace.save() wrote ({error}); trace the text again, or get the whole file"
        ) from error
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r} as a trace: {error}") from error


def _read(path: Path, kind: type[Trace]) -> Trace:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                "wanted a file that FlowTrace.save() wrote; this one is something else"
            )
        if int(metadata["version"]) > VERSION:
            raise ValueError(
                f"it has format version {metadata['version']}, but this flowtracer-plugin reads "
                f"versions up to {VERSION}; upgrade flowtracer-plugin"
            )
        if int(metadata["version"]) == 2:
            raise ValueError("format version 2 was never released; trace the text again")
        names = [*_ARRAYS, *_MASKS]
        names += ["attention"] if int(metadata["version"]) == 1 else _BACKBONE_ARRAYS
        arrays = {name: file.get_tensor(name) for name in names}
    return _assemble(json.loads(metadata["trace"]), arrays, kind)


def _assemble(header: dict[str, Any], arrays: dict[str, Any], kind: type[Trace]) -> Trace:
    per_token = [name for name in arrays if name not in ("attention", "steps", "bins")]
    if {len(arrays[name]) for name in per_token} != {len(header["tokens"])}:
        raise ValueError("its header and its arrays differ in length")
    attention, streamed = arrays.get("attention"), None
    if attention is None:
        streamed = _assemble_backbone(header, arrays)
    else:
        attention = _unpack(attention, len(header["tokens"]))
    options = header["options"]
    layers = options["layers"]
    options["layers"] = layers if isinstance(layers, str) else tuple(layers)
    options["heads"] = head_pairs(options.get("heads", "all"))  # older files have none
    return kind(
        token_ids=arrays["token_ids"],
        tokens=tuple(header["tokens"]),
        spans=Spans(
            prompt_length=header["prompt_length"],
            rule=header["rule"],
            answer_text=header["answer_text"],
            **{name: arrays[name] for name in _MASKS},
        ),
        attention=attention,
        streamed=streamed,
        reach=arrays["reach"],
        throughput=arrays["throughput"],
        model=header["model"],
        options=FlowOptions(**options),
        layers=tuple(header["layers"]),
        heads=tuple((layer, head) for layer, head in header.get("heads", ())),
    )


def _backbone_arrays(backbone: Backbone) -> dict[str, Any]:
    arrays = {name: getattr(backbone, name) for name in _BACKBONE}
    for name in _EDGES:
        edges: StrongEdges = getattr(backbone, name)
        arrays |= {f"{name}.token": edges.token, f"{name}.flow": edges.flow}
    return arrays


def _assemble_backbone(header: dict[str, Any], arrays: dict[str, Any]) -> Backbone:
    tokens = len(header["tokens"])
    steps = len(step_bounds(header["tokens"], header["prompt_length"]))
    paths = [token for path in header["paths"] for token in path["tokens"]]
    ends = [arrays[f"{name}.token"] for name in _EDGES] + [np.array(paths, np.int64)]
    shapes = {arrays[f"{name}.{part}"].shape for name in _EDGES for part in ("token", "flow")}
    within = all(((one >= 0) & (one < tokens)).all() for one in ends)
    bins = len(bin_starts(tokens, header["prompt_length"]))
    square = arrays["steps"].shape == (steps, steps) and arrays["bins"].shape == (bins, bins)
    if not square or len(shapes) > 1 or not within:
        raise ValueError("its edges are not those of its tokens and steps")
    edges: dict[str, Any] = {
        name: StrongEdges(token=arrays[f"{name}.token"], flow=arrays[f"{name}.flow"])
        for name in _EDGES
    }
    return Backbone(
        question_reached=int(header["question_reached"]),
        paths=tuple(
            FlowPath(tokens=tuple(path["tokens"]), probability=path["probability"])
            for path in header["paths"]
        ),
        **{name: arrays[name] for name in _BACKBONE},
        **edges,
    )


def _unpack(packed: Float[np.ndarray, " edge"], length: int) -> Float[np.ndarray, "query key"]:
    attention = np.zeros((length, length), packed.dtype)
    attention[np.tril_indices(length)] = packed
    return attention
