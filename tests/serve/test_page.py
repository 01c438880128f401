"""The chat page in a real browser: talking, editing, commands and errors."""

import re
from typing import Any

import pytest
import scripted
from browser import Opener, Page, answer, expect, finished, say, stats, texts, until

from nanochat.serve import schema

pytestmark = pytest.mark.slow

pytest_plugins = ["browser"]  # the fixtures
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (400|401|503)")


# Talking


def test_panel_has_the_limits_and_defaults_of_the_server(chat: Opener) -> None:
    page, server = chat({"": ["ok"]})
    page.get_by_role("button", name="Settings").click()
    fields = schema.CompletionRequest.model_json_schema()["properties"]
    for name in ("temperature", "top_k", "max_tokens"):
        expect(page.locator(f"#numbers input[name={name}]")).to_have_value(str(fields[name]["default"]))
    slider = page.locator("[data-of=temperature]")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", "2")
    page.get_by_label("Temperature", exact=True).fill("2.5")
    page.get_by_label("Temperature", exact=True).press("Tab")
    expect(page.locator("#panel [role=alert]:visible")).to_have_text("Expected a number from 0 to 2.")
    page.get_by_label("Temperature", exact=True).fill("1.5")
    page.get_by_label("Top-k", exact=True).fill("7")
    page.get_by_label("Max tokens").fill("9")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("System prompt").fill("Be brief.")
    say(page, "hello")
    finished(page, 1)
    ((_, request),) = server.requests
    assert (request.temperature, request.top_k, request.max_tokens, request.seed) == (1.5, 7, 9, 42)
    assert "Be brief.\n\nhello" in server.prompts[0]
    expect(page.locator("#settings")).to_have_text("temperature 1.5 · top-k 7 · system prompt · seed 42")
    page.reload()
    expect(page.locator("#settings")).to_have_text("temperature 1.5 · top-k 7 · system prompt · seed 42")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.locator("#settings")).to_have_text("temperature 0.8 · top-k 50")


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
    until(page, lambda: texts(page) == ["hello", " ".join(f"word{i}" for i in range(12))])
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


def test_edit_branches_and_the_arrows_bring_back_what_was_there(chat: Opener) -> None:
    page, server = chat({})
    converse(page, "one", "two", "three")
    page.locator("article.user").nth(1).get_by_role("button", name="Edit message").click()
    editor = page.locator(".editor textarea")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("two")
    editor.press("Escape")
    expect(page.locator(".editor")).to_have_count(0)
    assert len(texts(page)) == 6
    page.locator("article.user").nth(1).get_by_role("button", name="Edit message").click()
    editor.fill("2")
    editor.press("Shift+Enter")
    editor.press_sequentially("!")
    editor.press("Enter")
    finished(page, 2)
    until(page, lambda: texts(page) == ["one", "You said: one", "2\n!", "You said: 2\n!"])
    assert "three" not in server.prompts[-1] and "two" not in server.prompts[-1] and "one" in server.prompts[-1]
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator(".place")).to_have_text("Version 2/2")
    page.get_by_role("button", name="Previous version").click()
    until(page, lambda: texts(page)[2::2] == ["two", "three"])
    expect(page.get_by_role("button", name="Previous version")).to_be_disabled()
    say(page, "four")  # continues in the branch that is shown
    finished(page, 4)
    assert "three" in server.prompts[-1] and "2\n!" not in server.prompts[-1]
    page.get_by_role("button", name="Next version").click()
    until(page, lambda: texts(page)[2:] == ["2\n!", "You said: 2\n!"])


def test_versions_of_an_answer_are_kept_and_browsed(chat: Opener) -> None:
    count = iter(range(10))
    page, server = chat(lambda message, _: [f"{message} {next(count)}"])
    converse(page, "a", "b")
    first = page.locator("article.answer").first
    for number in (2, 3):
        first.get_by_role("button", name="Regenerate answer").click()
        expect(first.locator(".body")).to_have_text(f"a {number}")
        expect(page.locator("article")).to_have_count(2)  # what followed belongs to the earlier version
    expect(first.locator(".place")).to_have_text("Version 3/3")
    for text in ("a 2", "a 0"):
        page.get_by_role("button", name="Previous version").press("Enter")
        expect(first.locator(".body")).to_have_text(text)
    until(page, lambda: texts(page) == ["a", "a 0", "b", "b 1"])
    page.reload()
    expect(page.locator("article")).to_have_count(4)
    expect(first.locator(".place")).to_have_text("Version 1/3")
    seeds = [request.seed for _, request in server.requests]
    assert len(set(seeds)) == len(seeds) == 4  # a new sample each time


def test_clicks_on_texts_change_nothing(chat: Opener) -> None:
    page, server = chat({})
    converse(page, "hello")
    shown = texts(page)
    for target in (answer(page), page.locator(".bubble")):
        target.click()
        target.dblclick(position={"x": 20, "y": 12})
    page.wait_for_timeout(300)
    assert texts(page) == shown and len(server.requests) == 1 and page.locator(".editor").count() == 0


