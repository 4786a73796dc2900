import json
import re
import sys

import pytest
import rich.console

from flowtracer_plugin.cli.outputs import print_results
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES
from tests.cli.command_line import in_a_process
from tests.evaluation.planted import planted_model, planted_story, planted_text, planted_tokenizer

QUICK = ("--percents", "10,20", "--gaps", "1", "--draws", "2", "--answer", "re:=(.)$")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    planted_model().save_pretrained(folder)
    planted_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = []
    for seed in range(3):
        prompt, response = planted_story(seed)
        rows.append({"prompt": prompt, "response": response, "answer": planted_text(seed)[3]})
    rows[1]["answer"] = "none"
    rows.append({"prompt": "^ @ ", "response": "a>b "})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_evaluation_is_printed_as_json(flowtracer, model, data):
    ran = flowtracer("evaluate", model, data, *QUICK, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["examples"], found["measured"], found["right"]) == (4, 3, 2)
    assert found["left_out"] == {"no_answer": 1}
    scores = {(one["score"], one["side"]): one for one in found["knock_out"]}
    flow = scores["flow:decision", "top"]
    assert len(flow["drop"]) == 2
    assert flow["drop"][1]["low"] > 10
    assert flow["over_chance"]["mean"] == pytest.approx(
        flow["aopc"]["mean"] - scores["random", "top"]["aopc"]["mean"]
    )
    assert found["settings"]["options"]["percents"] == [10, 20]


def test_a_table_names_the_scores_and_what_was_left_out(flowtracer, model, data):
    ran = flowtracer("evaluate", model, data, *QUICK, "--scores", "recency,flow:decision")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("3 of 4 examples measured, ")
    assert "1 left out: no answer was found in the response, as in row 3: no answer" in ran.out
    assert "2 of the 3 answers are right" in ran.out
    lines = [line.split()[0] for line in ran.out.splitlines() if re.search(r"…", line)]
    compared = ["attention:decision", "flow", "flow:decision", "recency"]
    controls = ["random", "random_class", "random_position"]
    assert sorted(lines) == sorted([*compared, *controls])
    assert lines.index("flow:decision") < lines.index("random")
    assert "10 %" in ran.out
    assert "1 right before the answer are spared" in ran.out


