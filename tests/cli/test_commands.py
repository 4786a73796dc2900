import errno
import json
import os
import re
import shutil
import sys
from functools import partial

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import flowtracer_plugin as ft
from flowtracer_plugin.attention import adapter as attention
from tests.cli.command_line import EVERYTHING, Ran, Terminal, assert_failed, in_a_process
from tests.documents.snippets import ROOT
from tests.families import quiet_transformers
from tests.tiny import MESSAGES, PROMPT, RESPONSE, tiny_llama, tiny_tokenizer


@pytest.fixture
def trace(flowtracer, plain_model):
    def run(*arguments, model=plain_model, prompt=PROMPT, **options):
        return flowtracer("trace", "--model", model, "--prompt", prompt, *arguments, **options)

    return run


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


def test_standard_output_holds_the_json_alone_in_utf_8(plain_model, tmp_path):
    prompt = "Zoë hat 3 Äpfel 🍎, 三. Wie viele?"
    ran = in_a_process(
        *("trace", "--model", plain_model, "--prompt", prompt, "--json", "--max-new-tokens", 4),
        *("--answer", EVERYTHING, "--save", tmp_path / "a.flow"),
        PYTHONIOENCODING="ascii",
    )
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert ran.err == f"wrote {tmp_path / 'a.flow'}\n"
    assert document["text"].startswith(prompt)
    assert ft.load(tmp_path / "a.flow").text == document["text"]


def test_the_memory_of_a_trace_is_estimated(flowtracer, plain_model):
    ran = flowtracer("estimate", "--model", plain_model, "--tokens", 40_000, "--batch", 2)
    assert re.fullmatch(
        r"2 × 40,000 tokens: dense \d+ GB, streamed [\d.]+ [MG]B; .+ free → \w+( \w+)?\n", ran.out
    )
    more = flowtracer(
        *("estimate", "--model", plain_model, "--tokens", 40_000, "--layers", "all", "--json")
    )
    document = json.loads(more.out)
    wanted = ft.wrap(tiny_llama(), layers="all").estimate(40_000)
    assert document["dense"] == wanted.dense
    assert document["streamed"] == wanted.streamed
    assert document["mode"] in ("dense", "streamed", None)


