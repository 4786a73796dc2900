"""`flowtracer generate`, `report`, `compare` and `demo`, and the files that commands write."""

import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin import report
from flowtracer_plugin.cli import (
    compare as cli_compare,
    options as cli_options,
    report as cli_pages,
    tracing as cli_tracing,
)
from flowtracer_plugin.credit import token_scores
from flowtracer_plugin.evaluation import knockout
from flowtracer_plugin.model.cutting import KnockOutError
from flowtracer_plugin.trace.flow_trace import FlowTrace
from tests.cli.command_line import EVERYTHING, Ran, assert_failed, in_a_process
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

OTHER = " He ate 3. 3 - 0 = 3.\nThe answer is 3."


@pytest.fixture(scope="module")
def traces():
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer())
    return [tracer.trace(PROMPT, response) for response in (RESPONSE, OTHER)]


@pytest.fixture
def files(traces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("first.flow", "second.flow")
    return [
        trace.save(Path(name)).relative_to(".") for trace, name in zip(traces, names, strict=True)
    ]


# generate


def test_generate_is_trace_without_a_response(flowtracer, plain_model):
    given = ["--prompt", PROMPT, "--json", "--answer", EVERYTHING, "--max-new-tokens", 6]
    commands = (
        ["generate", plain_model],
        ["generate", "--seed", 0, plain_model],
        ["generate", "--model", plain_model],  # as in earlier versions
        ["trace", f"--model={plain_model}"],
        ["trace", plain_model, "--generate"],
    )
    document, *others = [json.loads(flowtracer(*command, *given).out) for command in commands]
    assert others == [document] * 4
    assert_failed(flowtracer("generate", *given), 2, "Missing argument 'MODEL'")
    given = [plain_model, *given]
    assert 12 < len(document["tokens"]) <= 18
    assert document["answer"]["rule"] == "regex"
    assert_failed(
        flowtracer("generate", *given, "--response", RESPONSE), 2, "No such option: --response"
    )


def test_a_check_says_what_the_answer_loses_without_the_tokens_with_the_most_flow(
    flowtracer, plain_model, tmp_path, monkeypatch
):
    given = ["trace", plain_model, "--prompt", PROMPT, "--response", RESPONSE]
    ran = flowtracer(*given, "--check", "--html", tmp_path / "page.html")
    shown = " ".join(ran.out.split())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert shown.count(" nats lost)") == page.count(" nats lost)") == 5
    assert "nats" not in flowtracer(*given).out
    assert_failed(flowtracer(*given, "--check", "--json"), 2, "add --html FILE")

    def refuse(*_):
        raise KnockOutError("its attention cannot be cut")

    monkeypatch.setattr(knockout, "token_drops", refuse)
    ran = flowtracer(*given, "--check")
    assert ran.code == 0
    assert "nothing is knocked out: its attention cannot be cut" in ran.err
    assert "most flow passes through" in ran.out


def test_a_check_also_knocks_out_what_causal_chooses(flowtracer, plain_model, monkeypatch):
    asked, allowed = [], []

    def causal(_tracer, trace, names):
        assert names == ["causal"]
        if not allowed:
            raise ft.UnsupportedArchitectureError("there are no gradients here")
        scores = np.zeros(len(trace.tokens))
        scores[allowed] = 1.0
        return {"causal": scores}

    def drops(_model, _trace, tokens):
        asked.append(set(tokens))
        return dict.fromkeys(tokens, 1.0)

    monkeypatch.setattr(token_scores, "score_text", causal)
    monkeypatch.setattr(knockout, "token_drops", drops)
    given = ["trace", plain_model, "--prompt", PROMPT, "--response", RESPONSE, "--check"]
    assert flowtracer(*given).code == 0
    (flow,) = asked
    allowed.append(min(set(range(100)) - flow))
    ran = flowtracer(*given)
    assert asked[1] == flow | set(allowed)
    assert f"of the {len(flow) + 1} tokens measured" in " ".join(ran.out.split())


def test_the_heads_of_a_token_are_shown(flowtracer, plain_model, tmp_path, monkeypatch):
    given = ["trace", plain_model, "--prompt", PROMPT, "--response", RESPONSE]
    page = tmp_path / "page.html"
    ran = flowtracer(*given, "--by-head", "answer", "--html", page, "--save", tmp_path / "a.flow")
    place = int(ft.load(tmp_path / "a.flow").spans.answer.argmax())
    assert f", token {place}\n" in ran.out
    assert ran.out.count(", most from ⟨") == page.read_text("utf-8").count(", most from <") == 10
    assert_failed(flowtracer(*given, "--by-head", "answer", "--json"), 2, "add --html FILE")
    assert_failed(flowtracer(*given, "--by-head", "x"), 2, "the number of a token, or answer")
    ran = flowtracer(*given, "--by-head", "3")
    assert ran.code == 0
    assert "no heads are shown: wanted a token that edges lead into" in ran.err
    assert "likeliest paths" in ran.out


def test_options_of_generation_reach_the_model(flowtracer, plain_model, monkeypatch):
    seen = []

    def generate(self, prompt, **options):
        seen.append(options)
        return self.trace(prompt, RESPONSE)

    monkeypatch.setattr(ft.FlowTracer, "generate", generate)
    given = ["generate", "--model", plain_model, "--prompt", PROMPT, "--json"]
    sampling = ["--do-sample", "--temperature", 0.5, "--top-p", 0.9, "--max-new-tokens", 3]
    assert flowtracer(*given, *sampling).code == 0
    wanted = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3}
    assert seen == [{**wanted, "progress": False, "template_kwargs": {}}]
    assert_failed(flowtracer(*given, "--temperature", 1), 2, "--temperature is for sampling: pass")
    assert_failed(flowtracer(*given, "--top-p", 0.5), 2, "--top-p is for sampling: pass")


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--layers", "1, 4", [1, 4]),
        ("--layers", "0", [0]),
        ("--layers", "all:2", "all:2"),
        ("--target", "decision", "decision"),
        ("--question", "all", "all"),
        ("--question-weights", "reach", "reach"),
        ("--boundary", "absorbing", "absorbing"),
        ("--first-token", "drop", "drop"),
    ],
)
def test_options_of_the_flow_reach_the_trace(flowtracer, plain_model, option, text, value):
    given = ["--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE, "--json"]
    given += ["--preset", "paper"]
    document = json.loads(flowtracer("trace", *given, option, text).out)
    name = option[2:].replace("-", "_")
    assert document["options"][name] == value
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper", **{name: value})
    wanted = tracer.trace(PROMPT, RESPONSE).throughput.tolist()
    found = [token["throughput"] for token in document["tokens"]]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_options_of_reading_reach_the_tracer(flowtracer, plain_model, monkeypatch):
    seen = []
    load = cli_tracing.load_tracer

    def kept(*given, **options):
        seen.append(load(*given, **options))
        return seen[0]

    monkeypatch.setattr(cli_tracing, "load_tracer", kept)
    ran = flowtracer(
        *("trace", "--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE, "--json"),
        *("--backend", "interface", "--adapter", "interface", "--block", 8, "--mode", "streamed"),
        *(
            "--attn-implementation",
            "eager",
            "--dtype",
            "bfloat16",
            "--device",
            "cpu",
            "--no-verify",
        ),
    )
    assert ran.code == 0
    (tracer,) = seen
    assert tracer.reader.backend.name == "interface"
    assert tracer.reader.adapter.name == "interface"
    assert (tracer.reader.block, tracer.mode) == (8, "streamed")
    assert tracer.model.config._attn_implementation == "eager"
    assert tracer.model.dtype == torch.bfloat16
    assert not ft.wrap(tiny_llama(), verify=True).reader.verified


# report


def test_a_saved_trace_gets_a_page_beside_it(flowtracer, files, traces):
    ran = flowtracer("report", files[0])
    assert (ran.code, ran.err) == (0, "wrote first.html\n")
    assert Path("first.html").read_text(encoding="utf-8") == report.render_page(traces[0])
    assert "answer '2' found by rule 'phrase'" in ran.out


def test_the_page_can_be_written_elsewhere(flowtracer, files):
    ran = flowtracer("report", files[0], "--html", "new/page.html")
    assert (ran.code, ran.err) == (0, "wrote new/page.html\n")
    assert "<html" in Path("new/page.html").read_text(encoding="utf-8")
    assert not Path("first.html").exists()


def test_the_json_of_a_saved_trace_is_its_document_on_one_line(flowtracer, files, traces):
    ran = flowtracer("report", files[0], "--json")
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"\{.*\}\n", ran.out)
    assert json.loads(ran.out) == json.loads(traces[0].to_json())
    assert not Path("first.html").exists()


def test_several_traces_get_a_page_each(flowtracer, files):
    ran = flowtracer("report", *files)
    assert (ran.code, ran.err) == (0, "wrote first.html\nwrote second.html\nwrote index.html\n")
    assert ran.out.index("first.flow") < ran.out.index("'2'") < ran.out.index("second.flow")
    assert "'3'" in ran.out
    for options in (["--json"], ["--html", "one.html"]):
        assert_failed(flowtracer("report", *files, *options), 2, "for one trace, found 2")


def linked(index):
    """What the list of traces says in each row, and the links in it."""
    page = index.read_text("utf-8")
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in body.split("</tr>")[:-1]]
    return rows, re.findall(r'href="([^"]+)"', body)


