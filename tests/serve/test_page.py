"""The chat page in a real browser: talking, editing, commands and errors."""

import re

import pytest
import scripted
from browser import Opener, Page, answer, expect, finished, say, stats, texts, until

from nanochat.serve import schema

pytestmark = pytest.mark.slow

pytest_plugins = ["browser"]  # the fixtures
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (400|401|503)")


# Talking


def test_page_has_the_limits_and_defaults_of_the_server(chat: Opener) -> None:
    page, _ = chat({})
    fields = {name: schema.ChatRequest.model_json_schema()["properties"][name] for name in ("temperature", "top_k")}
    bounds = {name: [field["minimum"], field["maximum"]] for name, field in fields.items()}
    sizes = {"message": schema.MAX_MESSAGE_CHARS, "total": schema.MAX_CHARS, "messages": schema.MAX_MESSAGES}
    assert page.evaluate("LIMITS") == bounds | sizes
    assert page.evaluate("DEFAULTS") == {name: field["default"] for name, field in fields.items()}


def test_answer_streams_into_the_page(chat: Opener) -> None:
    page, server = chat({"hello": [f"word{i} " for i in range(12)]}, delay=0.1)
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
    assert len(seen) >= 5, seen  # it grew step by step
    assert all(longer.startswith(shorter) for shorter, longer in zip(sorted(seen, key=len), sorted(seen, key=len)[1:]))
    assert texts(page) == ["hello", " ".join(f"word{i}" for i in range(12))]
    assert page.locator("#composer").bounding_box() == before  # nothing jumped
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#text")).to_have_value("")
    ((content, request),) = server.requests
    assert (content, request.temperature, request.top_k, request.max_tokens) == ("hello", 0.8, 50, 512)


def test_enter_sends_but_not_shift_enter_or_an_input_method(chat: Opener) -> None:
    page, server = chat({})
    box = page.locator("#text")
    height = box.bounding_box()["height"]
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    expect(box).to_have_value("one\ntwo")
    assert box.bounding_box()["height"] > height  # it grows
    composing = "(box) => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
    box.evaluate(composing)
    assert server.requests == [] and box.input_value() == "one\ntwo"
    box.press("Enter")
    finished(page, 1)
    assert texts(page)[0] == "one\ntwo" and server.requests[0][0] == "one\ntwo"
    assert box.bounding_box()["height"] == height
    box.fill("   \n ")
    box.press("Enter")
    page.wait_for_timeout(50)
    assert len(server.requests) == 1


@pytest.mark.parametrize("action", ["button", "Escape"])
def test_stop_keeps_the_partial_answer_and_frees_the_slot(chat: Opener, action: str) -> None:
    page, server = chat({"long": ["begun ", *["more "] * 200], "next": ["fine"]}, delay=0.05, slots=1)
    say(page, "long")
    expect(answer(page)).to_contain_text("begun more")
    if action == "button":
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
    assert f"<|assistant_start|>{kept}" in server.prompts[1]  # and the conversation continues from it


# Editing, regenerating, starting a new chat


def converse(page: Page, *messages: str) -> None:
    for number, message in enumerate(messages, start=1):
        say(page, message)
        finished(page, number)


def test_click_edits_a_message_and_continues_from_there(chat: Opener) -> None:
    page, server = chat({})
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


def test_regenerate_by_click_and_by_button(chat: Opener) -> None:
    count = iter(range(10))
    page, server = chat(lambda message, _: [f"{message} {next(count)}"])
    converse(page, "a", "b")
    answer(page, 1).click()
    expect(answer(page, 1)).to_have_text("b 2")
    page.locator("article.answer").nth(0).hover()
    page.locator("article.answer").nth(0).get_by_role("button", name="Regenerate answer").click()
    expect(page.locator("article")).to_have_count(2)
    expect(answer(page)).to_have_text("a 3")
    assert "b" not in texts(page)
    page.locator("#undo").click()
    expect(page.locator("article")).to_have_count(4)
    assert texts(page) == ["a", "a 0", "b", "b 2"]
    seeds = [request.seed for _, request in server.requests]
    assert len(set(seeds)) == len(seeds)  # a new sample each time


