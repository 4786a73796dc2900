"""What people look at: a trace as a page or a notebook cell, comparisons, evaluations, training."""

from flowtracer_plugin.report.compare import render_comparison, write_comparison
from flowtracer_plugin.report.evaluation import render_evaluation, write_evaluation
from flowtracer_plugin.report.group import (
    CompletionView,
    group_page,
    write_group_page,
    write_index,
)
from flowtracer_plugin.report.page import render_notebook, render_page, write_page

__all__ = [
    "CompletionView",
    "group_page",
    "render_comparison",
    "render_evaluation",
    "render_notebook",
    "render_page",
    "write_comparison",
    "write_evaluation",
    "write_group_page",
    "write_index",
    "write_page",
]
