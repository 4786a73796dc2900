"""Configuration of the documentation site, which `make docs` builds without a network."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

# ruff: noqa: E402 (the package of this checkout)
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from flowtracer_plugin import __version__

project = "FlowTracer plugin"
project_copyright = "The FlowTracer plugin developers"
release = version = __version__

# The source is the whole checkout (`sphinx-build -c docs .`), so that documents beside the code are
# pages too, and links between documents work on the site and in the repository.
include_patterns = [
    "docs/**.md",
    "adapters/README.md",
    "benchmarks/README.md",
    "examples/ablation/results/README.md",
    "examples/reasoner/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring links to the object of that name, if there is one
_INNER = r"flowtracer_plugin\..*\.(AttentionMap|Check|Decorated)"  # types that no page describes
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(?!flowtracer_plugin).*"),  # others' names
    ("py:class", _INNER),
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = project
html_copy_source = False
html_extra_path = ["index.html"]  # leads to the first page
html_math_renderer = "mathml"
pygments_dark_style = "a11y-high-contrast-dark"


def setup(app: Any) -> None:
    """Add formulas in MathML, the options of commands, the gallery, and fixes of signatures."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("source-read", _add_options)
    app.connect("build-finished", _add_gallery)
    app.connect("autodoc-process-signature", _drop_empty_signature)
    app.connect("autodoc-process-docstring", _escape_shapes, priority=900)  # after napoleon


def _formula(writer: Any, node: Any) -> None:
    block = isinstance(node, nodes.math_block)
    drawn = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div style="overflow-x: auto">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def _add_options(_: Any, page: str, source: list[str]) -> None:
    if page != "docs/command_line":
        return
    import typer
    from typer.cli import get_docs_for_click

    from flowtracer_plugin.cli import app

    command = typer.main.get_command(app)
    with typer.Context(command, info_name="flowtracer") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="flowtracer", indent=2)
    source[0] += "\n\n".join(map(_as_code, text.split("\n\n")))


def _add_gallery(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        from docs.gallery import write_gallery

        # A style of Pygments shows all records of the level INFO on standard error.
        logging.getLogger("flowtracer_plugin").setLevel(logging.WARNING)
        write_gallery(Path(app.outdir) / "docs" / "gallery")


def _as_code(paragraph: str) -> str:
    """A paragraph of a command's help as Markdown: an example, or prose with quoted options."""
    if paragraph.startswith("flowtracer "):
        return f"```bash\n{paragraph}\n```"
    return re.sub(r"(`[^`]*`)|(--[a-z][a-z-]*)", _quoted, paragraph)


def _quoted(match: re.Match[str]) -> str:
    return match[1] or f"`{match[2]}`"


def _drop_empty_signature(*about: Any) -> tuple[None, None] | None:
    """Show no signature for `.. autoclass:: Flow()`, a class that users do not make themselves."""
    *_, signature, _returned = about
    return (None, None) if signature == "()" else None


def _escape_shapes(*about: Any) -> None:
    """Escape `*` in `Float[ndarray, '*batch token']`, which would start emphasis."""
    lines = about[-1]
    lines[:] = [one.replace("*", r"\*") if one.startswith(":vartype") else one for one in lines]
