import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowtracer_plugin as ft
from flowtracer_plugin import cli
from tests.families import quiet_transformers
from tests.tiny import MESSAGES, PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

EVERYTHING = r"re:(?s)(.+)"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """The folder of a tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    with quiet_transformers():
        tiny_llama().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(chat_model):
    """The same model without one."""
    folder = chat_model.parent / "plain"
    shutil.copytree(chat_model, folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


class Ran:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        # what a box around a message breaks into lines is one sentence
        self.said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


@pytest.fixture
def flowtracer(monkeypatch, capsys):
    """The command in this process: what `flowtracer ARGUMENTS` does, without its start-up time."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["flowtracer", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            cli.main()
        output = capsys.readouterr()
        return Ran(left.value.code or 0, output.out, output.err)

    return run


@pytest.fixture
def trace(flowtracer, plain_model):
    def run(*arguments, model=plain_model, prompt=PROMPT, **options):
        return flowtracer("trace", "--model", model, "--prompt", prompt, *arguments, **options)

    return run


def in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flowtracer_plugin", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(ft.__file__).parent.parent,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def wanted():
    return ft.wrap(tiny_llama(), tiny_tokenizer()).trace(PROMPT, RESPONSE)


def test_a_response_is_traced_and_shown(trace):
    ran = trace("--response", RESPONSE)
    assert ran.code == 0
    assert "apples" in ran.out
    assert ran.err == ""


def test_json_is_the_document_of_the_trace(trace, wanted):
    ran = trace("--response", RESPONSE, "--json")
    document = json.loads(ran.out)
    assert document["text"] == PROMPT + RESPONSE
    assert document["answer"] == {"text": "2", "rule": "phrase", "tokens": [26]}
    found = [token["throughput"] for token in document["tokens"]]
    assert found == pytest.approx(wanted.throughput.tolist(), abs=1e-5)


def test_standard_output_holds_the_json_alone(plain_model, tmp_path):
    ran = in_a_process(
        *("trace", "--model", plain_model, "--prompt", PROMPT, "--json", "--max-new-tokens", 4),
        *("--answer", EVERYTHING, "--save", tmp_path / "a.flow"),
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert ran.stdout.count("\n") == 1
    assert ran.stderr == f"wrote {tmp_path / 'a.flow'}\n"
    assert ft.load(tmp_path / "a.flow").text == document["text"]


def test_the_model_answers_itself(trace):
    greedy = [
        json.loads(trace(*flags, "--json", "--max-new-tokens", 6, "--answer", EVERYTHING).out)
        for flags in ([], ["--generate"])
    ]
    assert greedy[0] == greedy[1]
    assert 12 < len(greedy[0]["tokens"]) <= 18
    assert greedy[0]["answer"]["rule"] == "regex"


def test_samples_follow_the_seed(trace):
    def sampled(seed):
        ran = trace(
            "--sample", "--seed", seed, "--json", "--max-new-tokens", 8, "--answer", EVERYTHING
        )
        return json.loads(ran.out)["text"]

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(3)}) > 1


def test_page_and_file_are_written_and_named(trace, tmp_path, wanted):
    page, file = tmp_path / "new" / "a.html", tmp_path / "a.flow"
    ran = trace("--response", RESPONSE, "--html", page, "--save", file)
    assert ran.code == 0
    assert ran.err == f"wrote {file}\nwrote {page}\n"
    assert "apples" in page.read_text(encoding="utf-8")
    loaded = ft.load(file)
    assert loaded.text == wanted.text
    assert loaded.throughput == pytest.approx(wanted.throughput, abs=1e-5)


