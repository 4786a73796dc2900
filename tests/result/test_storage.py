import ast
import json
import os
import random
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

import flowtracer_plugin
from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.result.storage import save
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.flow_trace import FlowTrace, load
from tests.made_traces import as_streamed, make_trace

ARRAYS = ("token_ids", "attention", "reach", "throughput")
MASKS = ("question", "answer", "target")


@st.composite
def parts_of_traces(draw):
    """Arbitrary numbers and texts: storage does not depend on their meaning."""
    length = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    floats = st.floats(width=np.dtype(dtype).itemsize * 8)
    text = st.text(st.characters(exclude_categories=()), max_size=8)
    spans = {name: draw(hnp.arrays(bool, length)) for name in MASKS}
    spans |= {"rule": draw(text), "answer_text": draw(text)}
    spans |= {"prompt_length": draw(st.integers(0, length))}
    options = {
        "layers": draw(st.one_of(st.just("middle:5"), st.tuples(st.integers(0, 9)))),
        "question": draw(st.sampled_from(["prompt", "mask"])),
        "answer": draw(text),
        "target": "decision",
        "question_weights": "reach",
        "boundary": "absorbing",
        "first_token": "drop",
    }
    arrays = {
        "token_ids": draw(hnp.arrays(np.int64, length)),
        "attention": np.tril(draw(hnp.arrays(dtype, (length, length), elements=floats))),
        "reach": draw(hnp.arrays(dtype, length, elements=floats)),
        "throughput": draw(hnp.arrays(dtype, length, elements=floats)),
    }
    others = {
        "tokens": tuple(draw(st.lists(text, min_size=length, max_size=length))),
        "model": draw(text),
        "layers": tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
    }
    return spans, options, arrays | others


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def assert_same(found, wanted):
    for name in ARRAYS:
        assert bits(getattr(found, name)) == bits(getattr(wanted, name)), name
    for name in MASKS:
        assert bits(getattr(found.spans, name)) == bits(getattr(wanted.spans, name)), name
    for name in ("prompt_length", "rule", "answer_text"):
        assert getattr(found.spans, name) == getattr(wanted.spans, name), name
    for name in ("tokens", "model", "options", "layers"):
        assert getattr(found, name) == getattr(wanted, name), name
        assert type(getattr(found, name)) is type(getattr(wanted, name)), name


@settings(deadline=None)
@given(parts_of_traces())
def test_every_bit_comes_back(tmp_path_factory, parts):
    spans, options, others = parts
    trace = FlowTrace(spans=Spans(**spans), options=FlowOptions(**options), **others)
    path = tmp_path_factory.mktemp("traces") / "a.flow"
    assert save(trace, path) == path
    assert_same(load(path), trace)


@pytest.fixture
def trace():
    length = 3
    return FlowTrace(
        token_ids=np.arange(length),
        tokens=("a", "b", "2"),
        spans=Spans(
            prompt_length=1,
            question=np.array([True, False, False]),
            answer=np.array([False, False, True]),
            target=np.array([False, False, True]),
            rule="last_number",
            answer_text="2",
        ),
        attention=np.tril(np.full((length, length), 0.5, np.float32)),
        reach=np.ones(length, np.float32),
        throughput=np.ones(length, np.float32),
        model="m",
        options=FlowOptions(),
        layers=(1, 2),
    )


def test_a_loaded_trace_works_like_the_saved_one(trace, tmp_path):
    loaded = load(trace.save(tmp_path / "a.flow"))
    assert loaded.to_dict() == trace.to_dict()
    assert repr(loaded) == repr(trace)


def test_a_path_may_be_a_string_in_a_folder_that_is_not_there_yet(trace, tmp_path):
    path = trace.save(str(tmp_path / "new" / "folder" / "a.flow"))
    assert isinstance(path, Path)
    assert_same(load(str(path)), trace)


def test_only_the_lower_triangle_is_stored(trace, tmp_path):
    with safe_open(trace.save(tmp_path / "a.flow"), framework="numpy") as file:
        assert file.get_tensor("attention").shape == (6,)


