"""Shared by the tests of the pages: hostile texts, a parser, and the laws of safe pages."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

HOSTILE = (
    "<script>document.title='hacked'</script>",
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "<svg/onload=document.title='hacked'>",
    "\"' onmouseover=document.title='hacked' x='",
    "</title></style></div>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "{% include 'trace_page.css' %}",
    "javascript:alert(1)",
    "\x00",
    "\x1b[31m",
    "[bold red]",
    "[/]",
    "\ud83d",
    "\u202edesrever",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\r",
    "\x85",
    "\udfff\ud800",
)


class Page(HTMLParser):
    """Tags with their attributes, the scripts, and the text of the tokens."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.tokens, self.styles = [], [], [], []
        self._inside, self._depth = None, 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("script", "style"):
            self._inside = self.scripts if tag == "script" else self.styles
            self._inside.append("")
        elif tag == "div" and attrs.get("class") == "text":
            self._depth = 1
        elif self._depth and tag == "span":
            self._depth = 2
            self.tokens.append("")

    def handle_endtag(self, tag):
        self._inside = None
        if tag == "div":
            self._depth = 0
        elif self._depth and tag == "span":
            self._depth = 1

    def handle_data(self, data):
        if self._inside is not None:
            self._inside[-1] += data
        elif self._depth == 2:
            self.tokens[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[-2])


def assert_only_text(page, harmless):
    """No text of `page` became an element, an attribute or a part of one."""
    known = {(tag, name) for tag, attrs in harmless.tags for name in (*attrs, None)}
    assert {(tag, name) for tag, attrs in page.tags for name in (*attrs, None)} <= known
    values = [value for _, attrs in page.tags for value in attrs.values() if value]
    assert not any("hacked" in value or "alert" in value for value in values)


def assert_loads_nothing(html, link="http-equiv"):
    """The page refers to nothing but `link`, and allows its own script and style only."""
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "").replace(link, "")
    assert not any({"src", "style"} & set(attrs) for _, attrs in page.tags)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|\beval\b", html)
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == _digest(page.styles[0])
    assert rules.get("script-src") == (_digest(page.scripts[-1]) if page.scripts else None)


def _digest(content):
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