def test_a_folder_of_traces_gets_a_page_each_and_a_list(flowtracer, traces, tmp_path):
    folder = tmp_path / "a folder"
    for trace, name in zip(traces, ("b<i>.flow", "a b.flow"), strict=True):
        trace.save(folder / name)
    ran = flowtracer("report", folder)
    assert ran.code == 0
    rows, links = linked(folder / "index.html")
    assert links == ["a%20b.html", "b%3Ci%3E.html"]
    assert (folder / "a b.html").read_text("utf-8") == report.render_page(traces[1])
    assert rows[0][:3] == ["1", "a", "b.flow"]
    assert "b&lt;i&gt;.flow" in rows[1]
    asked = " ".join(rows[0])
    assert "had 3 apples. He ate one. How many?" in asked  # the question, without the first token
    assert rows[0][-4:-2] == ["3", str(len(traces[1].tokens) - 12)]
    assert flowtracer("report", folder).code == 0  # its own list is replaced


def test_the_list_lies_where_all_traces_lie_unless_it_is_named(
    flowtracer, traces, tmp_path, monkeypatch
):
    for name in ("a", "b"):
        traces[0].save(tmp_path / name / "x.flow")
    paths = [tmp_path / "a", tmp_path / "b" / "x.flow"]
    assert flowtracer("report", *paths).code == 0
    assert linked(tmp_path / "index.html")[1] == ["a/x.html", "b/x.html"]
    (tmp_path / "index.html").write_text("<title>My home page</title>")
    ran = flowtracer("report", *paths)
    assert_failed(ran, 2, "holds something else", "name another file with --index")
    (tmp_path / "a" / "x.html").unlink()
    assert flowtracer("report", *paths, "--index", tmp_path / "a" / "list.html").code == 0
    assert linked(tmp_path / "a" / "list.html")[1] == ["x.html", "../b/x.html"]
    ran = flowtracer("report", paths[1], "--index", tmp_path / "list.html")
    assert_failed(ran, 2, "--index lists several traces, and this is one")


