"""The chat page in a real browser: the list of conversations, other tabs, export and import, and the token view."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import scripted
from browser import Opener, Page, answer, expect, finished, say, texts, until

from experiments import tasks as show_tasks
from nanochat import tasks
from nanochat.data import tokenizer

pytestmark = pytest.mark.slow

pytest_plugins = ["browser"]  # the fixtures
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


def another_tab(page: Page) -> Page:
    tab = page.context.new_page()
    tab.goto(page.url)
    return tab


def chats(page: Page) -> list[str]:
    return page.locator("#chats a > span").all_inner_texts()


def menu(page: Page, title: str, action: str) -> None:
    page.locator("#chats li", has_text=title).hover()
    page.get_by_role("button", name=f"Menu of {title}").click()
    page.get_by_role("menuitem", name=action).click()


def downloaded(page: Page, click: Any) -> tuple[str, list[dict[str, Any]]]:
    with page.expect_download() as download:
        click()
    return download.value.suggested_filename, [json.loads(line) for line in download.value.path().open()]


# The list


def test_conversations_are_searched_renamed_deleted_and_brought_back(chat: Opener) -> None:
    page, _ = chat({"first": ["about whales"], "second": ["about ships"]})
    for message in ("first", "second"):
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#empty")).to_be_visible()
        say(page, message)
        finished(page, 1)
    until(page, lambda: chats(page) == ["second", "first"])
    expect(page).to_have_title("second · nanochat")
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("WHALES")  # within an answer
    expect(page.locator("#chats a")).to_have_count(1)
    expect(page.locator("#chats small")).to_have_text("about whales")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("first")
    page.locator("#search").fill("nothing like it")
    expect(page.locator("#chats")).to_have_text("Nothing found.")
    page.locator("#search").press("Escape")
    menu(page, "first", "Rename")
    page.keyboard.type("Sea animals")
    page.keyboard.press("Enter")
    until(page, lambda: chats(page) == ["Sea animals", "second"])
    menu(page, "Sea animals", "Delete")
    expect(page.locator("#empty")).to_be_visible()
    until(page, lambda: chats(page) == ["second"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text("first")
    page.locator("#chats li", has_text="second").hover()
    page.get_by_role("button", name="Menu of second").click()
    delete = page.locator("#chat-menu [data-act=delete]")
    with page.expect_navigation():  # before the database has written anything
        delete.evaluate("button => { button.click(); location.reload(); }")
    expect(answer(page)).to_have_text("about whales")
    until(page, lambda: chats(page) == ["Sea animals"])


def test_list_keeps_its_links_and_the_focus_while_an_answer_grows(chat: Opener) -> None:
    page, _ = chat({"first": ["one"], "long": ["x "] * 100}, delay=0.02)
    for message in ("first", "long"):
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#empty")).to_be_visible()
        say(page, message)
        expect(answer(page)).to_contain_text("one" if message == "first" else "x")
    link = page.get_by_role("link", name="first")
    link.focus()
    same = link.element_handle()
    expect(answer(page)).to_contain_text("x " * 20)  # drawn again for each of them
    assert same.evaluate("node => node.isConnected && node === document.activeElement")
    menu(page, "first", "Rename")
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="renamed")).to_be_focused()
    finished(page, 1)


def test_tabs_share_the_history_and_neither_loses_anything(chat: Opener) -> None:
    page, _ = chat({"slow": [f"word{i} " for i in range(40)]}, delay=0.05)
    say(page, "hello")
    finished(page, 1)
    tab = another_tab(page)
    expect(answer(tab)).to_have_text("You said: hello")
    until(tab, lambda: texts(tab) == ["hello", "You said: hello"])
    say(page, "slow")
    expect(answer(tab)).to_contain_text("word3")  # while it is being written
    say(tab, "too early")
    expect(tab.locator("#problem")).to_contain_text("Another tab is writing this answer")
    finished(page, 2)
    expect(tab.locator("article.answer.done")).to_have_count(2)
    tab.get_by_role("button", name="Regenerate answer").first.click()
    finished(tab, 1)
    expect(page.locator(".place")).to_have_text("Version 1/2")  # each tab shows what it has chosen
    say(page, "here")
    finished(page, 3)
    tab.get_by_role("button", name="Previous version").click()
    expect(tab.locator("article")).to_have_count(6)
    assert texts(tab) == texts(page) and texts(page)[4:] == ["here", "You said: here"]
    until(page, lambda: chats(page) == chats(tab) == ["hello"])
    menu(tab, "hello", "Delete")
    expect(page.locator("#empty")).to_be_visible()


def test_answer_of_a_closed_tab_is_settled(chat: Opener) -> None:
    page, server = chat({"long": ["begun ", 60.0]})
    say(page, "long")
    expect(answer(page)).to_contain_text("begun")
    tab = another_tab(page)
    page.wait_for_timeout(1100)  # it is saved every second
    expect(answer(tab)).to_have_text("begun")
    expect(tab.locator("article.streaming")).to_have_count(1)
    page.close()
    expect(tab.locator(".remark")).to_have_text("Stopped: the page was closed.")
    until(tab, lambda: server.cancelled == ["long"])
    expect(answer(tab)).to_have_text("begun")


def test_drafts_are_kept_for_each_conversation(chat: Opener) -> None:
    page, _ = chat({})
    say(page, "one")
    finished(page, 1)
    page.locator("#text").fill("draft of one")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#text")).to_have_value("")
    page.locator("#text").fill("draft of a new chat")
    page.get_by_role("link", name="one").click()
    expect(page.locator("#text")).to_have_value("draft of one")
    page.go_back()
    expect(page.locator("#text")).to_have_value("draft of a new chat")


# Export and import


def test_export_is_read_by_customjson_and_comes_back_by_import(
    chat: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = iter(range(10))
    page, server = chat(lambda message, _: [f"{message} {next(count)} ", ("python", "1+1"), ("output", "2")])
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for number, message in enumerate(("a", "b", "c"), start=1):
        say(page, message)
        finished(page, number)
    page.get_by_role("button", name="Regenerate answer").last.click()
    expect(answer(page)).to_contain_text("c 3")
    finished(page, 3)
    page.locator("article.answer").nth(1).get_by_role("button", name="Bad answer").click()
    page.get_by_role("button", name="Good answer").last.click()
    expect(page.get_by_role("button", name="Good answer").last).to_have_attribute("aria-pressed", "true")
    shown = texts(page)
    _, rows = downloaded(page, page.locator("#export").click)
    expect(page.locator("#toast")).to_contain_text("Exported 1 conversation.")
    (row,) = rows
    assert [message["role"] for message in row["messages"]] == ["system", *["user", "assistant"] * 3]
    assert [message.get("weight") for message in row["messages"][2::2]] == [None, 0, None]
    assert row["messages"][-1]["content"][0] == {"type": "text", "text": "c 3 "}

    file = tmp_path / "export.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(tasks.load("customjson", source=file).row(0)["messages"]) == 7
    tokenizer.save(scripted.TOKENIZER, tmp_path / "tokenizer")
    config = show_tasks.Config(task=f"customjson:{file}", tokenizer=str(tmp_path / "tokenizer"))
    show_tasks.show_rows(config, f"customjson:{file}")
    printed = capsys.readouterr().out
    assert "Be brief." in printed and "[[c 3 " in printed and "warning" not in printed
    assert "b 1" in printed and "[[b 1" not in printed  # with a thumb down: read, not learned

    other = page.context.browser.new_context()
    fresh = other.new_page()
    fresh.goto(server.url)
    fresh.locator("#file").set_input_files(file)
    expect(fresh.locator("#toast")).to_contain_text("Imported 1 conversation.")
    expect(fresh.locator(".tool")).to_have_count(3)
    until(fresh, lambda: texts(fresh) == shown)
    expect(fresh.get_by_role("button", name="Good answer").last).to_have_attribute("aria-pressed", "true")
    fresh.get_by_role("button", name="Previous version").click()  # the other versions came along
    expect(answer(fresh)).to_contain_text("c 2")
    fresh.locator("#file").set_input_files({"name": "x.jsonl", "mimeType": "", "buffer": b'{"messages": []}'})
    expect(fresh.locator("#toast")).to_contain_text("Could not import x.jsonl: line 1: expected")
    other.close()


def test_versions_with_thumbs_are_preference_pairs(chat: Opener, tmp_path: Path) -> None:
    count = iter(range(10))
    page, _ = chat(lambda message, _: [f"{message} {next(count)}"])
    say(page, "a")
    finished(page, 1)
    page.locator("#export-pairs").click()
    expect(page.locator("#toast")).to_contain_text("There are no pairs yet")
    page.get_by_role("button", name="Good answer").click()
    page.get_by_role("button", name="Regenerate answer").click()
    expect(answer(page)).to_have_text("a 1")
    finished(page, 1)
    page.get_by_role("button", name="Bad answer").click()
    name, rows = downloaded(page, page.locator("#export-pairs").click)
    assert name == "nanochat_pairs.jsonl"
    expected = [{"role": "assistant", "content": text} for text in ("a 0", "a 1")]
    (tmp_path / name).write_text(json.dumps(rows[0]))
    assert tasks.read_preferences(tmp_path / name)[0]["chosen"][0]["content"] == "a 0"
    assert rows == [{"prompt": [{"role": "user", "content": "a"}], "chosen": expected[:1], "rejected": expected[1:]}]


# Tokens


def test_token_view_shows_probabilities_and_alternatives(chat: Opener) -> None:
    page, server = chat({"go": ["dog"]})
    say(page, "go")
    finished(page, 1)
    assert server.requests[0][1].logprobs == 5
    expect(page.locator(".speed")).to_have_text(re.compile(r"^4 tokens"))
    page.reload()  # they are kept
    page.get_by_role("button", name="Token probabilities").click()
    expect(page.locator(".token")).to_have_text(["d", "o", "g"])
    page.locator(".token").nth(1).hover()
    expect(page.locator(".token-info p")).to_have_text("Token 2 of 3: o had 60.0%.")  # 111 % 5 = 1
    assert page.locator(".token-info li code").all_inner_texts() == ["o", "p", "q", "r", "s"]
    assert page.locator(".percent").all_inner_texts() == ["60.0%", *["5.0%"] * 4]
    page.locator(".token").nth(1).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-info p")).to_contain_text("Token 3 of 3: g")
    page.get_by_role("button", name="Token probabilities").click()
    expect(answer(page)).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Keep token probabilities").uncheck()
    say(page, "go")
    finished(page, 2)
    assert server.requests[1][1].logprobs is None
    expect(page.get_by_role("button", name="Token probabilities")).to_have_count(1)


def test_models_are_a_choice_if_there_are_several(chat: Opener) -> None:
    page, _ = chat({}, models=("one", "two"))
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "completions" in request.url else None)
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Model")).to_have_value("one")
    page.get_by_label("Model").select_option("two")
    expect(page.locator("#model")).to_have_text("two · sft · step 1")
    say(page, "hello")
    finished(page, 1)
    page.evaluate("localStorage['nanochat.settings'] = JSON.stringify({model: 'gone'})")  # a server had it once
    page.reload()
    expect(page.locator("#model")).to_have_text("one · sft · step 1")
    page.get_by_role("button", name="Regenerate answer").click()
    expect(page.locator(".place")).to_have_text("Version 2/2")
    finished(page, 1)
    assert [body["model"] for body in sent] == ["two", "one"]
    expect(page.locator(".speed")).to_have_text(re.compile("^one · "))
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".speed")).to_have_text(re.compile("^two · "))


# Offline and narrow


def test_nothing_is_lost_while_the_server_is_unreachable(chat: Opener) -> None:
    page, _ = chat({}, expected=re.compile("ERR_INTERNET_DISCONNECTED"))
    say(page, "before")
    finished(page, 1)
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_contain_text("The server cannot be reached")
    expect(page.locator("#model")).to_have_text("offline")
    say(page, "in the tunnel")
    expect(page.locator(".error")).to_contain_text("Could not reach the server.")
    page.locator("#text").fill("typed offline")
    page.context.set_offline(False)
    expect(page.locator("#offline")).to_be_hidden()
    page.get_by_role("button", name="Retry").click()
    expect(answer(page)).to_have_text("You said: in the tunnel")
    expect(page.locator("#text")).to_have_value("typed offline")


def test_sides_cover_a_phone_and_close_again(chat: Opener) -> None:
    page, _ = chat({}, browser=PHONE)
    expect(page.locator("#side")).to_be_hidden()
    say(page, "hello")
    finished(page, 1)
    page.get_by_role("button", name="Conversations", exact=True).tap()
    expect(page.locator("#side")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    expect(page.locator("#panel")).to_be_in_viewport()
    page.locator("#shade").tap(position={"x": 5, "y": 300})
    expect(page.locator("#panel")).to_be_hidden()
    page.get_by_role("button", name="Conversations", exact=True).tap()
    page.get_by_role("button", name="New chat").tap()
    expect(page.locator("#side")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()
