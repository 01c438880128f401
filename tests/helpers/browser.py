"""The page of the real server in a real browser; only the model is scripted (scripted.py).

Every test fails if the page writes an unexpected error to the console, opens a dialog, or sends a request elsewhere.
"""

import dataclasses
import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scripted

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
expect = sync_api.expect
Page = Any  # playwright's, which the type checker need not have

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the path")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield instance
        instance.close()


@dataclasses.dataclass
class Watch:
    """What a page must not do; `expected` matches console messages that are allowed."""

    expected: re.Pattern[str] | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)

    def console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not (self.expected and self.expected.search(message.text)):
            self.wrong.append(f"console: {message.text}")

    def request(self, url: str, origin: str) -> None:
        if not url.startswith((f"{origin}/", "data:")):
            self.wrong.append(f"request to {url}")

    def dialog(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()


Opener = Callable[..., Page]


@pytest.fixture
def visit(browser: Any) -> Iterator[Opener]:
    """visit(server, expected=None, **context options) -> page, watched until the end of the test."""
    contexts, watches = [], []

    def open_page(server: scripted.Server, expected: re.Pattern[str] | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | options)
        context.set_default_timeout(15_000)
        expect.set_options(timeout=15_000)
        page, watch = context.new_page(), Watch(expected)
        page.on("console", watch.console)
        page.on("pageerror", lambda error: watch.wrong.append(f"exception: {error}"))
        page.on("request", lambda request: watch.request(request.url, server.url))
        page.on("dialog", watch.dialog)
        page.on("popup", lambda popup: watch.wrong.append(f"popup: {popup.url}"))
        contexts.append(context)
        watches.append(watch)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [wrong for watch in watches for wrong in watch.wrong] == []


def say(page: Page, text: str) -> None:
    """Type a message and send it by Enter."""
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def answer(page: Page, index: int = -1) -> Any:
    """The body of an answer."""
    return page.locator("article.answer .body").nth(index)


def finished(page: Page, count: int) -> None:
    """Wait until there are `count` complete answers."""
    expect(page.locator("article.answer.done")).to_have_count(count)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def texts(page: Page) -> list[str]:
    """The conversation as it is shown."""
    return [text.strip() for text in page.locator("article .bubble, article .body").all_inner_texts()]


def stats(server: scripted.Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/stats") as response:
        return json.load(response)


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for a condition of the server while the browser keeps running."""
    for _ in range(250):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("the condition was not met in time")
