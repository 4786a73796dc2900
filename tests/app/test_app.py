"""The app in a real browser, from the server that `flowtracer app` starts."""

import os
import re
import signal
import socket
import subprocess

import pytest

from tests.documents.snippets import ROOT, blocks
from tests.tiny import PROMPT, RESPONSE

pytestmark = [pytest.mark.app, pytest.mark.browser]

HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\"> ${document.title='hacked'} {{ 7 * 7 }}\n"
    "<script>document.title='hacked'</script> The answer is 5"
)


@pytest.fixture(scope="module")
def address(chat_model):
    """The address of a running app, for a tiny model whose tokenizer knows every text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["FLOWTRACER_APP"], "-u", "-m", "flowtracer_plugin", "app", chat_model]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        said = server.stdout.readline()
        address = f"http://127.0.0.1:{port}/"
        if said == f"the app is at {address} on this machine; Ctrl-C ends it\n":
            yield address
        server.send_signal(signal.SIGINT)
        try:
            rest = server.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:  # such as where a shell has it ignore the signal
            server.kill()
            rest = server.communicate()[0]
    assert address in said, said + rest
    assert (server.returncode, rest) == (130, "")


@pytest.fixture
def page(address, chromium):
    """The app's page; it must load nothing from elsewhere, and say nothing to the console."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, troubles = context.new_page(), []
    page.set_default_timeout(60_000)  # a busy machine
    local = (address, "data:", "blob:", "about:srcdoc")
    page.on("request", lambda one: one.url.startswith(local) or troubles.append(one.url))
    page.on("console", lambda one: one.type == "error" and troubles.append(one.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert troubles == []


def trace(page, response):
    """Trace a response in the app, and return the frame with its page."""
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Response").fill(response)
    page.get_by_role("button", name="Trace this response").click()
    return page.frame_locator("#page iframe")


def test_a_response_is_traced_and_hidden_lines_move_its_answer(page):
    frame = trace(page, RESPONSE)
    assert "2" in frame.locator("h1").inner_text()
    assert "The answer is 2, found by the rule “phrase”" in page.locator("#status").inner_text()
    page.get_by_label(": 3 - 1 = 2.").check()
    page.get_by_label(": He ate one.").check()
    effect = page.locator("#effect").filter(has_text=re.compile(r"Without lines \d+, \d+, "))
    assert "the probability of 2 is" in effect.inner_text()
    # The page works inside its frame: tokens can be kept, and links lead to places in it.
    frame.locator("#pane .text > span").nth(9).click()
    frame.locator("#facts").wait_for()
    frame.locator(".carried a").first.click()
    frame.get_by_role("link", name="Tables").click()
    assert "2" in frame.locator("h1").inner_text()


def test_the_model_answers_by_the_chosen_options(page):
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_text("Options").click()
    page.get_by_label("number input for Most new tokens").fill("4")
    page.get_by_label("Answer finder").click()
    page.get_by_role("option", name="last_word").click()
    page.get_by_role("button", name="Let the model answer").click()
    page.locator("#status").get_by_text("found by the rule “last_word”").wait_for()
    assert page.get_by_label("Response").input_value()


def test_a_program_asks_the_app_as_the_documentation_says(address):
    (code,) = [one.text for one in blocks(ROOT / "docs/app.md") if one.language == "python"]
    assert "http://127.0.0.1:7860/" in code
    ran = subprocess.run(
        [os.environ["FLOWTRACER_APP"], "-c", code.replace("http://127.0.0.1:7860/", address)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "The answer is <b>4</b>, found by the rule “phrase”" in ran.stdout
    assert "Without line 2, the probability of <b>4</b> is" in ran.stdout


def test_texts_stay_texts_and_mistakes_are_answered(page):
    frame = trace(page, HOSTILE)
    assert "5" in frame.locator("h1").inner_text()
    assert page.get_by_label("<img src=x onerror=").count() == 1
    assert page.get_by_label("{{ 7 * 7 }}").count() == 1
    assert page.title() == "FlowTracer"
    trace(page, "")
    page.get_by_role("alert").filter(has_text="The response is empty").wait_for()
    assert page.locator("#page iframe").count() == 0