def test_samples_follow_the_seed(trace):
    def sampled(seed):
        ran = trace(
            "--do-sample", "--seed", seed, "--json", "--max-new-tokens", 8, "--answer", EVERYTHING
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
    for given, rule in (((), "turns"), (("--question", "user"), "user")):
        ran = trace("--response", RESPONSE, "--json", *given, model=chat_model)
        asked = json.loads(ran.out)
        words = [token["text"] for token in asked["tokens"] if token["region"] == "question"]
        assert ("".join(words), asked["options"]["question"]) == (PROMPT, rule)
    shown = trace("--response", RESPONSE, model=chat_model).out
    assert "12 of 12 question tokens reached, from what the user said" in " ".join(shown.split())


def test_version(flowtracer):
    ran = flowtracer("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"flowtracer {ft.__version__}\n", "")


def test_without_a_command_there_is_help(flowtracer):
    ran = flowtracer()
    assert ran.code == 2
    assert "Show which tokens carried the answer" in ran.out + ran.err


# adapters


def test_adapters_are_listed(flowtracer):
    ran = flowtracer("adapters")
    assert (ran.code, ran.err) == (0, "")
    heads, first, *rest = ran.out.splitlines()
    assert heads.split() == ["adapter", "from", "entry", "point"]
    entry = f"flowtracer-plugin {ft.__version__}  flowtracer_adapters:ADAPTERS"
    assert f"recurrent {entry}".split() == first.split()
    assert any(line.split()[0] == "interface" and line.endswith("  generic") for line in rest)
    assert flowtracer("adapters", "list").out == ran.out


def test_a_skipped_adapter_is_listed_with_the_reason(flowtracer, monkeypatch):
    broken = attention.AdapterEntry(
        name="acme", distribution="acme-x", skipped="it cannot be; mend"
    )
    monkeypatch.setattr(attention, "adapter_entries", lambda: (broken,))
    ran = flowtracer("adapters")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split() == ["acme", "acme-x", "skipped"]
    assert ran.out.endswith("\nacme is skipped: it cannot be; mend\n")
    assert json.loads(flowtracer("adapters", "--json").out)[0]["skipped"] == "it cannot be; mend"
    ran = flowtracer("adapters", "check", "nowhere", "--adapter", "acme")
    assert_failed(ran, 2, "acme is skipped: it cannot be; mend")


@pytest.mark.parametrize("backend", ["nnsight", "interface"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_is_checked_layer_by_layer(flowtracer, plain_model, backend, implementation):
    options = ["--backend", backend, "--attn-implementation", implementation]
    ran = flowtracer("adapters", "check", plain_model, *options)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"model    LlamaForCausalLM, float32, {implementation}\n")
    assert f"\nadapter  interface from flowtracer-plugin {ft.__version__} (" in ran.out
    assert f"\nbackend  {backend}\n" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if "attention_interface" in line]
    assert [int(row[0]) for row in rows] == list(range(6))
    for row in rows:
        assert row[1:4] == [f"model.layers.{row[0]}.self_attn", "attention_interface", "4/2"]
        assert float(row[4]) < float(row[5]) == 2e-3
        assert row[6:] == ["1.00", "0%", "ok"]
    assert ran.out.endswith("\n\n6 of 6 sites pass\n")


def test_a_check_is_printed_as_json(flowtracer, plain_model):
    options = ["--dtype", "bfloat16", "--adapter", "interface", "--json"]
    document = json.loads(flowtracer("adapters", "check", plain_model, *options).out)
    assert document["dtype"] == "bfloat16"
    assert document["adapter"]["entry_point"] == "flowtracer_adapters:ADAPTERS"
    assert (document["passed"], document["problem"]) == (True, None)
    assert [found["layer"] for found in document["sites"]] == list(range(6))
    assert all(found["difference"] < found["tolerance"] == 2e-2 for found in document["sites"])


def test_a_check_needs_no_tokenizer(flowtracer, plain_model, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(plain_model, folder)
    (folder / "tokenizer.json").unlink()
    assert flowtracer("adapters", "check", folder).code == 0


def test_the_wrong_adapter_is_named(flowtracer, trace, plain_model):
    for command in (partial(flowtracer, "adapters", "check", plain_model), trace):
        ran = command("--adapter", "falcon")
        assert_failed(ran, 1, "'falcon' is not for LlamaForCausalLM", "leave --adapter out")
        ran = command("--adapter", "nothing")
        assert_failed(ran, 2, "wanted recurrent, ", "found 'nothing'")


SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def saved(folder, config, model=AutoModelForCausalLM.from_config):
    with quiet_transformers():
        model(config).save_pretrained(folder)
    return folder


def test_a_check_of_a_model_without_attention_says_so(flowtracer, tmp_path):
    config = MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, state_size=4)
    ran = flowtracer("adapters", "check", saved(tmp_path, config))
    assert_failed(ran, 1, "carries information in a recurrent state, not by attention")


@pytest.mark.filterwarnings("ignore:Module .* has a submodule named 'output':UserWarning")
def test_a_check_of_an_encoder_says_that_it_is_not_causal(flowtracer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**SMALL, **sizes, intermediate_size=32)
    ran = flowtracer("adapters", "check", saved(tmp_path, config))
    assert ran.code == 1
    assert ran.out.count("  not causal\n") == 2
    assert "the model is not causal, and information does not flow forward in it" in ran.out


def test_a_check_of_an_encoder_and_decoder_says_what_is_wanted(flowtracer, tmp_path):
    config = T5Config(**SMALL, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16)
    ran = flowtracer("adapters", "check", saved(tmp_path, config, T5ForConditionalGeneration))
    assert_failed(ran, 1, "T5Config", "save_pretrained() of a causal language model wrote")


def test_a_check_of_damaged_files_says_so(flowtracer, plain_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(plain_model, folder)
    os.truncate(folder / "model.safetensors", 5000)
    assert_failed(flowtracer("adapters", "check", folder), 1, f"cannot load '{folder}': ")


def test_a_narrow_table_says_once_what_all_rows_repeat(monkeypatch):
    from flowtracer_plugin.cli.outputs import print_table

    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys, "stdout", Terminal())
    module = "model.layers.{}.self_attn"
    rows = [(str(n), module.format(n), "attention_interface", "ok") for n in range(2)]
    print_table(("layer", "module", "function", "verdict"), rows)
    said = re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue()).splitlines()
    assert [line.rstrip() for line in said] == [
        "everywhere: function attention_interface",
        "layer  module                    verdict",
        "0      model.layers.0.self_attn  ok",
        "1      model.layers.1.self_attn  ok",
    ]


# mistakes: one sentence on stderr, no traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer", "re:("], "missing ), unterminated subpattern at position 0"),
        (["--answer", "re:2"], "write (...) around the answer"),
        (["--answer", "last"], "last_word, re:PATTERN, or text:last for the answer itself"),
        (["--device", "nowhere"], "no 'nowhere' on this machine; cpu is always there"),
        (["--dtype", "float31"], "'float31' is not one of 'auto', 'float32'"),
        (["--target", "end"], "'--target': 'end' is not one of 'answer', 'decision'"),
        (["--question", "mask"], "'mask' is not one of 'auto', 'turns', 'user', 'prompt'"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--layers", "center"], "layers must be one of all, early, middle, late"),
        (["--generate"], "--response gives the answer, and nothing is generated: leave it out"),
        (["--seed", "1"], "leave out --generate, --max-new-tokens, --do-sample, --temperature"),
        (["--nothing"], "No such option"),
    ],
)
def test_wrong_options_are_usage_errors(trace, arguments, message):
    assert_failed(trace("--response", RESPONSE, *arguments), 2, message)


