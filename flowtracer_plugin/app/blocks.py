"""The app's surface, in Gradio, and its server on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

# Before nnsight, which adds a method to `object` that such classes of the server cannot take.
from anyio.abc import SocketAttribute  # noqa: F401
from anyio.streams.file import FileStreamAttribute  # noqa: F401
from anyio.streams.tls import TLSAttribute  # noqa: F401
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flowtracer_plugin.app import actions
from flowtracer_plugin.model.causal_lm import model_name
from flowtracer_plugin.model.cutting import KnockOutError
from flowtracer_plugin.options import EVERYWHERE, PRESETS, preset_of
from flowtracer_plugin.report.display import model_label
from flowtracer_plugin.text.answers import FINDERS
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

HOST = "127.0.0.1"
"""The address of the server: other machines cannot reach it."""

_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
_SESSIONS = 20  # whose traces are kept
_TROUBLES = (ValueError, LookupError, RuntimeError, MemoryError)
_HEAD = """<h1>FlowTracer</h1>
<p>Which tokens carried an answer of <b>{model}</b>? Let the model answer, or paste a response.</p>
<style>
.lines .wrap {{ max-height: 40em; overflow-y: auto; }}
.lines label {{ width: 100%; }}
</style>"""

Shown = tuple[FlowTrace | None, str, Any, str, str]
"""The trace, what is said about it, the lines to hide, the effect of hiding them, and the page."""


def build(tracer: FlowTracer, *, prompt: str = "") -> gr.Blocks:
    """The app for one model; its `launch()` serves it.

    Args:
        tracer: The tracer of the model, with its tokenizer.
        prompt: The prompt that stands in the app at first.

    Raises:
        ValueError: The tracer has no tokenizer.
    """
    templated = bool(tracer.require_tokenizer().chat_template)
    model = actions.inert(model_label(model_name(tracer.model)))
    with gr.Blocks(title="FlowTracer", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_HEAD.format(model=model))
        with gr.Row():
            asked = gr.Textbox(prompt, label="Prompt", lines=4, max_lines=12)
            response = gr.Textbox("", label="Response", lines=4, max_lines=12)
        with gr.Row():
            answer = gr.Button("Let the model answer", variant="primary")
            trace = gr.Button("Trace this response")
        with gr.Accordion("Options", open=False), gr.Row():
            preset = gr.Dropdown(
                list(PRESETS), value=preset_of(tracer.options) or EVERYWHERE, label="Preset"
            )
            finder = gr.Dropdown(["auto", *FINDERS], value="auto", label="Answer finder")
            words = gr.Textbox("", label="Answer, in place of the finder's")
            length = gr.Slider(1, 1024, value=256, step=1, label="Most new tokens")
            chat = gr.Checkbox(templated, label="Chat template", visible=templated)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                status, effect = gr.HTML(elem_id="status"), gr.HTML(elem_id="effect")
                lines = gr.CheckboxGroup(
                    label="Hide lines from the model", elem_classes="lines", visible=False
                )
            with gr.Column(scale=3, min_width=600):
                page, state = gr.HTML(elem_id="page"), gr.State()
        how, shown = [preset, finder, words, chat], [state, status, lines, effect, page]
        alone: dict[str, Any] = {"concurrency_id": "model"}
        answer.click(
            _answering(tracer),
            [asked, length, *how],
            [response, *shown],
            api_name="answer",
            **alone,
        )
        trace.click(_tracing(tracer), [asked, response, *how], shown, api_name="trace", **alone)
        # The last of several quick ticks must not be lost while the first is computed.
        lines.input(
            _hiding(tracer),
            [state, lines],
            effect,
            api_name="hide",
            trigger_mode="always_last",
            **alone,
        )
    return blocks


def serve(blocks: gr.Blocks, port: int, ready: Callable[[str], None]) -> None:
    """Serve the app on this machine until Ctrl-C; `ready` is told its address.

    No browser loads anything from elsewhere, and pages of other sites cannot ask the app.

    Raises:
        OSError: The port is in use.
    """
    guards = [
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        Middleware(_SelfContained),
    ]
    _, address, _ = blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        state_session_capacity=_SESSIONS,
        app_kwargs={"middleware": guards},
    )
    ready(address)
    while True:
        time.sleep(3600)


class _SelfContained:
    """Tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _tracing(tracer: FlowTracer) -> Callable[..., Shown]:
    def run(
        prompt: str,
        response: str | actions.Answer,
        preset: str,
        finder: str,
        words: str,
        chat: bool,
    ) -> Shown:
        try:
            trace = actions.trace(
                tracer, prompt, response, preset=preset, finder=finder, words=words, chat=chat
            )
        except _TROUBLES as error:
            return _nothing(actions.trouble(error))
        page = actions.trace_html(trace)
        try:
            plain = actions.knock_out(tracer.model, trace)
        except KnockOutError as error:  # the trace can be seen all the same
            return trace, actions.trouble(error), _lines(()), "", page
        return trace, actions.said(trace, plain), _lines(actions.lines(trace)), "", page

    return run


def _answering(tracer: FlowTracer) -> Callable[..., Iterator[tuple[str, *Shown]]]:
    traced = _tracing(tracer)

    def run(
        prompt: str, length: float, preset: str, finder: str, words: str, chat: bool
    ) -> Iterator[tuple[str, *Shown]]:
        try:
            answer = actions.answer(tracer, prompt, chat=chat, max_new_tokens=int(length))
        except _TROUBLES as error:
            yield "", *_nothing(actions.trouble(error))
            return
        yield answer.text, *_nothing("Tracing …")
        yield answer.text, *traced(prompt, answer, preset, finder, words, chat)

    return run


def _hiding(tracer: FlowTracer) -> Callable[..., str]:
    def run(trace: FlowTrace, numbers: list[int]) -> str:
        if not numbers:
            return ""
        try:
            return actions.said(trace, actions.knock_out(tracer.model, trace, numbers), numbers)
        except _TROUBLES as error:
            return actions.trouble(error)

    return run


def _nothing(said: str) -> Shown:
    return None, said, _lines(()), "", ""


def _lines(lines: Sequence[actions.Line]) -> Any:
    choices = [(f"{line.number}: {line.text}", line.number) for line in lines]
    return gr.CheckboxGroup(choices, value=[], visible=bool(choices))