def test_scores_may_be_any_scorer_and_products(flowtracer, model, data):
    names = ["flow*entropy", "coupled", "shuffled:sharp", "random*surprisal"]
    ran = flowtracer(
        "evaluate", model, data, *QUICK, "--scores", ",".join(names), "--limit", "1", "--json"
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    wanted = [*names, "flow", "attention:decision"]
    assert found["settings"]["scores"] == wanted
    assert {one["score"] for one in found["knock_out"] if one["side"] == "bottom"} == set(wanted)


def test_all_protocols_can_be_run_and_a_page_written(flowtracer, model, data, tmp_path):
    page, scores = tmp_path / "page.html", "recency,flow:decision"
    ran = flowtracer(
        "evaluate", model, data, *QUICK, "--protocols", "all", "--scores", scores, "--html", page,
        "--max-new-tokens", "4", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["examples"] == 4
    for name in ("knock_out", "curves", "edges"):
        assert found[name], name
    # Half of these texts is too short to continue.
    assert found["counted"] == {
        "knock_out": 3, "curves": 3, "lines": 0, "edges": 3, "regeneration": 0
    }  # fmt: skip
    assert {one["score"] for one in found["curves"]} >= {"flow", "recency", "random"}
    assert page.read_text("utf-8").count("<table") >= 4
    ran = flowtracer("evaluate", model, data, *QUICK, "--protocols", "edges,knock_out,regeneration")
    assert "regeneration: 0 of 3 examples; 3 could not be run, as in row 0: only" in ran.out
    assert "Edges with the most flow" in ran.out
    assert "Curves" not in ran.out


def test_results_are_kept_and_continued(flowtracer, model, data, tmp_path):
    path = tmp_path / "results.jsonl"
    first = flowtracer("evaluate", model, data, *QUICK, "--output", path, "--limit", "1")
    assert first.out.startswith("1 of 1 examples measured")
    assert len(path.read_text().splitlines()) == 2
    more = flowtracer("evaluate", model, data, *QUICK, "--output", path, "--json")
    assert len(path.read_text().splitlines()) == 5
    again = flowtracer("evaluate", model, data, *QUICK, "--output", path, "--json")
    assert again.out == more.out


def test_without_a_terminal_there_is_a_line_for_each_example(flowtracer, model, data, tmp_path):
    call = ("evaluate", model, data, *FEW, "--output", tmp_path / "results.jsonl")
    flowtracer(*call, "--limit", "1")
    lines = flowtracer(*call).err.splitlines()
    times = r"\d:\d\d:\d\d so far, about \d:\d\d:\d\d left"
    assert re.fullmatch(f"example 2 of 4: row 1 measured; {times}", lines[0])
    assert re.fullmatch(
        f"example 4 of 4: row 3 left out, no answer was found in the response; {times}", lines[2]
    )
    assert len(lines) == 3


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    flowtracer, model, data, tmp_path, monkeypatch
):
    from flowtracer_plugin.evaluation import run

    real, path = run.evaluate_example, tmp_path / "results.jsonl"

    def stopped(tracer, example, settings):
        if example.row == 2:
            raise KeyboardInterrupt
        return real(tracer, example, settings)

    with monkeypatch.context() as patched:
        patched.setattr(run, "evaluate_example", stopped)
        ran = flowtracer("evaluate", model, data, *FEW, "--output", path)
        nowhere = flowtracer("evaluate", model, data, *FEW)
    assert (ran.code, ran.out) == (130, "")
    assert f"stopped: 2 of 4 examples are kept in {path}; the same command goes on" in ran.said
    assert "stopped: nothing is kept; with --output, the same command goes on" in nowhere.said
    again = flowtracer("evaluate", model, data, *FEW, "--output", path)
    assert again.code == 0
    assert "example 3 of 4: row 2 measured" in again.err
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("content", "option", "code", "said"),
    [
        ("hello\n", "--output", 1, "wanted results of the format flowtracer.evaluation"),
        (None, "--output", 2, "cannot write"),
        (None, "--html", 2, "cannot write"),
        ("other", "--output", 1, "holds results with other settings: options.draws is 2 there"),
    ],
)
def test_outputs_are_checked_before_the_model_is_loaded(
    flowtracer, model, data, tmp_path, monkeypatch, content, option, code, said
):
    path = tmp_path / "results.jsonl" if content else "/dev/null/results"
    if content == "other":
        flowtracer("evaluate", model, data, *FEW, "--limit", "1", option, path)
    elif content:
        path.write_text(content)
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"flowtracer_plugin.model.loading.{name}", None)
    ran = flowtracer("evaluate", model, data, *FEW, "--draws", "3", option, path)
    assert ran.code == code
    assert said in ran.said


FEW = (*QUICK, "--scores", "recency", "--json")


def test_parts_have_files_of_their_own_and_are_put_together(
    flowtracer, model, data, tmp_path, monkeypatch
):
    whole = flowtracer("evaluate", model, data, *FEW)
    call = ("evaluate", model, data, *FEW, "--output", tmp_path / "results.jsonl")
    second = json.loads(flowtracer(*call, "--shard", "2/2").out)
    assert (second["examples"], second["measured"]) == (2, 1)
    assert second["left_out"] == {"no_answer": 1}
    first = flowtracer(*call, "--shard", "1/2")
    assert first.code == 0, first.err
    lines = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert {name: len(found) for name, found in lines.items()} == {
        "results-1-of-2.jsonl": 3,
        "results-2-of-2.jsonl": 3,
    }
    assert [json.loads(line)["row"] for line in lines["results-2-of-2.jsonl"][1:]] == [1, 3]
    monkeypatch.setattr("flowtracer_plugin.evaluation.run.evaluate_example", None)
    again = flowtracer(*call)
    assert again.code == 0, again.err
    assert again.out == whole.out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 5


def test_parts_with_other_settings_are_refused(flowtracer, model, data, tmp_path):
    call = ("evaluate", model, data, *FEW, "--output", tmp_path / "results.jsonl")
    assert flowtracer(*call, "--shard", "1/2").code == 0
    ran = flowtracer(*call, "--rows", "answer")
    assert ran.code == 1
    assert "results-1-of-2.jsonl' holds results with other settings" in ran.said


@pytest.mark.slow
def test_several_workers_measure_the_same(flowtracer, model, data, tmp_path):
    one = flowtracer("evaluate", model, data, *FEW)
    ran = in_a_process("evaluate", model, data, *FEW, "--workers", 2, OMP_NUM_THREADS="1")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads(one.out)