@pytest.mark.parametrize("action", ["button", "keys", "command"])
def test_new_chat_keeps_the_old_one_which_goes_on(chat: Opener, action: str) -> None:
    page, server = chat({"long": ["x "] * 30}, delay=0.03)
    say(page, "long")
    expect(answer(page)).to_contain_text("x")
    if action == "button":
        page.get_by_role("button", name="New chat").click()
    elif action == "keys":
        page.keyboard.press("Control+Shift+O")
    else:
        page.keyboard.press("Escape")
        say(page, "/clear")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#text")).to_be_focused()
    say(page, "fresh")
    finished(page, 1)
    assert server.prompts[-1].count("<|user_start|>") == 1
    page.get_by_role("link", name="long").click()
    expect(page.locator(".bubble")).to_have_text("long")  # the other conversation is finished, too
    finished(page, 1)
    if action == "command":  # Escape stopped it
        expect(answer(page)).to_have_text(re.compile(r"^x( x){0,28}$"))
    else:
        expect(answer(page)).to_have_text(" ".join(["x"] * 30))
    page.go_back()
    expect(page.locator(".bubble")).to_have_text("fresh")


def test_conversation_with_a_tool_call_survives_a_reload(chat: Opener) -> None:
    page, server = chat({"tool": ["It is ", ("python", "1+1"), ("output", "2"), "2."], "long": ["begun ", 30.0]})
    converse(page, "tool")
    expect(page.locator("#live")).to_have_text("It is [calculator: 1+1 = 2]2.")
    assert [page.locator(f".tool {part}").inner_text() for part in (".call", ".result")] == ["1+1", "2"]
    page.locator("#text").fill("a draft")
    shown = texts(page)
    page.reload()
    expect(page.locator("#text")).to_have_value("a draft")
    expect(page.locator(".tool")).to_have_count(1)
    until(page, lambda: texts(page) == shown)
    say(page, "long")
    expect(answer(page)).to_contain_text("begun")
    assert "<|python_start|>1+1<|python_end|>" in server.prompts[-1]
    page.reload()
    expect(page.locator(".remark")).to_have_text("Stopped: the page was closed.")
    expect(answer(page)).to_have_text("begun")


# Commands


def test_commands_set_show_and_validate(chat: Opener) -> None:
    page, server = chat({})
    expect(page.locator("#settings")).to_have_text("temperature 0.8 · top-k 50")
    toast, problem = page.locator("#toast"), page.locator("#problem")
    say(page, "/temperature 0.3")
    expect(toast).to_contain_text("temperature is now 0.3.")
    say(page, "/topk 7")
    expect(toast).to_contain_text("top-k is now 7.")
    expect(page.locator("#settings")).to_have_text("temperature 0.3 · top-k 7")
    say(page, "hello")
    finished(page, 1)
    assert (server.requests[0][1].temperature, server.requests[0][1].top_k) == (0.3, 7)
    assert server.prompts[0].count("<|user_start|>") == 1 and "/topk" not in server.prompts[0]
    for wrong in ("2.1", "-1", "warm", "0,5", "1e9", "NaN", "0.1 0.2"):
        say(page, f"/temperature {wrong}")
        expect(problem).to_have_text(f"temperature must be a number from 0 to 2, not {wrong}.")
    for wrong in ("201", "-1", "1.5"):
        say(page, f"/topk {wrong}")
        expect(problem).to_have_text(f"top-k must be a whole number from 0 to 200, not {wrong}.")
    say(page, "/topk")
    expect(problem).to_have_text("top-k must be a whole number from 0 to 200.")
    say(page, "/help")
    for word in ("/temperature x", "/topk k", "/clear", "/help", "Ctrl"):
        expect(page.locator("#help")).to_contain_text(word)
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
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
    page.locator("#text").press_sequentially("/")
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


def test_message_waits_for_limits_that_come_late(chat: Opener) -> None:
    page, server = chat({"": ["ok"]}, context=100_000)
    held: list[Any] = []
    page.route("**/page", lambda route: held.append(route))
    page.reload()
    say(page, "😀" * 8001)
    page.wait_for_timeout(300)
    assert held and server.requests == []
    for route in held:  # of the start, and of the message
        route.continue_()
    expect(page.locator("#problem")).to_have_text("This message has 8,001 characters; the limit is 8,000.")
    expect(page.locator("#count")).to_have_text("8,001 / 8,000")
    assert server.requests == []


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
    until(page, lambda: texts(page) == ["hello", "whole"])


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
    expect(page.locator("#offline")).to_contain_text("The server cannot be reached")
    expect(page.locator("#offline")).to_contain_text("what you type stay here")
    assert texts(page)[0] == "hello" and page.locator("#text").is_enabled()


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
    assert page.evaluate("sessionStorage.getItem('nanochat.token')") == '"secret"'
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