@pytest.mark.parametrize(
    ("answer", "found", "rule"),
    [
        ("auto", "2", "phrase"),
        ("last_number", "2", "last_number"),
        ("last_word", "2", "last_word"),
        (r"re:He (had \d)", "had 3", "regex"),
    ],
)
def test_the_answer_can_be_found_in_many_ways(trace, answer, found, rule):
    document = json.loads(trace("--response", RESPONSE, "--json", "--answer", answer).out)
    assert (document["answer"]["text"], document["answer"]["rule"]) == (found, rule)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (["--layers", "1, 4"], "layers", [1, 4]),
        (["--layers", "0"], "layers", [0]),
        (["--layers", "all:2"], "layers", "all:2"),
        (["--target", "decision"], "target", "decision"),
        (["--question", "all"], "question", "all"),
    ],
)
def test_options_reach_the_trace(trace, option, name, value):
    document = json.loads(trace("--response", RESPONSE, "--json", *option).out)
    assert document["options"][name] == value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_can_be_chosen(trace, dtype, monkeypatch):
    seen = []
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda *given: seen.append(load(*given)) or seen[0])
    assert trace("--response", RESPONSE, "--dtype", dtype, "--device", "cpu").code == 0
    assert str(seen[0][0].dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_prompt_can_come_from_standard_input(trace, ending):
    ran = trace("--response", RESPONSE, "--json", prompt="-", stdin=PROMPT + ending)
    assert json.loads(ran.out)["text"] == PROMPT + RESPONSE


def test_a_chat_model_gets_its_template(trace, chat_model):
    through = json.loads(trace("--response", RESPONSE, "--json", model=chat_model).out)
    template = tiny_tokenizer(chat=True).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert through["text"] == template + RESPONSE
    bare = trace("--response", RESPONSE, "--json", "--no-chat", model=chat_model)
    assert json.loads(bare.out)["text"] == PROMPT + RESPONSE
    asked = trace("--response", RESPONSE, "--json", "--question", "user", model=chat_model)
    words = [t["text"] for t in json.loads(asked.out)["tokens"] if t["region"] == "question"]
    assert "".join(words) == PROMPT


def test_version(flowtracer):
    ran = flowtracer("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"flowtracer {ft.__version__}\n", "")


def test_the_help_of_a_command_shows_an_example(flowtracer):
    ran = flowtracer("trace", "--help")
    assert ran.code == 0
    assert 'flowtracer trace --model Qwen/Qwen3-0.6B --prompt "What is 17 * 3?"' in ran.out


def test_without_a_command_there_is_help(flowtracer):
    ran = flowtracer()
    assert ran.code == 2
    assert "Show which tokens carried the answer" in ran.out + ran.err


# mistakes: one sentence on stderr, no traceback


def assert_failed(ran, code, *parts):
    assert ran.code == code
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for part in parts:
        assert part in ran.said, ran.said
    if code == 1:
        first, second, *rest = ran.err.splitlines()
        assert first.startswith("error: ")
        assert second == "(--traceback shows where it arose)"
        assert not rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer", "re:("], "missing ), unterminated subpattern at position 0"),
        (["--answer", "re:2"], "write (...) around the answer"),
        (["--answer", "last"], "last_number, last_word or re:PATTERN, found 'last'"),
        (["--device", "nowhere"], "no 'nowhere' on this machine; wanted auto, cpu, cuda"),
        (["--dtype", "float31"], "'float31' is not one of 'auto', 'float32'"),
        (["--target", "end"], "'end' is not one of 'answer', 'decision'"),
        (["--question", "mask"], "'mask' is not one of 'prompt', 'all', 'user'"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--generate"], "pass --response or --generate, not both"),
        (["--nothing"], "No such option"),
    ],
)
def test_wrong_options_are_usage_errors(trace, arguments, message):
    assert_failed(trace("--response", RESPONSE, *arguments), 2, message)


def test_what_is_missing_is_a_usage_error(flowtracer, plain_model):
    assert_failed(flowtracer("trace"), 2, "Missing option '--model'")
    assert_failed(flowtracer("trace", "--model", plain_model), 2, "Missing option '--prompt'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "center"], "layers must be one of all, early, middle, late"),
        (["--layers", "4,99"], "layers [99] have no attention to read"),
        (["--answer", "boxed"], "no answer found by 'boxed' in the response"),
    ],
)
def test_what_only_the_model_can_tell_fails_in_one_sentence(trace, arguments, message):
    assert_failed(trace("--response", RESPONSE, *arguments), 1, message)


def test_empty_texts_fail_in_one_sentence(trace):
    assert_failed(trace("--response", RESPONSE, prompt=""), 1, "the prompt is empty")
    assert_failed(trace("--response", ""), 1, "the response is empty")


def test_a_folder_without_a_model_is_named(trace, tmp_path):
    ran = trace(model=tmp_path)
    assert_failed(ran, 1, f"'{tmp_path}' has no config.json; wanted the folder of")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "unheard_of"}'),
    ],
    ids=["no weights", "half the weights", "no tokenizer", "half a config", "no such type"],
)
def test_a_broken_folder_is_named(trace, plain_model, tmp_path, break_it):
    folder = tmp_path / "broken"
    shutil.copytree(plain_model, folder)
    break_it(folder)
    assert_failed(
        trace("--response", RESPONSE, model=folder),
        1,
        f"cannot load '{folder}': ",
        "wanted a folder that save_pretrained() of model and tokenizer wrote",
    )


def test_a_folder_that_is_not_there_is_named(trace):
    assert_failed(trace(model="./no/such/folder"), 1, "there is no folder './no/such/folder'")


def test_a_model_that_the_hub_does_not_have_is_named():
    ran = in_a_process("trace", "--model", "nobody/nothing", "--prompt", PROMPT, HF_HUB_OFFLINE="1")
    assert_failed(
        Ran(ran.returncode, ran.stdout, ran.stderr),
        1,
        "there is no folder 'nobody/nothing', and no such model could be had from the hub",
        "check its id and the connection",
    )


def test_the_traceback_can_be_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys,
        "argv",
        ["flowtracer", "trace", "--model", str(tmp_path), "--prompt", "a", "--traceback"],
    )
    with pytest.raises(ValueError, match=r"has no config\.json"):
        cli.main()


def test_files_are_written_even_if_nobody_reads_the_output(plain_model, tmp_path):
    command = [Path(sys.executable).parent / "flowtracer", "trace", "--model", plain_model]
    arguments = ["--prompt", PROMPT, "--response", RESPONSE, "--json"]
    files = ["--html", tmp_path / "x.html", "--save", tmp_path / "x.flow"]
    process = subprocess.Popen(
        [*command, *arguments, *files], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stderr.read()
    process.stderr.close()
    process.wait()
    assert ft.load(tmp_path / "x.flow").text == PROMPT + RESPONSE
    assert "<html" in (tmp_path / "x.html").read_text()


def test_a_page_that_cannot_be_written_does_not_lose_the_trace(flowtracer, plain_model, tmp_path):
    ran = flowtracer(
        *("trace", "--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE),
        *("--html", tmp_path, "--save", tmp_path / "x.flow"),
    )
    assert ran.code == 1
    assert "found the directory" in ran.said
    assert ft.load(tmp_path / "x.flow")


def test_an_adapter_of_peft_is_a_model_too(flowtracer, plain_model, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(plain_model)
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    with quiet_transformers():
        lora.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ran = flowtracer("trace", "--model", tmp_path, "--prompt", PROMPT, "--response", RESPONSE)
    assert ran.code == 0, ran.err
