"""The prompt of `trace` and `generate`: from the shell, from a file, as chat messages."""

import json

import pytest

from tests.cli.command_line import assert_failed
from tests.tiny import PROMPT, RESPONSE, tiny_tokenizer

SYSTEM = "You are kind."


def messages(*said):
    return [{"role": role, "content": text} for role, text in said]


def traced(flowtracer, model, *given):
    ran = flowtracer("trace", model, "--json", "--answer", "last_word", *given)
    assert ran.code == 0, ran.said
    return json.loads(ran.out)["text"]


def test_a_prompt_comes_from_the_shell_from_a_file_or_as_messages(flowtracer, chat_model, tmp_path):
    text, chat, said = tmp_path / "prompt.txt", tmp_path / "chat.json", tmp_path / "said.json"
    text.write_text(f"\ufeff{PROMPT}\n", encoding="utf-8")
    asked = [("system", SYSTEM), ("user", PROMPT)]
    chat.write_text(json.dumps(messages(*asked)))
    said.write_text(json.dumps({"messages": messages(*asked, ("assistant", RESPONSE))}))
    response = ["--response", RESPONSE]
    wanted = traced(flowtracer, chat_model, "--prompt", PROMPT, *response)
    assert traced(flowtracer, chat_model, "--prompt-file", text, *response) == wanted
    wanted = traced(
        flowtracer, chat_model, "--prompt", PROMPT, "--system-prompt", SYSTEM, *response
    )
    template = tiny_tokenizer(chat=True).apply_chat_template(
        messages(*asked), tokenize=False, add_generation_prompt=True
    )
    assert wanted == template + RESPONSE
    assert traced(flowtracer, chat_model, "--messages", chat, *response) == wanted
    assert traced(flowtracer, chat_model, "--messages", said) == wanted
    assert_failed(
        flowtracer("trace", chat_model, "--messages", said, *response),
        2,
        "--messages end with a response already",
    )


def test_messages_that_end_with_the_assistants_are_gone_on_with_where_asked(
    flowtracer, chat_model, tmp_path
):
    said = tmp_path / "said.json"
    said.write_text(json.dumps(messages(("user", PROMPT), ("assistant", "Tom has"))))
    go_on = ["--messages", said, "--template-arg", "continue_final_message=true"]
    text = traced(flowtracer, chat_model, *go_on, "--response", RESPONSE)
    assert text.endswith(f"<|assistant|>\nTom has{RESPONSE}")
    made = traced(flowtracer, chat_model, *go_on, "--answer", r"re:(?s)(.+)")
    assert "<|assistant|>\nTom has" in made
    said.write_text(json.dumps(messages(("assistant", "Tom has"))))
    assert_failed(
        flowtracer("generate", chat_model, "--messages", said),
        1,
        "the messages end with one of the assistant",
    )


def test_arguments_reach_the_chat_template(flowtracer, chat_model, monkeypatch):
    seen = []
    real = type(tiny_tokenizer(chat=True)).apply_chat_template

    def apply_chat_template(self, messages, **kwargs):
        seen.append({name: kwargs.get(name) for name in ("enable_thinking", "effort")})
        return real(self, messages, **kwargs)

    monkeypatch.setattr(type(tiny_tokenizer(chat=True)), "apply_chat_template", apply_chat_template)
    given = ["--template-arg", "enable_thinking=false", "--template-arg", "effort=low=er"]
    traced(flowtracer, chat_model, "--prompt", PROMPT, "--response", RESPONSE, *given)
    assert seen
    assert all(one == {"enable_thinking": False, "effort": "low=er"} for one in seen)


@pytest.mark.parametrize("command", ["trace-data", "evaluate", "audit"])
def test_arguments_reach_the_chat_template_of_data(
    flowtracer, chat_model, monkeypatch, tmp_path, command
):
    seen = []
    real = type(tiny_tokenizer(chat=True)).apply_chat_template

    def apply_chat_template(self, messages, **kwargs):
        seen.append(kwargs.get("enable_thinking"))
        return real(self, messages, **kwargs)

    monkeypatch.setattr(type(tiny_tokenizer(chat=True)), "apply_chat_template", apply_chat_template)
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [json.dumps({"prompt": PROMPT, "response": RESPONSE, "answer": "7"})] * 8
    data.write_text("\n".join(rows))
    given = [command, chat_model, data, "--output", output, "--answer", "last_word"]
    given += {
        "trace-data": ["--limit", "1"],
        "evaluate": ["--limit", "1", "--scores", "recency", "--draws", "1"],
        "audit": [
            "--prompts",
            "8",
            "--completions",
            "2",
            "--batches",
            "4",
            "--max-new-tokens",
            "2",
        ],
    }[command]
    flowtracer(*given, "--template-arg", "enable_thinking=false")
    assert seen
    assert set(seen) == {False}
    assert output.exists()
    again = flowtracer(*given, "--template-arg", "enable_thinking=true")
    assert_failed(again, 1, "write to another" if command != "trace-data" else "other settings")
    assert set(seen) == {False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "one of --prompt, --prompt-file and --messages"),
        (["--prompt", "a", "--prompt-file", "FILE"], "one of --prompt, --prompt-file"),
        (["--messages", "FILE", "--system-prompt", "a"], "leave out --system-prompt"),
        (["--prompt", "a", "--no-chat", "--system-prompt", "a"], "leave out --no-chat"),
        (["--prompt", "a", "--template-arg", "thinking"], "wanted KEY=VALUE, found 'thinking'"),
        (["--prompt-file", "MISSING"], "does not exist"),
    ],
)
def test_wrong_usage_is_named(flowtracer, tmp_path, given, message):
    file = tmp_path / "file.txt"
    file.write_text("words")
    names = {"FILE": file, "MISSING": tmp_path / "none"}
    given = [names.get(one, one) for one in given]
    assert_failed(flowtracer("trace", "no-model", *given), 2, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words", "is no JSON text"),
        ('{"a": 1}', "must hold a list of chat messages"),
        ("[1]", "list"),
        ("[]", "list of chat messages such as"),
        ('[{"content": "a"}]', "got [{'content': 'a'}]"),
        ('[{"role": "user", "content": 5}]', "list of chat messages"),
    ],
)
def test_a_file_of_no_messages_is_refused_before_the_model_is_loaded(
    flowtracer, tmp_path, content, message
):
    file = tmp_path / "chat.json"
    file.write_text(content)
    assert_failed(flowtracer("generate", "no-model", "--messages", file), 1, message)


def test_a_system_prompt_needs_a_template(flowtracer, plain_model):
    given = ["--prompt", PROMPT, "--response", RESPONSE, "--system-prompt", SYSTEM]
    ran = flowtracer("trace", plain_model, *given)
    assert_failed(ran, 1, "need a chat template, and this model has none")


def test_messages_without_a_template_and_blank_texts_are_answered(
    flowtracer, plain_model, tmp_path
):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(messages(("user", PROMPT))))
    ran = flowtracer("generate", plain_model, "--messages", chat)
    assert_failed(ran, 1, "--messages need a chat template, and this model has none; pass the text")
    ran = flowtracer("generate", plain_model, "--prompt", " \n")
    assert_failed(ran, 1, "the prompt is empty, so there is nothing to trace")
    ran = flowtracer("trace", plain_model, "--prompt", PROMPT, "--response", " ")
    assert_failed(ran, 1, "the response is empty")
    ran = flowtracer("generate", plain_model, "--prompt", PROMPT, "--question", "turns")
    assert_failed(ran, 1, "shows it as it is; pass --question prompt")
    assert "mask" not in ran.said
