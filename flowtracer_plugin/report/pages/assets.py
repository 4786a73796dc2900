"""Templates, styles and scripts of the pages. They load nothing: no font, no script, no image."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flowtracer_plugin.report.display import direction, number, percent, signed
from flowtracer_plugin.text.visible import visible


def render(
    template: str,
    *,
    styles: str | tuple[str, ...],
    script: str | tuple[str, ...] = (),
    **context: Any,
) -> str:
    """A page of `template`, with its styles and scripts after those that all pages share.

    The same context always gives the same page.
    """
    return (
        _templates()
        .get_template(template)
        .render(
            styles=_joined("base.css", styles),
            script=_joined("tokens.js", script) if script else None,
            **context,
        )
    )


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("flowtracer_plugin", "report/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "signed": signed,
        "visible": visible,
        "direction": direction,
        "digest": _digest,
    }
    return environment


@cache
def _asset(name: str) -> Markup:
    return Markup(files("flowtracer_plugin.report.pages").joinpath(name).read_text("utf-8"))


def _joined(shared: str, own: str | tuple[str, ...]) -> Markup:
    """One style, or one script, since all of it shares a scope."""
    return Markup("").join(map(_asset, (shared, *((own,) if isinstance(own, str) else own))))


def _digest(content: str) -> str:
    """What a Content-Security-Policy calls this script or style: nothing else may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
