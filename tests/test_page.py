"""The chat page in a real browser, before the real server: only the model is scripted (tests/scripted.py).

In every test nothing may be written to the browser's console but what the test expects, no dialog may open, and no
request may leave the server's own origin.
"""

import dataclasses
import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanochat import api
from tests import scripted

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
expect = sync_api.expect
Page = Any  # playwright's; it is no dependency of the type checker's

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (400|401|503)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the path")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


@dataclasses.dataclass
class Watch:
    """What a page did that nobody asked for; `expected` matches console lines that are right."""

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
    """visit(server, expected=None, **options of the browser's context) -> page, watched until the end of the test."""
    contexts, watches = [], []

    def open_page(server: scripted.Server, expected: re.Pattern[str] | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | options)
        context.set_default_timeout(5000)
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
    """Wait until there are `count` answers and none is on its way."""
    expect(page.locator("article.answer.done")).to_have_count(count)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def texts(page: Page) -> list[str]:
    """The conversation as it is shown."""
    return [text.strip() for text in page.locator("article .bubble, article .body").all_inner_texts()]


def stats(server: scripted.Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/stats") as response:
        return json.load(response)


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for something on the server's side, while the browser goes on."""
    for _ in range(250):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come about")


# Talking


def test_the_page_knows_the_servers_bounds_and_defaults(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        bounds = {name: [api.NUMBERS[name].low, api.NUMBERS[name].high] for name in ("temperature", "top_k")}
        sizes = {"message": api.MAX_MESSAGE_CHARS, "total": api.MAX_CHARS, "messages": api.MAX_MESSAGES}
        assert page.evaluate("LIMITS") == bounds | sizes
        assert page.evaluate("DEFAULTS") == {name: api.NUMBERS[name].default for name in bounds}


def test_type_send_and_see_the_answer_grow(visit: Opener) -> None:
    with scripted.serve({"hello": [f"word{i} " for i in range(12)]}, delay=0.1) as server:
        page = visit(server)
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#model")).to_have_text("scripted · sft · step 1")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#text")).to_be_focused()
        before = page.locator("#composer").bounding_box()
        say(page, "hello")
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.locator("article.answer.streaming")).to_have_count(1)
        seen = set()
        while page.locator("article.streaming").count():
            seen.add(answer(page).text_content())
            page.wait_for_timeout(20)
        assert len(seen) >= 5, seen  # it was there bit by bit
        assert all(
            longer.startswith(shorter) for shorter, longer in zip(sorted(seen, key=len), sorted(seen, key=len)[1:])
        )
        assert texts(page) == ["hello", " ".join(f"word{i}" for i in range(12))]
        assert page.locator("#composer").bounding_box() == before  # nothing jumped
        expect(page.locator("#text")).to_be_focused()
        expect(page.locator("#text")).to_have_value("")
        ((asked, sampling),) = server.asked
        assert (asked, sampling.temperature, sampling.top_k, sampling.max_tokens) == ("hello", 0.8, 50, 512)


def test_shift_enter_is_a_new_line_and_an_input_methods_enter_sends_nothing(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        box = page.locator("#text")
        height = box.bounding_box()["height"]
        box.press_sequentially("one")
        box.press("Shift+Enter")
        box.press_sequentially("two")
        expect(box).to_have_value("one\ntwo")
        assert box.bounding_box()["height"] > height  # it grows
        composing = "(box) => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
        box.evaluate(composing)
        assert server.asked == [] and box.input_value() == "one\ntwo"
        box.press("Enter")
        finished(page, 1)
        assert texts(page)[0] == "one\ntwo" and server.asked[0][0] == "one\ntwo"
        assert box.bounding_box()["height"] == height
        box.fill("   \n ")
        box.press("Enter")
        page.wait_for_timeout(50)
        assert len(server.asked) == 1


def test_the_whole_conversation_is_sent(visit: Opener) -> None:
    with scripted.serve({"b": ["B"], "a": ["A"]}) as server:
        page = visit(server)
        say(page, "a")
        finished(page, 1)
        say(page, "b")
        finished(page, 2)
        user, reply = "<|user_start|>{}<|user_end|>".format, "<|assistant_start|>{}<|assistant_end|>".format
        assert server.prompts[1] == "<|bos|>" + user("a") + reply("A") + user("b") + "<|assistant_start|>"


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_there_is_and_frees_the_place(visit: Opener, how: str) -> None:
    with scripted.serve({"long": ["begun ", *["more "] * 200], "next": ["fine"]}, delay=0.05, slots=1) as server:
        page = visit(server)
        say(page, "long")
        expect(answer(page)).to_contain_text("begun more")
        if how == "button":
            expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
            page.locator("#send").click()
        else:
            page.keyboard.press("Escape")
        finished(page, 1)
        until(page, lambda: server.cancelled == ["long"] and stats(server)["active"] == 0)
        kept = answer(page).inner_text()
        assert kept.startswith("begun more") and len(kept) < 900
        expect(page.locator("article.answer .remark")).to_have_text("Stopped.")
        say(page, "next")
        finished(page, 2)
        assert f"<|assistant_start|>{kept}" in server.prompts[1]  # and the conversation goes on from it


def test_typing_ahead_is_possible_and_enter_waits(visit: Opener) -> None:
    with scripted.serve({"long": ["x "] * 100}, delay=0.05) as server:
        page = visit(server)
        say(page, "long")
        expect(answer(page)).to_contain_text("x")
        say(page, "ahead")
        expect(page.locator("#text")).to_have_value("ahead")
        assert len(server.asked) == 1
        page.locator("#send").click()
        finished(page, 1)
        expect(page.locator("#text")).to_have_value("ahead")


def test_a_suggestion_asks(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        assert page.locator("#ideas button").count() == 4
        page.get_by_role("button", name="How many r are in strawberry?").click()
        finished(page, 1)
        assert server.asked[0][0] == "How many r are in strawberry?"


# Editing, answering again, starting anew


def converse(page: Page, *messages: str) -> None:
    for number, message in enumerate(messages, start=1):
        say(page, message)
        finished(page, number)


def test_a_click_edits_a_message_and_goes_on_from_there(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        converse(page, "one", "two", "three")
        page.locator(".bubble", has_text="two").click()
        editor = page.locator(".editor textarea")
        expect(editor).to_be_focused()
        expect(editor).to_have_value("two")
        editor.press("Escape")
        expect(page.locator(".editor")).to_have_count(0)
        assert len(texts(page)) == 6
        page.locator(".bubble", has_text="two").click()
        editor.fill("2")
        editor.press("Shift+Enter")
        editor.press_sequentially("!")
        editor.press("Enter")
        finished(page, 2)
        assert texts(page) == ["one", "You said: one", "2\n!", "You said: 2\n!"]
        assert "three" not in server.prompts[-1] and "two" not in server.prompts[-1] and "one" in server.prompts[-1]
        expect(page.locator("#text")).to_be_focused()
        page.locator("#undo").click()
        expect(page.locator("article")).to_have_count(6)
        assert texts(page)[2::2] == ["two", "three"]


def test_edit_while_an_answer_is_on_its_way(visit: Opener) -> None:
    with scripted.serve({"long": ["x "] * 100, "short": ["ok"]}, delay=0.05) as server:
        page = visit(server)
        say(page, "long")
        expect(answer(page)).to_contain_text("x x")
        page.get_by_role("button", name="Edit message").click()
        page.locator(".editor textarea").fill("short")
        page.locator(".editor").get_by_role("button", name="Send").click()
        finished(page, 1)
        assert texts(page) == ["short", "ok"]
        until(page, lambda: server.cancelled == ["long"] and stats(server)["active"] == 0)


def test_answer_again_by_click_and_by_button(visit: Opener) -> None:
    count = iter(range(10))
    with scripted.serve(lambda message, _: [f"{message} {next(count)}"]) as server:
        page = visit(server)
        converse(page, "a", "b")
        answer(page, 1).click()
        expect(answer(page, 1)).to_have_text("b 2")
        page.locator("article.answer").nth(0).hover()
        page.locator("article.answer").nth(0).get_by_role("button", name="Answer again").click()
        expect(page.locator("article")).to_have_count(2)
        expect(answer(page)).to_have_text("a 3")
        assert "b" not in texts(page)
        page.locator("#undo").click()
        expect(page.locator("article")).to_have_count(4)
        assert texts(page) == ["a", "a 0", "b", "b 2"]
        seeds = [sampling.seed for _, sampling in server.asked]
        assert len(set(seeds)) == len(seeds)  # another draw each time


def test_selecting_text_is_no_click(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        converse(page, "hello")
        answer(page).locator("p").dblclick(position={"x": 10, "y": 10})  # selects a word
        page.wait_for_timeout(400)
        assert page.evaluate("getSelection().toString()").strip()
        answer(page).click()  # ends the selection, and no more
        page.wait_for_timeout(400)
        assert not page.evaluate("getSelection().toString()").strip()
        assert len(server.asked) == 1
        answer(page).click()
        expect(page.locator("#toast")).to_be_visible()  # and a plain click does answer again
        assert len(server.asked) == 2


@pytest.mark.parametrize("how", ["button", "keys", "command"])
def test_a_new_chat(visit: Opener, how: str) -> None:
    with scripted.serve({"long": ["x "] * 100}, delay=0.02) as server:
        page = visit(server)
        say(page, "long")
        expect(answer(page)).to_contain_text("x")
        if how == "button":
            page.get_by_role("button", name="New chat").click()
        elif how == "keys":
            page.keyboard.press("Control+Shift+N")
        else:
            page.keyboard.press("Escape")
            say(page, "/clear")
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("article")).to_have_count(0)
        expect(page.locator("#text")).to_be_focused()
        until(page, lambda: server.cancelled == ["long"])
        say(page, "fresh")
        finished(page, 1)
        assert server.prompts[-1].count("<|user_start|>") == 1


def test_the_conversation_survives_a_reload(visit: Opener) -> None:
    with scripted.serve({"tool": ["It is ", ("python", "1+1"), ("output", "2"), "2."]}) as server:
        page = visit(server)
        converse(page, "tool")
        say(page, "/temperature 1.5")
        page.locator("#text").fill("a draft")
        shown = texts(page)
        page.reload()
        expect(page.locator("#text")).to_have_value("a draft")
        assert texts(page) == shown
        say(page, "next")
        finished(page, 2)
        assert server.asked[-1][1].temperature == 1.5 and "<|python_start|>1+1<|python_end|>" in server.prompts[-1]
        page.evaluate("sessionStorage.setItem('nanochat.chat', 'not JSON')")
        page.evaluate("removeEventListener('pagehide', save)")
        page.reload()
        expect(page.locator("#empty")).to_be_visible()


# Commands


def test_commands_set_and_show_and_refuse(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        note = page.locator("article.note").last
        say(page, "/temperature 0.3")
        expect(note).to_have_text("temperature is now 0.3.")
        say(page, "/topk 7")
        expect(note).to_have_text("top-k is now 7.")
        expect(page.locator("#settings")).to_have_text("temperature 0.3 · top-k 7")
        say(page, "hello")
        finished(page, 1)
        assert (server.asked[0][1].temperature, server.asked[0][1].top_k) == (0.3, 7)
        assert server.prompts[0].count("<|user_start|>") == 1 and "/topk" not in server.prompts[0]
        for wrong in ("2.1", "-1", "warm", "0,5", "1e9", "NaN", "0.1 0.2"):
            say(page, f"/temperature {wrong}")
            expect(note).to_have_text(f"temperature has to be a number from 0 to 2, not {wrong}. It stays at 0.3.")
        for wrong in ("201", "-1", "1.5"):
            say(page, f"/topk {wrong}")
            expect(note).to_have_text(f"top-k has to be a whole number from 0 to 200, not {wrong}. It stays at 7.")
        say(page, "/topk")
        expect(note).to_have_text("top-k is 7; it can be 0 to 200.")
        say(page, "/help")
        for word in ("/temperature x", "/topk k", "/clear", "/help", "Ctrl+Shift+N", "now 0.3"):
            expect(note).to_contain_text(word)
        assert len(server.asked) == 1  # nothing of this went to the model


def test_an_unknown_command_is_answered_and_kept(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        for text in ("/temprature 1", "/constructor", "/"):
            say(page, text)
            expect(page.locator("#problem")).to_contain_text("There is no command")
            expect(page.locator("#problem")).to_contain_text("/temperature, /topk, /clear, /help")
            expect(page.locator("#text")).to_have_value(text)
        say(page, " /etc is a folder")
        finished(page, 1)
        assert server.asked[0][0] == " /etc is a folder"
        expect(page.locator("#problem")).to_be_hidden()


def test_the_menu_of_commands_completes(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server)
        page.locator("#settings").click()
        expect(page.locator("#menu li")).to_have_count(4)
        page.locator("#text").press_sequentially("to")
        expect(page.locator("#menu li")).to_have_count(1)
        page.keyboard.press("Tab")
        expect(page.locator("#text")).to_have_value("/topk ")
        page.keyboard.type("0")
        page.keyboard.press("Enter")
        expect(page.locator("#settings")).to_have_text("temperature 0.8 · top-k off")
        page.keyboard.type("/")
        page.keyboard.press("Escape")
        expect(page.locator("#menu")).to_be_hidden()


# Errors


def test_too_long_a_message_is_told_before_it_is_sent(visit: Opener) -> None:
    with scripted.serve({"": ["ok"]}, context=100_000) as server:
        page = visit(server)
        say(page, "😀" * 8001)  # characters as the server counts them, not UTF-16 units
        expect(page.locator("#count")).to_have_text("8,001 / 8,000")
        expect(page.locator("#problem")).to_have_text("This message has 8,001 characters; the limit is 8,000.")
        assert page.locator("#text").input_value() and server.asked == []
        say(page, "😀" * 8000)
        finished(page, 1)
        for number in range(2, 5):
            say(page, "x" * 7500)
            finished(page, number)
        say(page, "x" * 5000)
        expect(page.locator("#problem")).to_contain_text("the conversation has")
        expect(page.locator("#problem")).to_contain_text("the limit is 32,000")
        assert len(server.asked) == 4


def test_a_refusal_is_shown_and_a_retry_answers(visit: Opener) -> None:
    with scripted.serve({"short": ["ok"]}, context=60) as server:
        page = visit(server, REFUSED)
        say(page, "long " * 30)
        expect(page.locator(".error")).to_contain_text("The server refused this: the conversation has")
        expect(page.locator(".error")).to_contain_text("60 are allowed.")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".error")).to_be_visible()
        say(page, "short")  # what got no answer is left out, or the roles would not alternate
        expect(answer(page)).to_have_text("ok")
        assert server.prompts == ["<|bos|><|user_start|>short<|user_end|><|assistant_start|>"]
        expect(page.locator("article.outside")).to_have_count(2)


def test_a_full_server_says_when_to_try_again(visit: Opener) -> None:
    with scripted.serve({"busy": ["x", 30.0], "hello": ["hi"]}, slots=1, queue_limit=0) as server:
        other, page = visit(server), visit(server, REFUSED)
        say(other, "busy")
        expect(answer(other)).to_have_text("x")
        say(page, "hello")
        expect(page.locator(".error")).to_contain_text("The server cannot take this now")
        expect(page.locator(".error")).to_contain_text(re.compile(r"Try again in \d+ seconds?\."))
        other.locator("#send").click()
        until(page, lambda: stats(server)["active"] == 0)
        page.get_by_role("button", name="Retry").click()
        expect(answer(page)).to_have_text("hi")
        expect(page.locator(".error")).to_have_count(0)
        expect(page.locator("#text")).to_be_focused()


def test_an_error_in_midstream_keeps_the_beginning_and_can_be_retried(visit: Opener) -> None:
    scripts = iter([["half of ", scripted.REFUSE], ["whole"]])
    with scripted.serve(lambda *_: next(scripts)) as server:
        page = visit(server)
        say(page, "hello")
        expect(page.locator(".error")).to_contain_text("The answer broke off: scripted: refused.")
        expect(answer(page)).to_have_text("half of")
        expect(page.locator("#live")).to_contain_text("The answer broke off")
        page.get_by_role("button", name="Retry").click()
        expect(answer(page)).to_have_text("whole")
        assert texts(page) == ["hello", "whole"]


def test_a_server_that_ends_is_explained(visit: Opener) -> None:
    gone = re.compile("Failed to load resource: net::ERR|net::ERR_INCOMPLETE_CHUNKED")
    with scripted.serve({"hello": ["half ", 30.0]}) as server:
        page = visit(server, gone)
        say(page, "hello")
        expect(answer(page)).to_contain_text("half")
        server.stop()
        expect(page.locator(".error")).to_contain_text("The answer broke off")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".error")).to_contain_text("The server cannot be reached.")
        expect(page.locator("#model")).to_have_text("offline")


def test_a_token_is_asked_for_and_kept_in_the_tab(visit: Opener) -> None:
    with scripted.serve({"hello": ["hi"]}, token="secret") as server:
        page = visit(server, REFUSED)
        expect(page.locator("#ask")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#model")).to_have_text("token needed")
        say(page, "hello")
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#ask .wrong")).to_be_visible()
        page.locator("#token").fill("secret")
        page.keyboard.press("Enter")
        expect(answer(page)).to_have_text("hi")
        expect(page.locator("#model")).to_have_text("scripted · sft · step 1")
        assert page.evaluate("sessionStorage.getItem('nanochat.token')") == "secret"
        assert page.evaluate("localStorage.length") == 0 and "secret" not in page.url
        page.reload()
        expect(page.locator("#model")).to_have_text("scripted · sft · step 1")


def test_a_base_models_notice_and_a_model_that_loads(visit: Opener) -> None:
    with scripted.serve({}, notice="A <base> model.", load_seconds=1.0, wait=False) as server:
        page = visit(server)
        expect(page.locator("#model")).to_have_text("loading the model…")
        expect(page.locator("#model")).to_have_text("scripted · base · step 1")
        expect(page.locator("#notice")).to_have_text("A <base> model.")
        expect(page.locator("#about")).to_be_hidden()  # it promises what a base model cannot do


# What a model may write


EVIL = """<img src=x onerror="pwned=1;alert(1)"><script>pwned=1</script><a href='javascript:alert(1)'>y</a>"""


def test_markup_in_messages_and_answers_stays_text(visit: Opener) -> None:
    everywhere = f"{EVIL}\n# {EVIL}\n- {EVIL}\n```\n{EVIL}\n```\n"
    pieces = [everywhere[i : i + 7] for i in range(0, len(everywhere), 7)]
    with scripted.serve({EVIL: [*pieces, ("python", "<b>1</b>"), ("output", "<i>2</i>\ufffc")]}) as server:
        page = visit(server)
        say(page, EVIL)
        finished(page, 1)
        assert texts(page)[0] == EVIL
        shown = [answer(page).locator(tag).first.text_content() for tag in ("p", "h3", "li", "pre")]
        assert shown == [EVIL] * 4
        assert answer(page).locator(".tool").text_content() == "calculator: <b>1</b>=<i>2</i>\ufffc"
        assert page.locator("#log").locator("img, script, a, b, i").count() == 0
        assert page.evaluate("window.pwned") is None
        page.reload()  # what was stored is no more than text either
        expect(page.locator("article")).to_have_count(2)
        assert page.locator("#log").locator("img, script, a, b, i").count() == 0
        assert page.evaluate("window.pwned") is None


def test_the_policy_stops_a_script_that_got_in_all_the_same(visit: Opener) -> None:
    with scripted.serve({}) as server:
        page = visit(server, re.compile("Content Security Policy"))
        page.evaluate(
            "() => { const s = document.createElement('script'); s.text = 'pwned = 1'; document.body.append(s) }"
        )
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'stopped')") == "stopped"


def test_a_tool_call_is_shown_apart_and_sent_back(visit: Opener) -> None:
    with scripted.serve({"sum": ["It is ", ("python", "12*3"), ("output", "36"), "36."], "more": ["ok"]}) as server:
        page = visit(server)
        say(page, "sum")
        finished(page, 1)
        tool = page.locator(".tool")
        expect(tool).to_have_count(1)
        assert tool.text_content() == "calculator: 12*3=36"
        assert [tool.locator(part).inner_text() for part in (".call", ".result")] == ["12*3", "36"]
        assert answer(page).inner_text().startswith("It is") and answer(page).inner_text().endswith("36.")
        expect(page.locator("#live")).to_have_text("It is [calculator: 12*3 = 36]36.")
        say(page, "more")
        finished(page, 2)
        called = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36.<|assistant_end|>"
        assert called in server.prompts[1]


def test_characters_cut_over_pieces_come_whole(visit: Opener) -> None:
    text = "naïve 😀 日本語 👩‍👩‍👧 שלום"
    replies = {"go": [text.encode()[i : i + 1] for i in range(len(text.encode()))]}
    with scripted.serve(replies, delay=0.005) as server:
        page = visit(server)
        page.evaluate(
            """() => { window.seen = ''; new MutationObserver(() => {
                window.seen += document.querySelector('article.answer .body')?.textContent ?? '';
            }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }"""
        )
        say(page, "go")
        finished(page, 1)
        assert answer(page).inner_text() == text
        assert "\ufffd" not in page.evaluate("window.seen")  # at no time


def test_a_little_markdown_and_copying(visit: Opener) -> None:
    code = "for i in range(3):\n    print(i * 2)  # **not bold**"
    lists = "3. three\n4. four\n\n- x\n  - y\n"
    text = f"## Title\nSome `code`, **bold**, 2*3*4 and a_b_c.\n\n{lists}\n```python\n{code}\n```\nEnd"
    with scripted.serve({"go": [text], "open": ["```\nnever closed"]}) as server:
        page = visit(server, permissions=["clipboard-read", "clipboard-write"])
        say(page, "go")
        finished(page, 1)
        body = answer(page)
        assert body.locator("h3").inner_text() == "Title"
        assert body.locator("p code").inner_text() == "code" and body.locator("strong").all_inner_texts() == ["bold"]
        assert body.locator("p").first.inner_text() == "Some code, bold, 2*3*4 and a_b_c."
        assert body.locator("ol li").evaluate_all("rows => rows.map(row => row.value)") == [3, 4]
        assert body.locator("ul li").count() == 2 and body.locator("ul li.deep").inner_text() == "y"
        assert body.locator("pre").inner_text() == code
        page.get_by_role("button", name="Copy code").click()
        expect(page.locator("#live")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == code
        page.get_by_role("button", name="Copy answer").click()
        expect(page.locator("#live")).to_have_text(re.compile("Copied"))
        assert page.evaluate("navigator.clipboard.readText()") == text
        say(page, "open")
        finished(page, 2)
        assert answer(page).locator("pre").inner_text() == "never closed"
        assert len(server.asked) == 2  # no click was taken for "answer again"


def test_ends_that_are_no_end_are_said(visit: Opener) -> None:
    with scripted.serve({"cut": ["so far", scripted.LENGTH], "none": []}) as server:
        page = visit(server)
        say(page, "cut")
        expect(page.locator(".remark")).to_have_text("Cut at the length limit.")
        say(page, "none")
        expect(page.locator(".remark").last).to_have_text("The answer is empty.")
        say(page, "next")
        finished(page, 3)
        assert "none" not in server.prompts[-1] and "cut" in server.prompts[-1]


# Scrolling, sizes, looks, keys, voices


def test_scrolling_follows_until_the_user_scrolls_up(visit: Opener) -> None:
    with scripted.serve({"long": [f"{i}\n\n" for i in range(100)]}, delay=0.02) as server:
        page = visit(server, viewport={"width": 700, "height": 500})
        left = "(s => s.scrollHeight - s.clientHeight - s.scrollTop)(document.getElementById('scroll'))"
        say(page, "long")
        expect(answer(page)).to_contain_text("20")
        assert page.evaluate(left) < 60
        expect(page.locator("#bottom")).to_be_hidden()
        page.mouse.move(350, 200)
        page.mouse.wheel(0, -300)
        expect(page.locator("#bottom")).to_be_visible()
        top = page.evaluate("document.getElementById('scroll').scrollTop")
        expect(answer(page)).to_contain_text("50")
        assert abs(page.evaluate("document.getElementById('scroll').scrollTop") - top) < 2  # it stays where it was put
        page.locator("#bottom").click()
        page.wait_for_function(f"{left} < 60")
        expect(answer(page)).to_contain_text("90")
        assert page.evaluate(left) < 60  # and follows again
        finished(page, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_all_fits_and_can_be_touched(visit: Opener, scheme: str) -> None:
    wide = "x" * 300 + "\n\n```\n" + "y" * 120 + "\n```\n"
    with scripted.serve(
        {"go": [wide, ("python", "1+" * 40 + "1"), ("output", "41")]}, notice="A base model."
    ) as server:
        page = visit(server, color_scheme=scheme, **PHONE)
        page.get_by_role("button", name="What is the capital of France?").tap()
        finished(page, 1)
        page.locator("#text").fill("go")
        page.locator("#send").tap()
        finished(page, 2)
        page.locator("#text").fill("/")
        for text in ("/", ""):
            page.locator("#text").fill(text)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            assert (
                page.evaluate(
                    "document.getElementById('scroll').scrollWidth - document.getElementById('scroll').clientWidth"
                )
                <= 0
            )
            box = page.locator("#composer").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
            for button in page.locator("button:visible").all():
                size = button.bounding_box()
                assert size["width"] >= 40 and size["height"] >= 40, button.get_attribute("aria-label")
        page.locator("article.user").last.get_by_role("button", name="Edit message").tap()
        expect(page.locator(".editor textarea")).to_be_focused()
        assert page.locator(".editor button").last.bounding_box()["height"] < 60  # its words are in one line
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
      if (color[3] > 0) throw new Error('half a background');
    }
    throw new Error('no background');
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest('.hide, .skip, script, style, svg')) continue;
    const [a, b] = [light(rgb(getComputedStyle(parent).color)), light(behind(parent))];
    found.push([node.data.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast_in_both_schemes(visit: Opener, scheme: str) -> None:
    reply = ["Text `code` ", ("python", "1+1"), ("output", "2"), "\n\n1. x\n\n```py\ny\n```\n", scripted.REFUSE]
    with scripted.serve({"go": reply, "cut": ["x", scripted.LENGTH]}, notice="A base model.") as server:
        page = visit(server, color_scheme=scheme)
        expect(page.locator("#model")).to_contain_text("scripted")
        shown = dict(page.evaluate(CONTRAST))  # of the empty page: the suggestions
        for message in ("cut", "go", "/topk 3", "/topk x", "/help"):
            say(page, message)
        expect(page.locator(".error")).to_be_visible()
        page.locator("article.answer .body").first.click()
        expect(page.locator("#toast")).to_be_visible()
        page.locator("#undo").click()
        shown |= dict(page.evaluate(CONTRAST))
        say(page, "/nothing")
        page.locator("#text").fill("/")
        shown |= dict(page.evaluate(CONTRAST))
        assert (
            {"36", "Arithmetic"} & set(shown)
            and "calculator" in shown
            and "Retry" in shown
            and "A base model." in shown
        )
        assert {text: ratio for text, ratio in shown.items() if ratio < 4.5} == {}  # WCAG 2.2, AA
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 26, 27)"
        assert dark == (scheme == "dark")
        page.get_by_role("button", name="Switch between light and dark").click()
        assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 26, 27)") != dark
        page.reload()  # and it is remembered
        assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 26, 27)") != dark


def test_everything_by_keyboard(visit: Opener) -> None:
    with scripted.serve({"go": ["```py\nx\n```"]}) as server:
        page = visit(server, permissions=["clipboard-write"])
        focused = "(a => a.ariaLabel || a.id || a.textContent.trim())(document.activeElement)"
        page.keyboard.type("go")
        page.keyboard.press("Enter")
        finished(page, 1)
        stops = []
        while "Message" not in stops:
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                continue  # from the end of the page to its beginning
            stops.append(page.evaluate(focused))
            ring = page.evaluate("(s => s.outlineStyle + s.outlineWidth)(getComputedStyle(document.activeElement))")
            assert ring == "solid2px" or stops[-1] == "Message", f"no focus ring on {stops[-1]}"
        head = ["settings", "Go to the message box", "Switch between light and dark", "New chat", "Conversation"]
        assert stops == [*head, "Edit message", "Copy code", "x", "Copy answer", "Answer again", "Message"]
        page.keyboard.press("ArrowUp")  # in an empty box
        expect(page.locator(".editor textarea")).to_be_focused()
        page.keyboard.press("Escape")
        assert page.evaluate(focused) == "Edit message"  # back where editing is
        page.keyboard.press("Enter")
        page.keyboard.type("!")
        page.keyboard.press("Enter")
        finished(page, 1)
        assert texts(page) == ["go!", "You said: go!"]
        page.locator(".skip").focus()
        expect(page.locator(".skip")).to_be_in_viewport()  # it is seen only then
        page.keyboard.press("Enter")
        expect(page.locator("#text")).to_be_focused()


def test_an_answer_is_read_out_once_and_not_by_the_token(visit: Opener) -> None:
    with scripted.serve({"go": [f"word{i} " for i in range(20)]}, delay=0.02) as server:
        page = visit(server)
        page.evaluate(
            """() => { window.said = []; const live = document.getElementById('live');
                new MutationObserver(() => said.push(live.textContent)).observe(live, {childList: true}); }"""
        )
        say(page, "go")
        finished(page, 1)
        assert page.evaluate("said") == ["Writing an answer", " ".join(f"word{i}" for i in range(20))]
        assert page.locator("#live").get_attribute("role") == "status"
        assert page.locator("#log [aria-live], #log [role=log]").count() == 0


def test_nothing_moves_where_that_is_asked_for(visit: Opener) -> None:
    with scripted.serve({"go": [1.0, "x ", 30.0]}) as server:
        for motion, moving in (("no-preference", True), ("reduce", False)):
            page = visit(server, reduced_motion=motion)
            say(page, "go")
            expect(page.locator(".dots")).to_be_visible()
            assert bool(page.evaluate("document.getAnimations().length")) == moving
            page.keyboard.press("Escape")
            finished(page, 1)
