"""The documentation site: it builds without warnings, has no dead links, and loads nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import flowtracer_plugin
from flowtracer_plugin import grpo, report
from tests.documents.snippets import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "."]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [*command, folder], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return folder


class Document(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := named.get(key)))
        if tag == "a":
            self.links += [named["href"]] if "href" in named else []
            return
        sources = [named.get(key) for key in ("src", "href", "srcset", "data", "poster")]
        self.loads += [source for source in sources if source]

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Document]:
    return {path: Document(path) for path in sorted(site.rglob("*.html"))}


def test_the_makefile_builds_what_is_tested_here():
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs: $(STAMP)\n")[2].splitlines()[0]
    assert recipe.split()[0] == "$(BIN)/sphinx-build"
    assert "-W --keep-going -c docs . build/docs" in recipe
    assert re.search(r"^make docs$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_every_document_is_a_page(pages, site):
    written = [*(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    written += [ROOT / name / "README.md" for name in ("adapters", "benchmarks")]
    found = {path.relative_to(site).with_suffix("") for path in pages}
    assert {path.relative_to(ROOT).with_suffix("") for path in written} <= found


def test_the_gallery_has_the_pages_that_it_links(site):
    linked = re.findall(r'href="gallery/(\w+)\.html"', (ROOT / "docs/gallery.md").read_text())
    pages = {path.stem: path.read_text("utf-8") for path in (site / "docs/gallery").iterdir()}
    assert sorted(pages) == sorted(linked)
    assert len(pages) == 4
    assert all("FlowTracer" in page for page in pages.values())
    # The numbers of the long chat are those of a larger model.
    assert "SmolLM2" in pages["long_chat"]


def test_every_link_within_the_site_leads_somewhere(pages):
    dead, counted = [], 0
    for path, document in pages.items():
        for link in [*document.links, *document.loads]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            counted += 1
            target = path.parent / unquote(parts.path) if parts.path else path
            if not target.is_file():
                dead.append((path.name, link))
            elif target.suffix == ".html" and path.name != "search.html":
                anchors = pages[target.resolve()].anchors
                # The script of a trace's page goes to tokens; tests of that page follow them.
                token = path.parent.name == "gallery" and re.fullmatch(r"t\d+", parts.fragment)
                if not token and unquote(parts.fragment) not in anchors:
                    dead.append((path.name, link))
    assert dead == []
    assert counted > 500


def test_the_site_loads_nothing_from_elsewhere(pages, site):
    loads = {one for document in pages.values() for one in document.loads}
    assert [one for one in loads if re.match(r"(?:\w+:)?//", one)] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", styles) == []


def test_links_to_other_sites_are_encrypted_links_to_known_ones(pages):
    links = {link for document in pages.values() for link in document.links}
    hosts = {urlsplit(link).netloc for link in links if urlsplit(link).scheme}
    assert {urlsplit(link).scheme for link in links} == {"", "https"}
    assert hosts <= {
        "arxiv.org",
        "docs.ray.io",
        "docs.kidger.site",
        "github.com",
        "huggingface.co",
        "pradyunsg.me",
        "www.sphinx-doc.org",
    }


def test_formulas_are_drawn_by_the_browser(site):
    html = (site / "docs/method.html").read_text()
    drawn = html.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">')
    assert drawn == (ROOT / "docs/method.md").read_text().count("$$") / 2 > 0
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("module", [flowtracer_plugin, grpo, report], ids=lambda one: one.__name__)
def test_the_reference_has_every_public_name(pages, site, module):
    names = {f"{module.__name__}.{name}" for name in module.__all__ if name != "__version__"}
    assert names - pages[site / "docs/api.html"].anchors == set()


def test_the_reference_of_the_command_has_every_option(site):
    from typer.testing import CliRunner

    from flowtracer_plugin.cli.commands import app

    html = (site / "docs/command_line.html").read_text()
    helped = CliRunner().invoke(app, ["trace", "--help"], terminal_width=200).output
    options = set(re.findall(r"--[a-z-]+", helped))
    assert {"--prompt", "--layers"} < options
    assert {one for one in options if one not in html} == set()


@pytest.mark.browser
def test_the_address_of_the_site_leads_to_its_first_page(site, chromium):
    page = chromium.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_url((site / "docs/index.html").as_uri())


@pytest.mark.browser
def test_pages_fit_a_telephone_and_say_nothing_to_the_console(pages, site, chromium):
    said, requested, wide = [], [], []
    page = chromium.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    for path in set(pages) - {site / "index.html"}:
        page.goto(path.as_uri())
        for width in (1280, 375):
            page.set_viewport_size({"width": width, "height": 800})
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wide.append((path.name, width))
    assert said == []
    assert wide == []
    assert {urlsplit(address).scheme for address in requested} <= {"file", "data"}
