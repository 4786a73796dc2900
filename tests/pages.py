"""What the tests of the pages share: hostile texts, a parser, and a real browser."""

import json
import os
import re
import subprocess
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
    "{% include 'page.css' %}",
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


CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",
)


def load_page(folder, html, fragment="", width=1280):
    """Loads a page in Chromium; gives the DOM after its scripts ran, and what the console said."""
    path = folder / "page.html"
    path.write_text(html, "utf-8")
    command = [os.environ["FLOWTRACER_CHROMIUM"], *CHROMIUM_OPTIONS, f"--window-size={width},900"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri() + fragment]
    run = subprocess.run(command, capture_output=True, timeout=120, check=True, encoding="utf-8")
    return run.stdout, "\n".join(re.findall(r".*CONSOLE.*", run.stderr))