def test_layers_that_the_model_lacks_are_refused(trace):
    ran = trace("--response", RESPONSE, "--layers", "4,99")
    assert_failed(ran, 1, "layers [99] have no attention to read")


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


def test_a_missing_tokenizer_and_an_unknown_attention_are_named(trace, plain_model, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(plain_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    ran = trace("--response", RESPONSE, model=folder)
    assert_failed(ran, 1, "it has no tokenizer (tokenizer.json, tokenizer.model or another)")
    ran = trace("--response", RESPONSE, "--attn-implementation", "flash")
    assert_failed(ran, 1, 'attn_implementation="flash"` is not supported')
    assert "save_pretrained" not in ran.said
    ran = trace("--response", RESPONSE, "--preset", "paper", "--heads", "99:0")
    assert_failed(ran, 1, "choose --layers with this layer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "--model", "examples", "--prompt", "a"], r"has no config\.json"),
        (["train", "--lora_r", "much"], "invalid int value: 'much'"),
    ],
)
def test_the_traceback_can_be_shown(flowtracer, arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        flowtracer(*arguments, "--traceback")


def test_a_page_that_cannot_be_written_does_not_lose_the_trace(
    flowtracer, plain_model, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ft.FlowTrace, "to_html", full)
    page = tmp_path / "x.html"
    ran = flowtracer(
        *("trace", "--model", plain_model, "--prompt", PROMPT, "--response", RESPONSE),
        *("--html", page, "--save", tmp_path / "x.flow"),
    )
    assert ran.code == 1
    assert f"error: cannot write '{page}': No space left on device" in ran.said
    assert "name a file in a folder that you may write to" in ran.said
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


# training, whose own tests are in tests/grpo/test_script.py


def test_the_help_of_training_lists_the_options_of_trl_and_of_flow_credit(flowtracer):
    ran = flowtracer("train", "--help")
    assert ran.code == 0
    usage = "usage: flowtracer train [MODEL] [--config FILE.yaml] [--OPTION VALUE ...]"
    assert ran.out.startswith(usage)
    for option in ("--prompt_column", "--flow_gamma", "--num_generations", "--lora_r"):
        assert f"\n  {option} " in ran.out, option


@pytest.fixture
def train(flowtracer, plain_model, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": PROMPT, "solution": "2"}) + "\n")
    given = {
        "--model_name_or_path": plain_model,
        "--dataset_name": tmp_path / "data.jsonl",
        "--prompt_column": "question",
        "--answer_column": "solution",
        "--reward_funcs": "math_answer",
        "--output_dir": tmp_path / "out",
        "--use_cpu": "true",
    }

    def run(**changed):
        options = given | {f"--{name}": value for name, value in changed.items()}
        pairs = [(name, value) for name, value in options.items() if value is not None]
        return flowtracer("train", *[part for pair in pairs for part in pair])

    return run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset_name": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"dataset_name": None}, "no data: pass --dataset_name FILE"),
        ({"dataset_train_split": "dev"}, 'Unknown split "dev". Should be one of'),
        ({"prompt_column": "ask"}, "no column 'ask', which --prompt_column names; they have"),
        ({"answer_column": "ask"}, "no column 'ask', which --answer_column names; they have"),
        ({"answer_column": None}, "math_answer needs the right answers: pass --answer_column"),
        (
            {"prompt_template": "Q:"},
            "--prompt_template must be hash, boxed or a text with {prompt}",
        ),
        ({"reward_funcs": None}, "no reward: pass --reward_funcs"),
        ({"reward_funcs": "math"}, "there is no reward 'math'; wanted one of math_answer"),
        ({"reward_funcs": "a.b"}, "cannot import the reward 'a.b': No module named 'a'"),
        ({"model_name_or_path": "./nowhere"}, "there is no folder './nowhere'"),
        ({"model_name_or_path": None}, "no model: pass --model_name_or_path"),
        ({"promt": "a"}, "there is no option '--promt'; did you mean --"),
        ({"flow_gamma": "much"}, "invalid float value: 'much'; --help shows what there is"),
        ({"flow_sign": "plus"}, "sign must be one of both, positive, negative, got 'plus'"),
        ({"config": "nowhere.yaml"}, "No such file or directory: 'nowhere.yaml'"),
    ],
    ids=lambda part: " ".join(f"{k}={v}" for k, v in part.items()) if type(part) is dict else "",
)
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_mistakes_in_training_fail_in_one_sentence(train, changed, message, monkeypatch):
    import inspect

    from flowtracer_plugin.grpo import FlowGRPOConfig

    # TRL's own fields do not hold what they declare, which the type checks of the tests refuse.
    monkeypatch.setattr(FlowGRPOConfig, "__init__", inspect.unwrap(FlowGRPOConfig.__init__))
    ran = train(**changed)
    assert_failed(Ran(ran.code, ran.out, error_lines(ran.err)), 1, message)


def error_lines(text):
    """Without the progress bars of loading."""
    lines = [line for line in text.splitlines() if line.startswith(("error", "(--trace", "Trace"))]
    return "\n".join(lines)


def test_without_trl_training_says_what_to_install(flowtracer, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from flowtracer_plugin.grpo import trl_version

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trl_version, "version", version)
    for name in ("script", "trainer"):
        monkeypatch.delitem(sys.modules, f"flowtracer_plugin.grpo.{name}", raising=False)
    ran = flowtracer("train", "--flow_gamma", "2")
    assert_failed(ran, 1, "needs TRL; run: pip install 'flowtracer-plugin[trl]'")