def test_selecting_text_does_not_regenerate(chat: Opener) -> None:
    page, server = chat({})
    converse(page, "hello")
    answer(page).locator("p").dblclick(position={"x": 10, "y": 10})  # selects a word
    page.wait_for_timeout(400)
    assert page.evaluate("getSelection().toString()").strip()
    answer(page).click()  # ends the selection, and no more
    page.wait_for_timeout(400)
    assert not page.evaluate("getSelection().toString()").strip()
    assert len(server.requests) == 1
    answer(page).click()
    expect(page.locator("#toast")).to_be_visible()  # and a plain click does regenerate
    assert len(server.requests) == 2


@pytest.mark.parametrize("action", ["button", "keys", "command"])
def test_new_chat(chat: Opener, action: str) -> None:
    page, server = chat({"long": ["x "] * 100}, delay=0.02)
    say(page, "long")
    expect(answer(page)).to_contain_text("x")
    if action == "button":
        page.get_by_role("button", name="New chat").click()
    elif action == "keys":
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


def test_conversation_with_a_tool_call_survives_a_reload(chat: Opener) -> None:
    page, server = chat({"tool": ["It is ", ("python", "1+1"), ("output", "2"), "2."]})
    converse(page, "tool")
    expect(page.locator("#live")).to_have_text("It is [calculator: 1+1 = 2]2.")
    assert [page.locator(f".tool {part}").inner_text() for part in (".call", ".result")] == ["1+1", "2"]
    say(page, "/temperature 1.5")
    page.locator("#text").fill("a draft")
    shown = texts(page)
    page.reload()
    expect(page.locator("#text")).to_have_value("a draft")
    assert texts(page) == shown
    say(page, "next")
    finished(page, 2)
    assert server.requests[-1][1].temperature == 1.5 and "<|python_start|>1+1<|python_end|>" in server.prompts[-1]
    page.evaluate("sessionStorage.setItem('nanochat.chat', 'not JSON')")
    page.evaluate("removeEventListener('pagehide', save)")
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


# Commands


def test_commands_set_show_and_validate(chat: Opener) -> None:
    page, server = chat({})
    note = page.locator("article.note").last
    say(page, "/temperature 0.3")
    expect(note).to_have_text("temperature is now 0.3.")
    say(page, "/topk 7")
    expect(note).to_have_text("top-k is now 7.")
    expect(page.locator("#settings")).to_have_text("temperature 0.3 · top-k 7")
    say(page, "hello")
    finished(page, 1)
    assert (server.requests[0][1].temperature, server.requests[0][1].top_k) == (0.3, 7)
    assert server.prompts[0].count("<|user_start|>") == 1 and "/topk" not in server.prompts[0]
    for wrong in ("2.1", "-1", "warm", "0,5", "1e9", "NaN", "0.1 0.2"):
        say(page, f"/temperature {wrong}")
        expect(note).to_have_text(f"temperature must be a number from 0 to 2, not {wrong}. It stays at 0.3.")
    for wrong in ("201", "-1", "1.5"):
        say(page, f"/topk {wrong}")
        expect(note).to_have_text(f"top-k must be a whole number from 0 to 200, not {wrong}. It stays at 7.")
    say(page, "/topk")
    expect(note).to_have_text("top-k is 7; it can be 0 to 200.")
    say(page, "/help")
    for word in ("/temperature x", "/topk k", "/clear", "/help", "Ctrl+Shift+N", "now 0.3"):
        expect(note).to_contain_text(word)
    assert len(server.requests) == 1  # none of this was sent to the model


def test_unknown_command_is_reported_and_stays_in_the_box(chat: Opener) -> None:
    page, server = chat({})
    for text in ("/temprature 1", "/constructor", "/"):
        say(page, text)
        expect(page.locator("#problem")).to_contain_text("Unknown command")
        expect(page.locator("#problem")).to_contain_text("/temperature, /topk, /clear, /help")
        expect(page.locator("#text")).to_have_value(text)
    say(page, " /etc is a folder")
    finished(page, 1)
    assert server.requests[0][0] == " /etc is a folder"
    expect(page.locator("#problem")).to_be_hidden()


def test_command_menu_completes(chat: Opener) -> None:
    page, _ = chat({})
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