def test_a_damaged_trace_costs_no_other_and_is_named_in_the_list(flowtracer, traces, tmp_path):
    (tmp_path / "a.flow").write_text("notes")
    traces[0].save(tmp_path / "b.flow")
    ran = flowtracer("report", tmp_path)
    assert ran.code == 1
    assert "a.flow: cannot read" in ran.err
    assert "error: 1 of 2 files could not be shown, as said above" in ran.err
    rows, links = linked(tmp_path / "index.html")
    assert links == ["b.html"]
    assert rows[0][:4] == ["1", "a.flow", "cannot", "read"]


def test_a_folder_without_traces_says_where_some_are(flowtracer, traces, tmp_path):
    traces[0].save(tmp_path / "out" / "traces" / "x.flow")
    ran = flowtracer("report", tmp_path)
    assert_failed(ran, 2, "there are no files *.flow in", "did you mean", "traces'?")
    (tmp_path / "empty").mkdir()
    assert_failed(flowtracer("report", tmp_path / "empty"), 2, "in", "which --save writes")


def test_a_page_never_overwrites_its_trace():
    assert cli_pages.page_beside(Path("a/x.flow")) == Path("a/x.html")
    assert cli_pages.page_beside(Path("a/x.html")) == Path("a/x.html.html")
    assert cli_pages.page_beside(Path("x")) == Path("x.html")


