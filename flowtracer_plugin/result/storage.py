"""Traces on disk, as safetensors with a JSON header. Reading a file never runs code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from flowtracer_plugin.files import parsed, typed, write_atomically
from flowtracer_plugin.flow.backbone import Backbone, FlowPath, StrongEdges, bin_starts, step_bounds
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.spans import Spans

Trace = TypeVar("Trace", bound=TraceData)

FORMAT = "flowtracer.trace"
VERSION = 3
"""The newest version that can be read. Traces with attention are written as version 1, and streamed
traces, which have a backbone instead, as version 3. Version 2, without bins, was never released.
Files of either version have a checksum, or none if they are older than checksums."""

_ARRAYS = ("token_ids", "reach", "throughput")
_MASKS = ("question", "answer", "target")
_BACKBONE = ("source", "sink", "hubs", "checkpoints", "prompt_inflow", "steps", "bins")
_EDGES = ("sources", "targets")

_DIGEST = "sha256"
_METADATA = {"format", "version", "trace"}

_FLOATS = ("F32", "F64", "F16")
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
_Shapes = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""The dtypes that an array may have, and its shape, by its name."""


@dataclass(frozen=True, kw_only=True)
class _Header:
    """All of a trace but its arrays. Defaults are for fields that older or dense traces lack."""

    tokens: tuple[str, ...]
    prompt_length: int
    rule: str
    answer_text: str
    model: str
    options: FlowOptions
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...] = ()
    chosen: tuple[int, ...] = ()
    paths: tuple[FlowPath, ...] | None = None
    question_reached: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("it has no tokens")
        if not 0 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"its prompt has {self.prompt_length} of its {len(self.tokens)} tokens"
            )
        if not all(0 <= token < len(self.tokens) for token in self.chosen):
            raise ValueError("its chosen tokens are not among its tokens")
        for path in self.paths or ():
            if not all(0 <= token < len(self.tokens) for token in path.tokens):
                raise ValueError("its paths are not those of its tokens")


def save(trace: TraceData, path: Path) -> Path:
    """Write `trace` to `path`, whole or not at all, and return `path`."""
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {name: getattr(trace.spans, name) for name in _MASKS}
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
    if trace.chosen:  # not in other files, so that earlier versions can read them
        header["chosen"] = trace.chosen
    version = 1
    if trace.attention is not None:
        # Without the zeros above the diagonal, the file is half as large.
        arrays["attention"] = trace.attention[np.tril_indices(len(trace.attention))]
    if trace.streamed is not None:
        version = VERSION
        arrays |= _backbone_arrays(trace.streamed)
        header["paths"] = [asdict(path) for path in trace.streamed.paths]
        header["question_reached"] = trace.streamed.question_reached
    # safetensors writes the memory of an array as it lies there, also that of a view.
    arrays = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        for name, array in arrays.items()
    }
    metadata = {"format": FORMAT, "version": str(version), "trace": json.dumps(header)}
    metadata[_DIGEST] = digest(metadata, arrays)
    write_atomically(path, to_bytes(arrays, metadata))
    return path


