"""FlowTracer as a Hugging Face Space: the app with the tiny model that the package includes."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from flowtracer_plugin.app.blocks import build
from flowtracer_plugin.cli.tracing import DEMO_QUESTION, demo_model

folder = demo_model()  # or the id of any causal language model on the hub, such as Qwen/Qwen3-0.6B
model = AutoModelForCausalLM.from_pretrained(folder)
demo = build(ft.wrap(model, AutoTokenizer.from_pretrained(folder)), prompt=DEMO_QUESTION)

if __name__ == "__main__":
    demo.launch(footer_links=["gradio"], run_history=False, ssr_mode=False)
