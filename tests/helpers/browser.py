"""The page of the real server in a real browser; only the model is scripted (scripted.py).

Every test fails if the page writes an unexpected error to the console, opens a dialog, or sends a request elsewhere.
"""

import contextlib
import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scripted

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
expect = sync_api.expect
Page = Any  # playwright's, which the type checker need not have
Opener = Callable[..., Any]

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


@pytest.fixture
def visit(browser: Any) -> Iterator[Opener]:
    """visit(server, expected=None, **context options) -> page, watched until the end of the test.

    `expected` matches the console messages that are allowed.
    """
    problems: list[str] = []
    expect.set_options(timeout=60_000)

    def open_page(server: scripted.Server, expected: re.Pattern[str] | None = None, **options: Any) -> Page:
        def console(message: Any) -> None:
            is_expected = server.uvicorn.should_exit or (expected and expected.search(message.text))
            if message.type in ("error", "warning") and not is_expected:
                problems.append(f"console: {message.text}")

        def request(request: Any) -> None:
            if not request.url.startswith((f"{server.url}/", "data:")):
                problems.append(f"request to {request.url}")

        def dialog(dialog: Any) -> None:
            problems.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        context = stack.enter_context(browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | options))
        context.set_default_timeout(60_000)
        page = context.new_page()
        for listener in (console, request, dialog):
            page.on(listener.__name__, listener)
        page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
        page.on("popup", lambda popup: problems.append(f"popup: {popup.url}"))
        page.goto(server.url)
        return page

    with contextlib.ExitStack() as stack:
        yield open_page
    assert not problems, "; ".join(problems)


@pytest.fixture
def chat(visit: Opener) -> Iterator[Opener]:
    """chat(replies, expected=None, browser={context options}, **server options) -> (page, server)."""
    with contextlib.ExitStack() as stack:

        def open_chat(replies: scripted.Replies, expected: Any = None, browser: Any = None, **options: Any) -> Any:
            server = stack.enter_context(scripted.serve(replies, **options))
            return visit(server, expected, **browser or {}), server

        yield open_chat


def say(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def answer(page: Page, index: int = -1) -> Any:
    return page.locator("article.answer .body").nth(index)


def finished(page: Page, count: int) -> None:
    """Wait until there are `count` complete answers."""
    expect(page.locator("article.answer.done")).to_have_count(count)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def texts(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("article .bubble, article .body").all_inner_texts()]


def stats(server: scripted.Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/stats") as response:
        return json.load(response)


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for a condition of the server or of the page while the browser keeps running."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("the condition was not met in time")
