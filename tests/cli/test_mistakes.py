"""Mistakes end in one sentence that says what to do, and in the right exit code."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

import flowtracer_plugin as ft
from flowtracer_plugin.cli import commands as cli
from flowtracer_plugin.cli.mistakes import sentence
from flowtracer_plugin.cli.parsing import writable
from flowtracer_plugin.model import loading
from flowtracer_plugin.trace import memory
from tests.cli.command_line import assert_failed, in_a_process
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

ROOT, SCRIPTS = Path(ft.__file__).parents[1], Path(sys.executable).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "a.flow"
    return ft.wrap(tiny_llama(), tiny_tokenizer()).trace(PROMPT, RESPONSE).save(path)


def tracing(model, *more):
    return ["trace", "--model", model, "--prompt", PROMPT, "--response", RESPONSE, *more]


# usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "No such command 'generat'. Did you mean 'generate'?"),
        (["adapters", "chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["trace", "--promt", "a"], "No such option: --promt"),
        (["generate", "x"], "pass the prompt by one of --prompt"),
        (["generate", "x", "How many?"], "found 'How many?' where no further text is wanted"),
        (
            ["generate", "x", "--prompt", "a", "--do-sample", "--temperature", "0"],
            "--temperature must be above 0, found 0",
        ),
        (["report"], "Missing argument 'FILE|FOLDER'"),
        (["compare"], "Missing argument 'FILE...|FOLDER'"),
        (["trace"], "Missing argument 'MODEL'"),
        (["trace", "--model", "x"], "pass the prompt by one of --prompt"),
        (["estimate", "--model", "x"], "Missing option '--tokens'"),
        (
            ["trace", "--model", "x", "--prompt", "a", "--response", "b", "--adapter", "nothing"],
            "found 'nothing'",  # before anything of the model is loaded
        ),
        (["trace", "--block", "0"], "Invalid value for '--block'"),
    ],
)
def test_wrong_usage_exits_with_2(flowtracer, arguments, message):
    assert_failed(flowtracer(*arguments), 2, message)


def test_a_folder_cannot_be_written_as_a_file(flowtracer, saved, tmp_path):
    assert_failed(flowtracer("report", saved, "--html", tmp_path), 2, "is a directory")


def test_no_command_replaces_the_prompt_that_it_reads(flowtracer, tmp_path):
    prompt = tmp_path / "a.txt"
    prompt.write_text("How many?")
    for command in ("trace", "generate"):
        ran = flowtracer(command, "nowhere", "--prompt-file", prompt, "--html", prompt)
        assert_failed(ran, 2, "is read by this command and would be replaced")


# files


def test_a_file_that_is_no_trace_is_named(flowtracer, saved, tmp_path):
    ran = flowtracer("report", tmp_path / "no.flow")
    assert_failed(ran, 1, "no trace at", "no.flow", "wanted a file that FlowTrace.save()")
    ran = flowtracer("compare", saved, tmp_path)
    assert_failed(ran, 2, "wanted files of traces, or one folder alone", str(tmp_path))
    (tmp_path / "notes.flow").write_text("# notes\n")
    ran = flowtracer("report", tmp_path / "notes.flow")
    assert_failed(ran, 1, "it is damaged, or not a file that FlowTrace.save() wrote", "trace the")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_damaged_trace_is_named(flowtracer, saved, tmp_path, kept):
    content = saved.read_bytes()
    (tmp_path / "cut.flow").write_bytes(content[:kept])
    ran = flowtracer("report", tmp_path / "cut.flow", "--json")
    assert_failed(ran, 1, "cannot read", "cut.flow", "it is damaged")


def test_a_file_that_cannot_be_written_is_named(flowtracer, saved, tmp_path, monkeypatch):
    page = tmp_path / "x.html"

    def refuse(trace, path):
        raise PermissionError(13, "Permission denied", ".0123.part")

    monkeypatch.setattr(ft.FlowTrace, "to_html", refuse)
    ran = flowtracer("report", saved, "--html", page)
    assert_failed(ran, 1, f"cannot write '{page}': Permission denied; name a file in a folder")
    assert ft.load(saved)


def test_unwritable_files_are_refused_before_the_model_is_loaded(flowtracer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    given = tracing(tmp_path / "nowhere")
    for option in ("--save", "--html", "--parquet", "--graphml"):
        ran = flowtracer(*given, option, tmp_path / "file" / "new" / "x")
        assert_failed(ran, 2, option, "nothing can be made in", "that you may write to")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for command in (given, ["demo"], ["evaluate", "nowhere", "no.jsonl"]):
        option = "--output" if command[0] == "evaluate" else "--html"
        ran = flowtracer(*command, option, tmp_path / "new" / "x")
        assert_failed(ran, 2, option, "nothing can be made in")


def test_places_that_take_no_file_are_refused_before_anything_is_loaded(
    flowtracer, saved, tmp_path, monkeypatch
):
    """Permissions alone would let a superuser write there."""
    given, none = tracing(tmp_path / "nowhere"), "/proc/none.flow"
    commands = {
        "--save": given,
        "--html": [*given[:-2], "--generate"],
        "--parquet": ["generate", *given[1:-2]],
        "--output": ["evaluate", "nowhere", "no.jsonl"],
    }
    for option, command in commands.items():
        for place in (none, "/proc/new/none.flow", tmp_path / ("x" * 300)):
            ran = flowtracer(*command, option, place)
            assert_failed(ran, 2, f"'{option}'", "cannot write", "that you may write to")
    assert_failed(flowtracer("audit", "nowhere", "no.jsonl", "--output", none), 2, "'--output'")
    assert_failed(
        flowtracer("demo", "--html", none), 2, "'--html'", "nothing can be made in '/proc'"
    )
    assert_failed(flowtracer("report", saved, "--html", none), 2, "'--html'")
    assert_failed(flowtracer("compare", saved, saved, "--html", none), 2, "'--html'")
    # and files that get a name by default
    monkeypatch.chdir("/proc")
    assert_failed(flowtracer("demo"), 2, "'--html'", "cannot write 'flowtracer-demo.html'")
    assert_failed(flowtracer("compare", saved, saved), 2, "cannot write 'comparison.html'")
    (tmp_path / "a.flow").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.html").mkdir()
    assert_failed(flowtracer("report", "a.flow"), 2, "cannot write 'a.html'", "found a folder")


def test_what_a_command_reads_is_never_replaced(flowtracer, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    data, both = tmp_path / "data.jsonl", tmp_path / "both"
    data.write_text('{"prompt": "2 + 2?"}\n')
    before = saved.read_bytes()
    for page in (saved, tmp_path / "link"):
        ran = flowtracer("report", saved, "--html", page)
        assert_failed(ran, 2, "is read by this command and would be replaced: name another file")
        assert_failed(flowtracer("compare", saved, saved, "--html", page), 2, "would be replaced")
    for option in ("--html", "--output"):
        ran = flowtracer("evaluate", "nowhere", data, option, data)
        assert_failed(ran, 2, "would be replaced")
    ran = flowtracer("evaluate", "nowhere", data, "--html", both, "--output", both)
    assert_failed(ran, 2, "two files have the same name: each needs its own")
    assert saved.read_bytes() == before
    assert data.read_text() == '{"prompt": "2 + 2?"}\n'


def test_foreign_results_are_refused_before_the_model_is_sought(flowtracer, tmp_path):
    data, notes = tmp_path / "data.jsonl", tmp_path / "notes.txt"
    data.write_text('{"prompt": "2 + 2?", "answer": "4"}\n')
    for content in (b"my only notes", b"first line\nlast", b"\0" * 99):
        notes.write_bytes(content)
        for command in ("evaluate", "audit"):
            ran = flowtracer(command, "nowhere", data, "--output", notes)
            assert_failed(ran, 1, "cannot go on with", "notes.txt", "write to another file")
            assert notes.read_bytes() == content


def test_a_trace_without_a_checksum_is_shown_with_a_note(flowtracer, saved, tmp_path):
    with safe_open(saved, framework="numpy") as file:
        metadata = {name: of for name, of in file.metadata().items() if name != "sha256"}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (tmp_path / "old.flow").write_bytes(to_bytes(arrays, metadata))
    ran = flowtracer("report", tmp_path / "old.flow", "--json")
    assert ran.code == 0
    assert re.fullmatch(r"note: '.*old\.flow' has no checksum, .*\n", ran.err)
    assert flowtracer("report", saved, "--json").err == ""


def test_writable_files_are_accepted(tmp_path):
    (tmp_path / "file").touch()
    for path in (None, tmp_path / "file", tmp_path / "new" / "new" / "x", Path("/dev/null")):
        assert writable(path) == path


@pytest.mark.parametrize("name", ["x.gif", "x", ".png"])
def test_a_figure_of_another_kind_is_refused_before_the_model_is_loaded(flowtracer, tmp_path, name):
    ran = flowtracer(*tracing(tmp_path / "nowhere", "--figure", tmp_path / name))
    assert_failed(ran, 2, "'--figure': wanted .png, .svg or .pdf, found", f"in {name!r}")


def test_files_do_not_overwrite_each_other(flowtracer, tmp_path):
    path = tmp_path / "a"
    ran = flowtracer(*tracing(tmp_path / "nowhere", "--save", path, "--html", path))
    assert_failed(ran, 2, "two files have the same name: each needs its own")
    assert not path.exists()


def test_a_figure_kind_without_a_figure_is_refused(flowtracer, saved):
    ran = flowtracer("report", saved, "--figure-kind", "river")
    assert_failed(ran, 2, "--figure-kind is for --figure: name its file too")


# the hub


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no/such/folder", "~/model", "a/b/c", "two words"]
)
def test_a_name_that_can_be_no_id_is_not_looked_up_on_the_hub(flowtracer, name):
    ran = flowtracer(*tracing(name))
    assert_failed(ran, 1, f"there is no folder {name!r}; wanted the folder of a Hugging Face model")


def test_without_a_network_nobody_waits_for_the_hub(tmp_path):
    """Otherwise its client would retry for minutes, with a message each time."""
    proxies = {f"{kind}_proxy": "" for kind in ("http", "https", "all")}
    hub = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": ""}
    ran = in_a_process(*tracing("nobody/nothing"), **hub, **proxies)
    assert_failed(ran, 1, "no such model could be loaded from the hub", "check its id and the conn")


def test_a_model_that_is_not_in_the_cache_is_named_offline(flowtracer, monkeypatch):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    ran = flowtracer(*tracing("nobody/nothing"))
    assert_failed(ran, 1, "there is no folder 'nobody/nothing', and no such model could be loaded")


@pytest.mark.parametrize("known", [True, False])
def test_the_hub_is_asked_if_its_address_is_known(monkeypatch, known):
    def addresses(*_):
        if not known:
            raise socket.gaierror

    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "getaddrinfo", addresses)
    assert loading._without_hub("nobody/nothing") != known
    assert not loading._without_hub("/")
    monkeypatch.setattr(loading, "getproxies", lambda: {"https": "http://proxy"})
    assert not loading._without_hub("nobody/nothing")


# memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 80 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
    ids=["Python", "CUDA", "CPU", "MPS"],
)
def test_running_out_of_memory_says_what_takes_less(flowtracer, plain_model, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(ft.FlowTracer, "trace", exhausted)
    ran = flowtracer(*tracing(plain_model))
    assert_failed(ran, 1, "the memory is used up; trace a shorter text", "--mode streamed")


@pytest.mark.parametrize(
    "remedy", [["--layers", "middle:2"], ["--mode", "streamed"], ["--dtype", "bfloat16"]]
)
def test_the_remedies_for_too_little_memory_are_options(flowtracer, plain_model, remedy):
    assert " ".join(remedy) in sentence(MemoryError())
    assert flowtracer(*tracing(plain_model, *remedy)).code == 0


def test_too_little_memory_keeps_its_own_advice(flowtracer, plain_model, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_memory", lambda _: 1000)
    ran = flowtracer(*tracing(plain_model))
    assert_failed(ran, 1, "what fits: ")
    assert re.match(r"error: tracing \d+ tokens would take ", ran.err)


# texts that cannot be traced


def test_empty_texts_are_refused_before_the_model_is_loaded(flowtracer, tmp_path):
    given = ["trace", "--model", tmp_path / "nowhere"]
    assert_failed(flowtracer(*given, "--prompt", ""), 1, "the prompt is empty")
    assert_failed(flowtracer(*given, "--prompt", "-", stdin="\n"), 1, "the prompt is empty")
    ran = flowtracer(*given, "--prompt", PROMPT, "--response", "")
    assert_failed(ran, 1, "the response is empty")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(flowtracer, tmp_path, errors):
    given = ["trace", "--model", tmp_path, "--response"]
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8", errors=errors)
    ran = flowtracer(*given, "a", "--prompt", "-", stdin=stdin)
    assert_failed(ran, 1, "the prompt must be UTF-8 text")
    ran = flowtracer(*given, os.fsdecode(b"\xff"), "--prompt", "a")
    assert_failed(ran, 1, "the response must be UTF-8 text")


def test_a_missing_answer_can_be_found_with_an_option(flowtracer, plain_model):
    given = ["trace", "--model", plain_model, "--prompt", PROMPT, "--response", "I do not know."]
    ran = flowtracer(*given)
    assert_failed(
        ran,
        1,
        "no answer found by 'auto' in the response 'I do not know.'; --answer says how to find it, "
        "such as last_word, text:ANSWER for the answer itself, or re:PATTERN",
    )
    for remedy in ("last_word", "re:not (.+)"):
        assert flowtracer(*given, "--answer", remedy).code == 0


# how commands end


def test_bugs_show_their_traceback(flowtracer, monkeypatch, saved):
    def broken(_):
        raise AttributeError("of ours")

    monkeypatch.setattr(ft, "load", broken)
    with pytest.raises(AttributeError, match="of ours"):
        flowtracer("report", saved)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "a.yaml"), "No such file: 'a.yaml'"),
        (
            ValueError("mode='streamed' or layers='middle:2'"),
            "--mode streamed or --layers middle:2",
        ),
        (ValueError('wrap(..., backend="interface") can'), "--backend interface can"),
        (
            ValueError("load both (wrap(..., verify=False) takes them)"),
            "load both (--no-verify takes them)",
        ),
        (RuntimeError(), "RuntimeError"),
        (KeyError("hidden_size"), "there is no 'hidden_size'"),
        (
            ModuleNotFoundError("No module named 'trl'", name="trl"),
            "this needs trl; run: pip install 'flowtracer-plugin[trl]', or in a clone: pip install "
            "-c constraints.txt '.[trl]'",
        ),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), "No module named 'mine'"),
        (ModuleNotFoundError("x needs trl; run: pip install y", name="trl"), None),
    ],
)
def test_every_error_becomes_one_sentence(error, said):
    assert sentence(error) == (said or str(error))


def test_errors_are_red_only_where_colour_is_wanted(capsys, monkeypatch):
    for colour, wanted in (("NO_COLOR", False), ("FORCE_COLOR", True)):
        monkeypatch.setenv(colour, "1")
        cli._say(ValueError("[red] x"))
        assert ("\x1b[31m" in (said := capsys.readouterr().err)) == wanted
        assert "error: [red] x" in said
        monkeypatch.delenv(colour)


@pytest.mark.parametrize("where", ["a command", "the start"])
def test_ctrl_c_exits_with_130_and_says_nothing(flowtracer, monkeypatch, saved, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if where == "a command":
        monkeypatch.setattr(ft, "load", interrupted)
    else:
        monkeypatch.setattr(cli, "app", interrupted)
    ran = flowtracer("report", saved)
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "")


def _reads_input(about):
    """Whether it waits in the call `read`, number 0 or 63, of descriptor 0."""
    call = (about / "syscall").read_text().split()[:2]
    return call in (["0", "0x0"], ["63", "0x0"])


def test_ctrl_c_ends_a_process_quietly(plain_model):
    """While it waits for its prompt."""
    command = [sys.executable, "-m", "flowtracer_plugin", "trace", "--model", plain_model]
    process = subprocess.Popen(
        [*command, "--prompt", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    # Imports also read pipes, of processes that they start: wait for a call about descriptor 0.
    about = Path(f"/proc/{process.pid}")
    while b"pipe_read" not in (about / "wchan").read_bytes() or not _reads_input(about):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert err.strip() == b""
    assert (process.returncode, out) == (130, b"")


@pytest.mark.parametrize(
    "program", [[sys.executable, "-m", "flowtracer_plugin"], [SCRIPTS / "flowtracer"]]
)
def test_a_closed_standard_output_loses_no_page_and_shows_no_error(program, tmp_path):
    """Such as that of `flowtracer report FILE | head`, with more than fits into a pipe."""
    long = ft.wrap(tiny_llama(max_position_embeddings=2000), tiny_tokenizer())
    file, page = long.trace(PROMPT * 30, RESPONSE).save(tmp_path / "a.flow"), tmp_path / "x.html"
    view = ["--json"] if len(program) == 1 else []
    reading, writing = os.pipe()
    os.close(reading)
    command = [*program, "report", file, "--html", page, *view]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, cwd=ROOT)
    os.close(writing)
    assert ran.stderr.decode() == f"wrote {page}\n"
    assert "<html" in page.read_text()
    assert ran.returncode in (0, 1)


def test_files_are_written_before_a_view_that_nobody_reads(
    flowtracer, plain_model, tmp_path, monkeypatch
):
    def refuse(*parts, **options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("flowtracer_plugin.cli.outputs.print_document", refuse)
    page, file = tmp_path / "x.html", tmp_path / "x.flow"
    flowtracer(*tracing(plain_model, "--html", page, "--save", file, "--json"))
    assert "<html" in page.read_text()
    assert ft.load(file)