def test_a_run_that_measures_nothing_fails(flowtracer, model, data):
    ran = flowtracer("evaluate", model, data, *QUICK, "--prompt-column", "response")
    assert ran.code == 0
    nothing = flowtracer("evaluate", model, data, *QUICK[:-1], "last_word", "--gaps", "30")
    assert nothing.code == 1
    assert nothing.out.startswith("0 of 4 examples measured")
    assert "too few tokens before the answer" in nothing.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--percents", "5,x"), 2, "wanted whole numbers such as 1,2,5, found '5,x'"),
        (("--percents", "0"), 1, "percents must be from 1 to 100"),
        (("--scores", "flow,love"), 2, "one of flow, reach, .* got 'love' .or recency"),
        (("--scores", "entropy:sharp"), 2, "'entropy' reads none; leave out ':sharp'"),
        (("--scores", "flow,oracle"), 2, "the score 'oracle' needs oracle, a pattern"),
        (("--prompt-column", "love"), 1, "have no column 'love', they have 'prompt'"),
        (("--answer", "love"), 2, "wanted auto, .* found 'love'"),
        (("--rows", "none"), 2, "'future', 'answer'"),
        (("--protocols", "love"), 2, "some of knock_out, curves, .*, got love"),
        (("--setting", "love"), 2, "'given', 'compute'"),
        (("--shard", "3/2"), 2, "wanted such as 3/8"),
        (("--shard", "1/2", "--output", "/dev/null/x.jsonl"), 2, "cannot write"),
        (("--gpus-per-worker", "1"), 2, "are for --engine ray"),
    ],
)
def test_mistakes_end_in_a_sentence(flowtracer, model, data, arguments, code, said):
    ran = flowtracer("evaluate", model, data, *arguments)
    assert ran.code == code
    assert re.search(said, ran.said)
    assert "Traceback" not in ran.err


def test_help_names_every_score(flowtracer):
    shown = flowtracer("evaluate", "--help").out
    assert all(name in shown for name in TOKEN_SCORES)


HEADS = ("score", "1 %", "mean", "bottom", "− random")
WIDE = ("-10.07 (-12.32…-11.89)", "-10.07")
ROWS = (("my_scorers:digits_only", *[WIDE] * 4), ("flow", *["0.00"] * 4), ("uniform", *[""] * 4))


@pytest.fixture
def printed(monkeypatch, capsys):
    """The lines of a table in a terminal of some width."""
    real = rich.console.Console

    def printed(columns, rows=ROWS, spare=("1 %", "bottom")):
        with monkeypatch.context() as patch:
            patch.setattr(
                rich.console,
                "Console",
                lambda width: real(width=width or columns, force_terminal=False),
            )
            patch.setattr(sys.stdout, "isatty", lambda: True)
            print_results("drops", HEADS, rows, spare=spare)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return printed


def test_a_wide_terminal_shows_the_whole_table(printed):
    _, title, heads, first, *_ = printed(124)
    assert (title, heads.split("  ")[0]) == ("drops", "score")
    assert first.split("  ") == ["my_scorers:digits_only", *[WIDE[0]] * 4]


@pytest.mark.parametrize(
    ("width", "shown", "said"),
    [
        (92, ["-10.07", WIDE[0], "-10.07", WIDE[0]], "the uncertainty of 1 %, bottom"),
        (81, ["-10.07", WIDE[0], "-10.07", WIDE[0]], "the uncertainty of 1 %, bottom"),
        (76, [WIDE[0], "-10.07", WIDE[0]], "the columns 1 % and the uncertainty of bottom"),
        (64, [WIDE[0], WIDE[0]], "the columns 1 %, bottom"),
        (40, ["-10.07", "-10.07"], "the columns 1 %, bottom and the uncertainty of mean, − random"),
    ],
)
def test_a_narrow_terminal_shows_less_and_says_so_but_folds_no_number(printed, width, shown, said):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    assert lines[3].startswith("my_scorers:")
    assert [one.strip() for one in re.split("  +", lines[3])][1:] == shown
    assert (lines[4].strip() == "digits_only") == (width < 90)
    end = lines.index(next(line for line in lines if line.startswith("uniform"))) + 1
    assert " ".join(lines[end:]) == f"a wider terminal and --json also show {said}"


def test_names_that_are_too_long_for_the_terminal_are_folded(printed):
    name, cells = "my_own_package_of_scorers.module:digits_only", ["0.00"] * 4
    lines = printed(30, rows=[(name, *cells)], spare=())
    text = "".join("".join(lines).split())
    assert sorted(text) == sorted("".join(("drops", *HEADS, name, *cells)).replace(" ", ""))
