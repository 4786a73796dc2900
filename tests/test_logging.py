"""What is done is logged below the name of the package, and nothing is shown by default."""

import ast
import logging

import flowtracer_plugin as ft
from tests.test_layout import SOURCES, parsed
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer


def test_wrapping_and_tracing_are_logged_and_not_shown(caplog, capfd):
    caplog.set_level("DEBUG", "flowtracer_plugin")
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), answer="last_word")
    trace = tracer.trace(PROMPT, RESPONSE)
    tracer.sample(PROMPT, max_new_tokens=2)
    said = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert ("DEBUG", "preset 'derivation': possible") in said
    wrapped, traced, sampled = (text for level, text in said if level == "INFO")
    assert wrapped.startswith(f"wrapped {tracer!r}: FlowOptions(layers='all', ")
    assert "edges='influence'" in wrapped
    assert traced.startswith(f"traced {len(trace.token_ids)} tokens in ")
    assert sampled.startswith("generated 2 tokens for ")
    assert {one.name.partition(".")[0] for one in caplog.records} == {"flowtracer_plugin"}
    assert capfd.readouterr() == ("", "")


def test_the_package_sets_no_level_of_its_own():
    assert logging.getLogger("flowtracer_plugin").level == logging.NOTSET


def test_every_logger_has_the_name_of_its_module():
    for path in SOURCES.values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                assert ast.unparse(node) in {
                    "logging.getLogger(__name__)",
                    "logging.getLogger('flowtracer_plugin')",
                }, path


def test_the_command_line_shows_it_on_request(flowtracer, monkeypatch):
    configured, logger = [], logging.getLogger("flowtracer_plugin")
    monkeypatch.setattr(logging, "basicConfig", lambda **options: configured.append(options))
    try:
        assert flowtracer("--log", "info", "docs").code == 0
        assert logger.level == logging.INFO
        assert len(configured) == 1
    finally:
        logger.setLevel(logging.NOTSET)
