"""A trace to look at: one page, a notebook cell, the terminal."""

from flowtracer_plugin.report.page import render_notebook, render_page, write_page

__all__ = ["render_notebook", "render_page", "write_page"]