def test_every_kind_of_file_is_written_by_the_method_of_its_name(
    flowtracer, files, plain_model, monkeypatch
):
    for name in ("parquet", "graphml"):
        write = lambda self, path, name=name: path.write_text(f"{name} of {self.text}")  # noqa: E731
        monkeypatch.setattr(FlowTrace, f"to_{name}", write, raising=False)
    draw = lambda self, path, kind: path.write_text(f"{kind} of {self.text}")  # noqa: E731
    monkeypatch.setattr(FlowTrace, "to_figure", draw, raising=False)
    asked = ["--parquet", "a.parquet", "--graphml", "a.graphml", "--figure", "a.svg"]
    said = "wrote a.parquet\nwrote a.graphml\nwrote a.svg\n"
    ran = flowtracer("report", files[0], *asked)
    assert (ran.code, ran.err) == (0, said)
    assert Path("a.svg").read_text() == f"ribbon of {PROMPT + RESPONSE}"
    assert flowtracer("report", files[0], "--figure", "b.svg", "--figure-kind", "river").code == 0
    assert Path("b.svg").read_text() == f"river of {PROMPT + RESPONSE}"
    tracing = ["trace", "--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE]
    ran = flowtracer(*tracing, *asked, "--save", "a.flow")
    assert (ran.code, ran.err) == (0, "wrote a.flow\n" + said)
    assert Path("a.graphml").read_text() == f"graphml of {PROMPT + RESPONSE}"


def test_a_missing_extra_is_named_after_the_trace_is_saved(
    flowtracer, files, plain_model, monkeypatch
):
    def lacking(self, path):
        raise ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet")

    monkeypatch.setattr(FlowTrace, "to_parquet", lacking, raising=False)
    ran = flowtracer(
        *("trace", "--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE),
        *("--parquet", "a.parquet", "--save", "kept.flow"),
    )
    assert ran.code == 1
    assert "error: this needs pyarrow; run: pip install 'flowtracer-plugin[viz]'" in ran.err
    assert ft.load("kept.flow").text == PROMPT + RESPONSE


def test_a_package_that_a_file_needs_is_missed_before_the_model_is_loaded(flowtracer, monkeypatch):
    monkeypatch.setattr(cli_options, "find_spec", lambda name: None)
    for option, package in (("--parquet", "pyarrow"), ("--graphml", "networkx")):
        ran = flowtracer("generate", "nowhere", "--prompt", "a", option, "x.y")
        assert_failed(
            ran, 2, f"{option} needs {package}; run: pip install 'flowtracer-plugin[viz]'"
        )
    ran = flowtracer("generate", "nowhere", "--prompt", "a", "--figure", "x.svg")
    assert_failed(ran, 2, "--figure needs matplotlib")


# compare


def test_traces_are_compared_on_one_page(flowtracer, files, traces):
    ran = flowtracer("compare", *files)
    assert (ran.code, ran.err) == (0, "wrote comparison.html\n")
    wanted = report.render_comparison(traces, labels=["first", "second"])
    assert Path("comparison.html").read_text("utf-8") == wanted
    heads, *rows = [line.split() for line in ran.out.splitlines()]
    assert heads[:2] == ["trace", "answer"]
    assert [row[:2] for row in rows] == [["first", "2"], ["second", "3"]]


def test_the_right_answer_and_labels_can_be_given(flowtracer, files, traces):
    given = ["--right", " 3", "--label", "a", "--label", "b", "--html", "x.html"]
    ran = flowtracer("compare", *files, *given)
    assert (ran.code, ran.err) == (0, "wrote x.html\n")
    wanted = report.render_comparison(traces, labels=["a", "b"], right=[False, True])
    assert Path("x.html").read_text("utf-8") == wanted
    rows = [line.split() for line in ran.out.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [("a", "wrong"), ("b", "right")]


def test_a_comparison_is_printed_as_json(flowtracer, files, traces):
    from flowtracer_plugin.comparison.traces import compare

    ran = flowtracer("compare", *files, "--right", "2", "--json")
    assert (ran.code, ran.err) == (0, "")
    wanted = compare(traces, labels=["first", "second"], right=[True, False]).to_dict()
    assert json.loads(ran.out) == json.loads(json.dumps(wanted))
    assert not Path("comparison.html").exists()


def test_labels_of_files_with_one_name_contain_their_folders():
    files = [Path("a/x.flow"), Path("b/x.flow")]
    assert cli_compare._labels(files) == ["a/x.flow", "b/x.flow"]


def test_a_comparison_needs_two_traces_and_a_label_for_each(flowtracer, files):
    assert_failed(flowtracer("compare", files[0]), 2, "wanted two or more files", "is one file")
    folder = Path("saved")
    folder.mkdir()
    shutil.copy(files[0], folder)
    assert_failed(flowtracer("compare", folder), 2, "wanted two or more files", "is one file")
    shutil.copy(files[1], folder)
    assert flowtracer("compare", folder, "--right", "2").out.count("right") == 1
    ran = flowtracer("compare", *files, "--label", "a")
    assert_failed(ran, 2, "wanted --label once for each of the 2 files, found it 1 times")


# demo


def test_the_demo_traces_a_question_and_writes_its_page(flowtracer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = flowtracer("demo")
    assert ran.code == 0
    assert "answer '14' found by rule 'boxed'" in ran.out
    first, second = ran.err.splitlines()
    assert first == "wrote flowtracer-demo.html"
    assert second.startswith("your own model: flowtracer generate FOLDER_OR_ID ")
    assert "Ann" in Path("flowtracer-demo.html").read_text(encoding="utf-8")
    document = json.loads(flowtracer("demo", "--json", "--html", "x.html").out)
    assert document["answer"]["text"] == "14"
    assert Path("x.html").exists()


def test_the_model_of_the_demo_is_found_in_a_package_and_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_tracing, "__file__", str(tmp_path / "package/cli/tracing.py"))
    with pytest.raises(FileNotFoundError, match=r"is not in .*; install flowtracer-plugin anew"):
        cli_tracing.demo_model()
    clone, installed = tmp_path / "examples/reasoner/model", tmp_path / "package/reasoner"
    for folder in (clone, installed):
        folder.mkdir(parents=True)
        assert cli_tracing.demo_model() == folder


# the module, and the terminal


def test_the_module_is_the_same_command():
    ran = in_a_process("report", "nowhere.flow", "--html", "/")
    assert ran.code == 2
    assert "Usage: flowtracer report" in ran.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_utf_8_in_any_terminal(flowtracer, encoding, tmp_path, monkeypatch):
    prompt = "Zoë hat 3 Äpfel 🍎, 三. Wie viele?"
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer())
    file = tracer.trace(prompt, RESPONSE).save(tmp_path / "a.flow")

    def shown(*view):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        ran = flowtracer("report", file, *view)
        sys.stdout.flush()
        return ran, written.getvalue()

    ran, written = shown("--json")
    assert json.loads(written.decode())["text"] == prompt + RESPONSE
    ran, written = shown()
    assert (ran.code, ran.err) == (0, f"wrote {tmp_path / 'a.html'}\n")
    assert "answer '2' found by rule 'phrase'" in written.decode(encoding)


def test_half_a_surrogate_pair_is_escaped(flowtracer, traces, tmp_path):
    from dataclasses import replace

    file = replace(traces[0], model="\udcff").save(tmp_path / "a.flow")
    ran = flowtracer("report", file, "--json")
    assert json.loads(ran.out)["model"] == "\udcff"
    assert flowtracer("report", file).code == 0


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_view_fits_its_terminal_and_is_plain_without_colour(
    flowtracer, files, width, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    ran = flowtracer("report", files[0])
    assert max(map(len, ran.out.splitlines())) <= width
    assert "\x1b" not in ran.out


def test_a_bar_is_shown_in_a_terminal_only(flowtracer, plain_model, monkeypatch):
    shown = []
    monkeypatch.setattr(
        ft.FlowTracer,
        "trace",
        lambda self, prompt, response, *, progress, **_: shown.append(progress) or self,
    )
    monkeypatch.setattr(cli_tracing, "deliver", lambda *_: None)
    for terminal in (True, False):
        monkeypatch.setattr(
            cli_tracing, "sys", types.SimpleNamespace(stderr=Ran(0, "", ""), stdin=sys.stdin)
        )
        cli_tracing.sys.stderr.isatty = lambda terminal=terminal: terminal
        given = ["--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE]
        assert flowtracer("trace", *given).code == 0
    assert shown == [True, False]