def digest(metadata: Mapping[str, str], arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> str:
    """The SHA-256 of a file's metadata and arrays, with their names, dtypes and shapes."""
    names = sorted(arrays)
    kinds = [(name, arrays[name].dtype.str, arrays[name].shape) for name in names]
    found = sha256(json.dumps([metadata, kinds], sort_keys=True).encode())
    for name in names:
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def load_trace(path: Path, kind: type[Trace]) -> Trace:
    """The trace that `FlowTrace.save` wrote to `path`, as a `kind`, bit for bit.

    A file of an earlier version has no checksum; a warning says so.

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
        trace, checked = _read(path, kind)
    except SafetensorError as error:
        raise ValueError(
            f"cannot read {str(path)!r} as a trace: it is damaged, or not a file that "
            f"FlowTrace.save() wrote ({error}); trace the text again, or get the whole file"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot read {str(path)!r} as a trace: {error}") from error
    if not checked:
        warnings.warn(
            f"{str(path)!r} has no checksum, as an earlier version wrote it: damage may go "
            "unnoticed; ft.load(path).save(path) adds one",
            stacklevel=3,
        )
    return trace


def _read(path: Path, kind: type[Trace]) -> tuple[Trace, bool]:
    """The trace, and whether the file had a checksum."""
    with safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata() or {}
        streamed = _check_metadata(metadata)
        header = _read_header(metadata["trace"])
        # Nothing is loaded before its size is known to be right: a few bytes can claim any length.
        _check_arrays(file, _streamed_arrays(header, file) if streamed else _dense_arrays(header))
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held = metadata.pop(_DIGEST, None)
    if held is not None and held != digest(metadata, arrays):
        raise ValueError(
            "it is damaged: its checksum is not that of its content; trace the text again, or get "
            "the whole file"
        )
    if held is None:
        _check_numbers(arrays)
    return _assemble(header, arrays, kind), held is not None


def _check_metadata(metadata: Mapping[str, str]) -> bool:
    """Whether the trace was streamed."""
    if metadata.get("format") != FORMAT:
        raise ValueError("wanted a file that FlowTrace.save() wrote; this one is something else")
    version = metadata.get("version", "")
    if version.isdecimal() and version.isascii() and len(version) < 10 and int(version) > VERSION:
        raise ValueError(
            f"it has format version {version}, but this flowtracer-plugin reads versions up to "
            f"{VERSION}; upgrade flowtracer-plugin"
        )
    if version == "2":
        raise ValueError("format version 2 was never released; trace the text again")
    # A damaged name must not make the checksum look like one that was never there.
    if version not in ("1", "3") or metadata.keys() - {_DIGEST} != _METADATA:
        raise ValueError(
            f"it is damaged: wanted {', '.join(sorted(_METADATA))} and {_DIGEST}, found version "
            f"{version!r} and {', '.join(sorted(metadata))}; trace the text again, or get the "
            "whole file"
        )
    return version == "3"


def _read_header(text: str) -> _Header:
    try:
        header: _Header = typed(_Header, parsed(text), "it")
    except ValueError as error:
        raise ValueError(
            f"its header is damaged: {error}; trace the text again, or get the whole file"
        ) from error
    return header


def _dense_arrays(header: _Header) -> _Shapes:
    tokens = len(header.tokens)
    return _token_arrays(tokens) | {"attention": (_FLOATS, (tokens * (tokens + 1) // 2,))}


def _streamed_arrays(header: _Header, file: Any) -> _Shapes:
    tokens, sample = len(header.tokens), f"{_EDGES[0]}.token"
    # how many edges each token keeps is known from the arrays alone, which must agree
    shape = file.get_slice(sample).get_shape() if sample in file.keys() else ()  # noqa: SIM118
    kept = shape[-1] if shape else 0
    steps = len(step_bounds(header.tokens, header.prompt_length))
    bins = len(bin_starts(tokens, header.prompt_length))
    found: _Shapes = dict.fromkeys(_BACKBONE, (_FLOATS, (tokens,)))
    found |= {"steps": (_FLOATS, (steps, steps)), "bins": (_FLOATS, (bins, bins))}
    for name in _EDGES:
        found[f"{name}.token"] = _INTEGERS, (tokens, kept)
        found[f"{name}.flow"] = _FLOATS, (tokens, kept)
    return _token_arrays(tokens) | found


def _token_arrays(tokens: int) -> _Shapes:
    kinds = {"token_ids": _INTEGERS, "reach": _FLOATS, "throughput": _FLOATS}
    return {name: (kinds.get(name, ("BOOL",)), (tokens,)) for name in (*_ARRAYS, *_MASKS)}


def _check_arrays(file: Any, wanted: _Shapes) -> None:
    names = set(file.keys())
    for name in sorted(wanted.keys() | names):
        if name not in names or name not in wanted:
            wish = "wanted" if name in wanted else "did not want"
            raise ValueError(f"{wish} an array {name!r:.80}; trace the text again")
        dtypes, shape = wanted[name]
        held = file.get_slice(name)
        if held.get_dtype() not in dtypes or tuple(held.get_shape()) != shape:
            raise ValueError(
                f"its header and its arrays differ: wanted {name} of the shape {list(shape)} in "
                f"{' or '.join(dtypes)}, found {held.get_shape()} in {held.get_dtype()}; trace the "
                "text again"
            )


def _check_numbers(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse numbers that no trace has, which a file without a checksum may hold."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and array.size:
            if not (array.min() >= 0 and array.max() < np.inf):  # nan fails both
                raise ValueError(
                    f"it is damaged: wanted finite numbers of at least 0 in {name}, found others; "
                    "trace the text again, or get the whole file"
                )
        elif name in _MASKS and not (array.any() and array.view(np.uint8).max() == 1):
            raise ValueError(
                f"it is damaged: wanted 0 and 1 in {name}, with a 1 for at least one token, found "
                "something else; trace the text again, or get the whole file"
            )


def _assemble(header: _Header, arrays: dict[str, Any], kind: type[Trace]) -> Trace:
    attention = arrays.get("attention")
    return kind(
        token_ids=arrays["token_ids"],
        tokens=header.tokens,
        spans=Spans(
            prompt_length=header.prompt_length,
            rule=header.rule,
            answer_text=header.answer_text,
            **{name: arrays[name] for name in _MASKS},
        ),
        attention=None if attention is None else _unpack(attention, len(header.tokens)),
        streamed=_assemble_backbone(header, arrays) if attention is None else None,
        reach=arrays["reach"],
        throughput=arrays["throughput"],
        model=header.model,
        options=header.options,
        layers=header.layers,
        heads=header.heads,
        chosen=header.chosen,
    )


def _backbone_arrays(backbone: Backbone) -> dict[str, Any]:
    arrays = {name: getattr(backbone, name) for name in _BACKBONE}
    for name in _EDGES:
        edges: StrongEdges = getattr(backbone, name)
        arrays |= {f"{name}.token": edges.token, f"{name}.flow": edges.flow}
    return arrays


def _assemble_backbone(header: _Header, arrays: dict[str, Any]) -> Backbone:
    if header.paths is None or header.question_reached is None:
        raise ValueError("its header lacks the paths of a streamed trace; trace the text again")
    edges: dict[str, Any] = {}
    for name in _EDGES:
        ends = arrays[f"{name}.token"]
        if not ((ends >= 0) & (ends < len(header.tokens))).all():
            raise ValueError("its edges are not those of its tokens; trace the text again")
        edges[name] = StrongEdges(token=ends, flow=arrays[f"{name}.flow"])
    return Backbone(
        question_reached=header.question_reached,
        paths=header.paths,
        **{name: arrays[name] for name in _BACKBONE},
        **edges,
    )


def _unpack(packed: Float[np.ndarray, " edge"], length: int) -> Float[np.ndarray, "query key"]:
    attention = np.zeros((length, length), packed.dtype)
    attention[np.tri(length, dtype=bool)] = packed  # less memory than the indices take
    return attention
