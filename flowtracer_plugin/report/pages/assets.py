"""The templates, styles and scripts of all pages, and the writing of a page's file.

A page is self-contained: it loads no font, no script and no image.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.report.carried import nats
from flowtracer_plugin.report.display import (
    direction,
    is_long,
    model_label,
    number,
    p_value,
    percent,
    points,
    shorten,
    signed,
)
from flowtracer_plugin.text.visible import visible

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def write_html(path: str | Path, html: str) -> Path:
    """Write a page to `path`, whole or not at all, and return `path`."""
    write_atomically(Path(path), html.encode())
    return Path(path)


def render(
    template: str, *, styles: tuple[str, ...], script: tuple[str, ...] = (), **context: Any
) -> str:
    """The page of `template`, with its styles and scripts after those that all pages share.

    The same context always gives the same page.
    """
    return (
        _templates()
        .get_template(template)
        .render(
            styles=_joined("base.css", *styles),
            script=_joined("tokens.js", *script) if script else None,
            **context,
        )
    )


def embed(value: Any) -> Markup:
    """`value` as ASCII JSON that is safe in a script element; parsing it restores every text."""
    # HTML can read nothing in it once `<`, `>` and `&` are escaped.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))


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
        "p_value": p_value,
        "points": points,
        "signed": signed,
        "visible": visible,
        "direction": direction,
        "is_long": is_long,
        "digest": _digest,
        "shorten": shorten,
        "nats": nats,
        "model_label": model_label,
    }
    return environment


@cache
def _asset(name: str) -> Markup:
    return Markup(files("flowtracer_plugin.report.pages").joinpath(name).read_text("utf-8"))


def _joined(*names: str) -> Markup:
    """One style, or one script, of several files, so that the scripts share one scope."""
    return Markup("").join(map(_asset, names))


def _digest(content: str) -> str:
    """The hash by which a Content-Security-Policy allows this script or style and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