def test_views_and_other_byte_orders_are_stored_as_they_read(trace, tmp_path):
    rows = np.asfortranarray(trace.attention)
    other = replace(
        trace,
        token_ids=np.arange(2 * 3)[::2],
        reach=np.arange(3, dtype=">f4")[::-1],
        attention=rows,
        spans=replace(trace.spans, answer=np.array([True, False] * 3)[::-2]),
    )
    loaded = load(other.save(tmp_path / "a.flow"))
    assert loaded.token_ids.tolist() == [0, 2, 4]
    assert loaded.reach.tolist() == [2, 1, 0]
    assert loaded.spans.answer.tolist() == other.spans.answer.tolist()
    assert (loaded.attention == rows).all()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trace at .*nowhere"):
        load(tmp_path / "nowhere.flow")
    with pytest.raises(FileNotFoundError, match="no trace at"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"not a safetensors file at all",
        b"\x80\x04}.",  # a pickle
        b"\xff" * 64,
        to_bytes({"weight": np.ones(2)}),
        to_bytes({"weight": np.ones(2)}, {"format": "pt"}),
    ],
    ids=["empty", "short", "text", "pickle", "long header", "no header", "weights"],
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "a.flow"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*a\.flow' as a trace"):
        load(path)


def test_half_a_file_is_refused_at_every_length(trace, tmp_path):
    whole = trace.save(tmp_path / "a.flow").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "half.flow").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot read"):
            load(tmp_path / "half.flow")


def rewritten(trace, path, change=lambda metadata, header: None, without=()):
    """The file of a trace with a changed header, as an earlier version wrote it."""
    with safe_open(trace.save(path), framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys() if name not in without}  # noqa: SIM118
    del metadata["sha256"]
    header = json.loads(metadata["trace"])
    metadata["trace"] = change(metadata, header) or json.dumps(header)
    path.write_bytes(to_bytes(arrays, metadata))
    return path


def test_a_file_without_a_checksum_says_so_and_can_get_one(trace, tmp_path):
    path = rewritten(trace, tmp_path / "a.flow")
    with pytest.warns(UserWarning, match=r"a\.flow' has no checksum"):
        loaded = load(path)
    assert_same(loaded, trace)
    assert_same(load(loaded.save(path)), trace)