def test_too_long_message_is_not_sent(chat: Opener) -> None:
    page, server = chat({"": ["ok"]}, context=100_000)
    say(page, "😀" * 8001)  # characters as the server counts them, not UTF-16 units
    expect(page.locator("#count")).to_have_text("8,001 / 8,000")
    expect(page.locator("#problem")).to_have_text("This message has 8,001 characters; the limit is 8,000.")
    assert page.locator("#text").input_value() and server.requests == []
    say(page, "😀" * 8000)
    finished(page, 1)
    for number in range(2, 5):
        say(page, "x" * 7500)
        finished(page, number)
    say(page, "x" * 5000)
    expect(page.locator("#problem")).to_contain_text("the conversation has")
    expect(page.locator("#problem")).to_contain_text("the limit is 32,000")
    assert len(server.requests) == 4


def test_rejected_request_is_shown_and_not_sent_again(chat: Opener) -> None:
    page, server = chat({"short": ["ok"]}, context=60, expected=REFUSED)
    say(page, "long " * 30)
    expect(page.locator(".error")).to_contain_text("The server rejected the request: the conversation has")
    expect(page.locator(".error")).to_contain_text("at most 59 are allowed")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error")).to_be_visible()
    say(page, "short")  # the message without an answer is not sent, since roles must alternate
    expect(answer(page)).to_have_text("ok")
    assert server.prompts == ["<|bos|><|user_start|>short<|user_end|><|assistant_start|>"]
    expect(page.locator("article.unanswered")).to_have_count(2)


def test_full_server_shows_when_to_retry(visit: Opener) -> None:
    with scripted.serve({"busy": ["x", 30.0], "hello": ["hi"]}, slots=1, queue_limit=0) as server:
        other, page = visit(server), visit(server, REFUSED)
        say(other, "busy")
        expect(answer(other)).to_have_text("x")
        say(page, "hello")
        expect(page.locator(".error")).to_contain_text("The server is not available right now")
        expect(page.locator(".error")).to_contain_text(re.compile(r"Try again in \d+ seconds?\."))
        other.locator("#send").click()
        until(page, lambda: stats(server)["active"] == 0)
        page.get_by_role("button", name="Retry").click()
        expect(answer(page)).to_have_text("hi")
        expect(page.locator(".error")).to_have_count(0)
        expect(page.locator("#text")).to_be_focused()


def test_interrupted_answer_is_kept_and_can_be_retried(chat: Opener) -> None:
    scripts = iter([["half of ", scripted.REFUSE], ["whole"]])
    page, _ = chat(lambda *_: next(scripts))
    say(page, "hello")
    expect(page.locator(".error")).to_contain_text("The answer was interrupted: scripted: refused.")
    expect(answer(page)).to_have_text("half of")
    expect(page.locator("#live")).to_contain_text("The answer was interrupted")
    page.get_by_role("button", name="Retry").click()
    expect(answer(page)).to_have_text("whole")
    assert texts(page) == ["hello", "whole"]


def test_stopped_server_is_reported(chat: Opener) -> None:
    gone = re.compile("Failed to load resource: net::ERR|net::ERR_INCOMPLETE_CHUNKED")
    page, server = chat({"hello": ["half ", 30.0]}, expected=gone)
    say(page, "hello")
    expect(answer(page)).to_contain_text("half")
    server.stop()
    expect(page.locator(".error")).to_contain_text("The answer was interrupted")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error")).to_contain_text("Could not reach the server.")
    expect(page.locator("#model")).to_have_text("offline")


def test_token_is_requested_and_stored_in_the_tab(chat: Opener) -> None:
    page, _ = chat({"hello": ["hi"]}, token="secret", expected=REFUSED)
    expect(page.locator("#ask")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_have_text("token required")
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


def test_loading_and_base_model_notice_are_shown(chat: Opener) -> None:
    # Long enough for a busy machine to open the page meanwhile.
    page, _ = chat({}, notice="A <base> model.", load_seconds=4.0, wait=False)
    expect(page.locator("#model")).to_have_text("loading the model…")
    expect(page.locator("#model")).to_have_text("scripted · base · step 1", timeout=20_000)
    expect(page.locator("#notice")).to_have_text("A <base> model.")
    expect(page.locator("#about")).to_be_hidden()  # a base model can do less than that says
