"""Pages in a real browser: Playwright controls the Chromium that FLOWTRACER_CHROMIUM names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TROUBLES = ("serious", "critical")


@dataclass
class Visits:
    """Opens pages, and collects their console messages, errors and requests.

    Attributes:
        browser: The browser of Playwright.
        folder: The folder for the files of the pages.
        said: Console messages, and errors that no script caught.
        requested: The addresses that pages requested, other than their own.
    """

    browser: Any
    folder: Path
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    count: int = 0

    def open(self, html: str, **options: Any) -> Any:
        """A page with this content; `options` are those of `visit`."""
        self.count += 1
        path = self.folder / f"page-{self.count}.html"
        path.write_text(html, "utf-8")
        return self.visit(path, **options)

    def visit(
        self,
        path: Path,
        *,
        width: int = 1280,
        height: int = 900,
        fragment: str = "",
        **options: Any,
    ) -> Any:
        """The page of a file; `options`, such as `color_scheme`, go to the browser context."""
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce", **options
        )
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self._note(request.url, path))
        page.goto(path.as_uri() + fragment)
        return page

    def _note(self, address: str, path: Path) -> None:
        if not address.startswith((path.as_uri(), "data:", "blob:", "about:srcdoc")):
            self.requested.append(address)


@contextmanager
def open_chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["FLOWTRACER_CHROMIUM"], args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def violations(page: Any) -> list[str]:
    """The problems in the current page that axe-core calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:120]} ({node['failureSummary'].splitlines()[1].strip()})"
        for one in found
        if one["impact"] in TROUBLES
        for node in one["nodes"]
    ]