def test_a_newer_file_asks_for_an_upgrade(trace, tmp_path):
    path = rewritten(trace, tmp_path / "a.flow", lambda meta, _: meta.update(version="4"))
    with pytest.raises(ValueError, match=r"version 4, .* up to 3; upgrade flowtracer-plugin"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, _: meta.pop("version") and None,
        lambda meta, _: meta.update(version="one"),
        lambda meta, header: "{",
        lambda meta, header: "[]",
        lambda meta, header: "null",
        lambda meta, header: header.pop("tokens") and None,
        lambda meta, header: header.pop("options") and None,
        lambda meta, header: header["options"].update(target="elsewhere"),
        lambda meta, header: header["options"].update(unheard_of=1),
        lambda meta, header: header.update(tokens=["a"]),
    ],
)
def test_damaged_headers_are_refused(change, trace, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*a\.flow' as a trace"):
        load(rewritten(trace, tmp_path / "a.flow", change))


@pytest.mark.parametrize("name", [*ARRAYS, *MASKS])
def test_missing_arrays_are_refused(name, trace, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
        load(rewritten(trace, tmp_path / "a.flow", without=[name]))


def test_a_crash_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.flow"
    write_atomically(path, b"old")

    def crash(self, target):
        assert self.read_bytes() == b"new"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.flow"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "a string cannot be written")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.flow", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.flow").stat().st_mode) == 0o666 & ~umask


def test_the_old_file_is_replaced(trace, tmp_path):
    path = tmp_path / "a.flow"
    path.write_bytes(b"something longer than a trace" * 1000)
    trace.save(path)
    assert_same(load(path), trace)


# --- damage, and files made to do harm ---


@pytest.fixture(scope="module")
def streamed():
    return as_streamed(make_trace(["<s>", "Q", "?", " a", ".", " b", ".", " 2"]))


def assert_flips_are_refused(content, path, places):
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*a\.flow' as a trace"):
            load(path)


@pytest.mark.parametrize("kind", ["dense", "streamed"])
def test_no_flipped_bit_is_taken_for_another_trace(kind, trace, streamed, tmp_path):
    path = tmp_path / "a.flow"
    content = {"dense": trace, "streamed": streamed}[kind].save(path).read_bytes()
    bits, header = 8 * len(content), 8 * (8 + int.from_bytes(content[:8], "little"))
    drawn = random.Random(0)
    places = {*range(64), *drawn.sample(range(header), 900), *drawn.sample(range(header, bits), 99)}
    assert_flips_are_refused(content, path, sorted(places))
    # every bit of the names that say whether there is a checksum
    for name in (b'"version":"', b'"sha256":"', b'"__metadata__":{'):
        at = content.index(name)
        assert_flips_are_refused(content, path, range(8 * at, 8 * (at + len(name) + 1)))


def with_arrays(path, **changed):
    """The same file with other arrays; its metadata stay."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(to_bytes(arrays | changed, metadata))
    return path


def test_other_arrays_under_the_same_checksum_are_noticed(trace, tmp_path):
    for name, changed in (
        ("reach", trace.reach * 2),
        ("reach", trace.reach.astype(np.float64)),
        ("throughput", trace.throughput * 0),
        ("answer", trace.spans.question),
    ):
        path = with_arrays(trace.save(tmp_path / "a.flow"), **{name: changed})
        with pytest.raises(ValueError, match="its checksum is not that of its content"):
            load(path)
    assert_same(load(with_arrays(trace.save(path))), trace)


def unsigned(trace, path, arrays=None, **changes):
    """The file of a trace with other values, as an earlier version wrote it."""
    path = rewritten(trace, path, lambda _, header: header.update(changes))
    return with_arrays(path, **(arrays or {}))


def test_declared_sizes_are_checked_before_anything_is_made(trace, tmp_path):
    """Otherwise a single number would be spread over all pairs of tokens."""
    path, many = tmp_path / "a.flow", 20_000
    long = {name: np.zeros(many, np.float32) for name in ("reach", "throughput")}
    long |= {name: np.zeros(many, bool) for name in MASKS} | {"token_ids": np.zeros(many, np.int64)}
    for size in (1, 6):
        long["attention"] = np.ones(size, np.float32)
        unsigned(trace, path, long, tokens=["a"] * many, prompt_length=1)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"wanted attention of the shape \[200010000\]"):
            load(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 20 * path.stat().st_size


def test_arrays_that_do_not_fit_are_named(trace, streamed, tmp_path):
    ends, flow = streamed.backbone.sources.token, streamed.backbone.sources.flow
    one = np.ones(1, np.float32)
    for held, arrays, message in (
        (trace, {"reach": one}, r"wanted reach of the shape \[3\] in .*, found \[1\] in F32"),
        (trace, {"question": np.ones(1, bool)}, r"wanted question of the shape \[3\] in BOOL"),
        (trace, {"reach": np.ones(3, np.int64)}, r"in F32 or F64 or F16, found \[3\] in I64"),
        (trace, {"question": np.ones(3, np.int64)}, r"in BOOL, found \[3\] in I64"),
        (trace, {"attention": np.ones((6, 1), np.float32)}, r"wanted attention of the shape \[6\]"),
        (trace, {"reach": np.ones((0, 3), np.float32)}, r"wanted reach of the shape \[3\]"),
        (trace, {"more": np.ones(3)}, "did not want an array 'more'"),
        (streamed, {"sources.token": ends + 8}, "its edges are not those of its tokens"),
        (streamed, {"targets.token": ends - 8}, "its edges are not those of its tokens"),
        (streamed, {"targets.flow": flow[:, :1].copy()}, r"wanted targets.flow of the shape"),
        (streamed, {"sources.token": np.array(3)}, r"wanted sources\.\w+ of the shape \[8, 0\]"),
        (streamed, {"steps": np.ones((1, 1), np.float32)}, "wanted steps of the shape"),
        (streamed, {"bins": one}, "wanted bins of the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            load(unsigned(held, tmp_path / "a.flow", arrays))


OTHER_TYPES = [
    {"tokens": "abc"},
    {"tokens": [1, 2, 3]},
    {"tokens": []},
    {"tokens": None},
    {"tokens": {"a": 1, "b": 2, "2": 3}},
    {"prompt_length": "1"},
    {"prompt_length": 1.0},
    {"prompt_length": True},
    {"prompt_length": -1},
    {"prompt_length": 4},
    {"prompt_length": 10**30},
    {"rule": None},
    {"answer_text": ["2"]},
    {"model": 5},
    {"layers": "all"},
    {"layers": [1, "2"]},
    {"layers": [[1]]},
    {"heads": [[1]]},
    {"heads": [[1, 2, 3]]},
    {"heads": "all"},
    {"options": []},
    {"options": {"layers": 5}},
    {"options": {"heads": [1]}},
    {"options": {"heads": float("inf")}},
    {"paths": [{"tokens": [99], "probability": 1.0}]},
    {"paths": [{"tokens": [-1], "probability": 1.0}]},
    {"paths": [{"tokens": [0], "probability": "1"}]},
    {"paths": 3},
    {"question_reached": "2"},
    {"unheard_of": 1},
]


@pytest.mark.parametrize("kind", ["dense", "streamed"])
def test_a_header_of_other_types_is_refused(kind, trace, streamed, tmp_path):
    whole = {"dense": trace, "streamed": streamed}[kind]
    for changes in [*OTHER_TYPES, {"paths": None}][: None if kind == "streamed" else -1]:
        path = unsigned(whole, tmp_path / "a.flow", **changes)
        damage = r"cannot read .*a\.flow' as a trace: its header.*; trace the text again"
        with pytest.raises(ValueError, match=damage):
            load(path)


def test_a_deep_header_is_refused(trace, tmp_path):
    for deep in ("[" * 100_000, '{"tokens": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        path = rewritten(trace, tmp_path / "a.flow", lambda *_, deep=deep: deep)
        with pytest.raises(ValueError, match=r"its header is damaged: .* nested too deeply"):
            load(path)


def test_numbers_that_no_trace_has_are_refused_without_a_checksum(trace, streamed, tmp_path):
    path, ones = tmp_path / "a.flow", np.ones(8, np.float32)
    for held, name, values in (
        (trace, "attention", trace.attention[np.tril_indices(3)] * np.nan),
        (trace, "reach", trace.reach * np.nan),
        (trace, "throughput", np.full(3, np.inf, np.float32)),
        (trace, "throughput", np.full(3, -1, np.float64)),
        (streamed, "prompt_inflow", ones * np.nan),
        (streamed, "source", -ones),
        (trace, "answer", np.zeros(3, bool)),
        (trace, "target", np.full(3, 2, np.uint8).view(bool)),
    ):
        with pytest.raises(ValueError, match=rf"it is damaged: wanted .* in {name}, .*found"):
            load(unsigned(held, path, {name: values}))


def test_a_version_of_thousands_of_digits_is_damage(trace, tmp_path):
    path = rewritten(trace, tmp_path / "a.flow", lambda meta, _: meta.update(version="9" * 5000))
    with pytest.raises(ValueError, match="it is damaged: wanted format"):
        load(path)


def test_a_streamed_trace_of_an_earlier_version_is_read(streamed, tmp_path):
    path = unsigned(streamed, tmp_path / "a.flow")
    with pytest.warns(UserWarning, match="has no checksum"):
        loaded = load(path)
    assert loaded.to_dict() == streamed.to_dict()
    assert load(loaded.save(path)).to_dict() == streamed.to_dict()


def test_names_that_are_no_text_are_read_and_written(trace, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.flow")
    assert_same(load(trace.save(path)), trace)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read '.*\\udcff\.flow'"):
        load(path)


def test_nothing_in_the_package_can_unpickle():
    imported = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    called = {"load", "eval", "exec", "compile", "__import__"}
    for path in Path(flowtracer_plugin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & imported, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in called - {"load"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", None)
                assert (owner, node.func.attr) not in {("torch", "load"), ("np", "load")}, path


def test_links_are_followed_and_permissions_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="wanted the name of a file, found the directory"):
        write_atomically(tmp_path, b"")
    assert list(tmp_path.iterdir()) == []
