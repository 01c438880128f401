"""The chat page in a real browser: untrusted text, Markdown, layout, colors, keyboard and screen readers."""

import json
import re
from pathlib import Path

import pytest
import scripted
from browser import Opener, answer, expect, finished, say, texts, until
from xss import XSS

pytestmark = pytest.mark.slow

pytest_plugins = ["browser"]  # the fixtures
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


# Untrusted text and Markdown


FOREIGN = """() => [...document.querySelectorAll('#log .body *')].filter((node) =>
  !node.closest('button, .tool') &&
  (!/^(P|BR|HR|H[1-6]|[UO]L|LI|BLOCKQUOTE|DIV|PRE|CODE|STRONG|EM|S|A|TABLE|THEAD|TBODY|TR|TH|TD|SPAN)$/
    .test(node.tagName) ||
   node.getAttributeNames().some((name) => !/^(class|href|target|rel|start|tabindex)$/.test(name)) ||
   (node.hasAttribute('href') && !/^(https?:[/][/]|mailto:)/.test(node.getAttribute('href')))))
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("hostile_server", [False, True])
def test_no_markup_of_a_model_runs_or_loads(chat: Opener, tmp_path: Path, hostile_server: bool) -> None:
    """Even if the server's HTML were not safe, the page would let in no more than its list of tags."""
    rows = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]} for text in XSS]
    messages = [message for row in rows for message in row["messages"]]
    file = tmp_path / "xss.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": rows[0]["messages"]}))
    page, _ = chat({}, expected=re.compile("Content Security Policy") if hostile_server else None)
    if hostile_server:
        reply = lambda route: route.fulfill(json=[[[0, text]] for text in route.request.post_data_json["texts"]])  # noqa: E731
        page.route("**/render", reply)
    page.locator("#file").set_input_files(file)
    expect(page.locator("article.answer")).to_have_count(len(XSS))
    expect(page.locator(".tail")).to_have_count(0)  # all is rendered
    page.wait_for_timeout(200)
    assert page.evaluate(FOREIGN) == []
    assert page.evaluate("window.pwned") is None
    assert page.locator("#log .bubble").all_inner_texts() == [text.replace("\t", "\t") for text in XSS]
    if not hostile_server:
        shown = page.locator("#log .body").all_inner_texts()
        assert "<script>pwned=1</script>" in shown[0] and "onerror=pwned=1" in shown[1]  # as text


def test_content_security_policy_blocks_injected_scripts(chat: Opener) -> None:
    page, _ = chat({}, expected=re.compile("Content Security Policy|requires .Trusted"))
    inject = "const s = document.createElement('script'); s.append('pwned = 1'); document.body.append(s)"
    page.evaluate(f"() => {{ try {{ {inject} }} catch {{}} }}")
    assert (
        page.evaluate("() => { try { document.body.innerHTML = '<p>x</p>'; return 'set' } catch { return 'stopped' } }")
        == "stopped"
    )
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'stopped')") == "stopped"


MARKDOWN = {
    "# Title": ("h1", "Title"),
    "### Third": ("h3", "Third"),
    "a **bold** b": ("strong", "bold"),
    "an *emphasis*": ("em", "emphasis"),
    "~~gone~~": ("s", "gone"),
    "some `code` and a_b_c 2*3*4": ("p > code", "code"),
    "a [link](https://a.example/x)": ("a[href='https://a.example/x'][target=_blank]", "link"),
    "![picture](https://a.example/x.png)": ("a[href='https://a.example/x.png']", "picture"),
    "3. three\n4. four": ("ol[start='3'] > li:nth-child(2)", "four"),
    "- x\n  - y\n    1. z": ("ul > li > ul > li > ol > li", "z"),
    "> quoted": ("blockquote > p", "quoted"),
    "above\n\n---\n\nbelow": ("hr", ""),
    "| a | b |\n|---|--:|\n| c | **d** |": ("table td.right strong", "d"),
    "inline $x_1 + y_1$ and \\(a_b\\)": ("code.math >> nth=0", "$x_1 + y_1$"),
    "$$\nx_1 \\\\\n- y_1\n$$": ("pre.math", "$$\nx_1 \\\\\n- y_1\n$$"),
    "it costs $5 and $10": ("p", "it costs $5 and $10"),
    "one line\nand the next": ("p", "one line\nand the next"),
    "```python\nx = 1  # one\n```": ("pre .c1", "# one"),
    "```\nplain <b>\n```": ("pre code", "plain <b>"),
}


def test_markdown_of_each_kind_is_shown(chat: Opener, tmp_path: Path) -> None:
    messages = [{"role": role, "content": text} for text in MARKDOWN for role in ("user", "assistant")]
    file = tmp_path / "markdown.jsonl"
    file.write_text(json.dumps(messages))
    page, _ = chat({})
    page.locator("#file").set_input_files(file)
    expect(page.locator("article.answer")).to_have_count(len(MARKDOWN))
    expect(page.locator(".tail")).to_have_count(0)
    bodies = page.locator("article.answer .body")
    shown = {text: bodies.nth(i).locator(where).inner_text() for i, (text, (where, _)) in enumerate(MARKDOWN.items())}
    assert shown == {text: inner for text, (_, inner) in MARKDOWN.items()}


def test_growing_answer_does_not_flicker(chat: Opener) -> None:
    """At 100 tokens a second text never disappears, and finished blocks keep their nodes."""
    text = "".join(f"Paragraph {i} has **bold {i}** words.\n\n- item {i}\n- more\n\n" for i in range(9))
    page, _ = chat({"go": [text[i : i + 5] for i in range(0, len(text), 5)]}, delay=0.01)
    page.evaluate(
        """() => { window.sizes = []; const log = document.getElementById('log');
          const size = () => log.querySelector('.answer .body')?.textContent.replace(/[^a-z0-9]/gi, '').length ?? 0;
          new MutationObserver(() => sizes.push(size())).observe(log, {childList: true, subtree: true}); }"""
    )
    say(page, "go")
    expect(answer(page).locator("strong").nth(3)).to_be_visible()
    page.evaluate("window.kept = document.querySelector('.answer .body p')")
    finished(page, 1)
    expect(answer(page).locator("strong")).to_have_count(9)
    assert page.evaluate("kept === document.querySelector('.answer .body p') && kept.isConnected")
    sizes = page.evaluate("sizes")
    assert len(sizes) > 30 and sizes == sorted(sizes)


def test_copy_buttons(chat: Opener) -> None:
    code = "for i in range(3):\n    print(i * 2)  # **not bold**"
    text = f"## Title\nSome `code`.\n\n```python\n{code}\n```\nEnd"
    page, _ = chat(
        {"go": [text], "open": ["```\nnever closed"]}, browser={"permissions": ["clipboard-read", "clipboard-write"]}
    )
    say(page, "go")
    finished(page, 1)
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("#live")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.get_by_role("button", name="Copy answer").click()
    expect(page.locator("#live")).to_have_text(re.compile("Copied"))
    assert page.evaluate("navigator.clipboard.readText()") == text
    say(page, "open")
    finished(page, 2)
    expect(answer(page).locator("pre")).to_have_text("never closed")


def test_length_limit_and_empty_answer_are_shown(chat: Opener) -> None:
    page, server = chat({"cut": ["so far", scripted.LENGTH], "none": []})
    say(page, "cut")
    expect(page.locator(".remark")).to_have_text("Stopped at the length limit.")
    say(page, "none")
    expect(page.locator(".remark").last).to_have_text("The answer is empty.")
    say(page, "next")
    finished(page, 3)
    assert "none" not in server.prompts[-1] and "cut" in server.prompts[-1]


# Layout, colors, keyboard, screen readers


def test_scrolling_follows_until_the_user_scrolls_up(chat: Opener) -> None:
    small = {"viewport": {"width": 700, "height": 500}}
    page, _ = chat({"long": [f"{i}\n\n" for i in range(100)]}, delay=0.02, browser=small)
    page.evaluate(
        "window.left = () => (s => s.scrollHeight - s.clientHeight - s.scrollTop)(document.getElementById('scroll'))"
    )
    say(page, "long")
    expect(answer(page)).to_contain_text("20")
    assert page.evaluate("left()") < 60
    expect(page.locator("#bottom")).to_be_hidden()
    page.mouse.move(350, 200)
    page.mouse.wheel(0, -300)
    expect(page.locator("#bottom")).to_be_visible()
    top = page.evaluate("document.getElementById('scroll').scrollTop")
    expect(answer(page)).to_contain_text("50")
    assert abs(page.evaluate("document.getElementById('scroll').scrollTop") - top) < 2, (
        "it stays where the user scrolled"
    )
    page.locator("#bottom").click()
    expect(page.locator("#bottom")).to_be_hidden()  # wait_for_function needs eval, which the page forbids
    expect(answer(page)).to_contain_text("90")
    assert page.evaluate("left()") < 60, "and follows again"
    finished(page, 1)


def test_phone_layout_fits_and_targets_are_large(chat: Opener) -> None:
    wide = "x" * 300 + "\n\n```\n" + "y" * 120 + "\n```\n"
    replies = {"go": [wide, ("python", "1+" * 40 + "1"), ("output", "41")]}
    page, _ = chat(replies, notice="A base model.", browser=PHONE)
    page.get_by_role("button", name="What is the capital of France?").tap()
    finished(page, 1)
    page.locator("#text").fill("go")
    page.locator("#send").tap()
    finished(page, 2)
    for text in ("/", ""):
        page.locator("#text").fill(text)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("(s => s.scrollWidth <= s.clientWidth)(document.getElementById('scroll'))")
        box = page.locator("#composer").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
        for button in page.locator("button:visible").all():
            size = button.bounding_box()
            assert size["width"] >= 40 and size["height"] >= 40, button.get_attribute("aria-label")
    page.locator("article.user").last.get_by_role("button", name="Edit message").tap()
    expect(page.locator(".editor textarea")).to_be_focused()
    assert page.locator(".editor button").last.bounding_box()["height"] < 60, "its label is on one line"


# The contrast ratio of each text with the first background behind it.
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const color = rgb(getComputedStyle(node).backgroundColor);
    return color[3] === 0 ? behind(node.parentElement) : color;
  };
  const ratios = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest('.hide, .skip, script, style, svg')) continue;
    const [a, b] = [light(rgb(getComputedStyle(parent).color)), light(behind(parent))];
    ratios.push([node.data.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return ratios;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_contrast_in_both_schemes(chat: Opener, scheme: str) -> None:
    reply = ["Text `code` ", ("python", "1+1"), ("output", "2"), "\n\n1. x\n\n```py\ny\n```\n", scripted.REFUSE]
    replies = {"go": reply, "cut": ["x", scripted.LENGTH]}
    page, _ = chat(replies, notice="A base model.", browser={"color_scheme": scheme})
    expect(page.locator("#model")).to_contain_text("scripted")
    ratios = dict(page.evaluate(CONTRAST))  # of the empty page: the suggestions
    say(page, "cut")
    finished(page, 1)
    for message in ("go", "/topk 3"):
        say(page, message)
    expect(page.locator(".error")).to_be_visible()
    expect(page.locator("#toast")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Help").click()
    ratios |= dict(page.evaluate(CONTRAST))
    page.keyboard.press("Escape")
    say(page, "/nothing")
    page.locator("#text").fill("/")
    ratios |= dict(page.evaluate(CONTRAST))
    assert {"calculator", "Retry", "A base model.", "Temperature", "Today", "new line"} <= ratios.keys()
    assert {text: ratio for text, ratio in ratios.items() if ratio < 4.5} == {}  # WCAG 2.2, AA


def test_color_scheme_follows_the_system_until_it_is_chosen(chat: Opener) -> None:
    page, _ = chat({}, browser={"color_scheme": "dark"})
    background, dark = "getComputedStyle(document.body).backgroundColor", "rgb(25, 26, 27)"
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark, "the choice is stored"


def test_everything_works_by_keyboard(chat: Opener) -> None:
    page, _ = chat({"go": ["```py\nx\n```"]}, browser={"permissions": ["clipboard-write"]})
    focused = "(a => a.ariaLabel || a.id || a.textContent.trim())(document.activeElement)"
    page.keyboard.type("go")
    page.keyboard.press("Enter")
    finished(page, 1)
    stops = []
    while "Message" not in stops:
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            continue  # past the end of the page
        stops.append(page.evaluate(focused))
        ring = page.evaluate("(s => s.outlineStyle + s.outlineWidth)(getComputedStyle(document.activeElement))")
        assert ring == "solid2px" or stops[-1] in ("Message", "Search conversations"), f"no focus ring on {stops[-1]}"
    side = ["new", "Search conversations", "go", "Menu of go", "import", "export", "Export pairs"]
    head = ["Conversations", "Switch between light and dark", "Help", "Settings", "Conversation"]
    answer_buttons = [
        "Copy code",
        "x",
        "Copy answer",
        "Good answer",
        "Bad answer",
        "Token probabilities",
        "Regenerate answer",
    ]
    message_buttons = ["Edit message", "Copy message"]
    assert stops == ["settings", "Skip to the message box", *side, *head, *message_buttons, *answer_buttons, "Message"]
    page.keyboard.press("ArrowUp")  # in an empty box
    expect(page.locator(".editor textarea")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit message")).to_be_focused()
    assert page.evaluate(focused) == "Edit message"  # back on the button that opened the editor
    page.keyboard.press("Enter")
    expect(page.locator(".editor textarea")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("go!")
    finished(page, 1)
    until(page, lambda: texts(page) == ["go!", "You said: go!"])
    page.locator(".skip").focus()
    expect(page.locator(".skip")).to_be_in_viewport()  # it is visible only then
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()


def test_screen_reader_gets_each_answer_once(chat: Opener) -> None:
    page, _ = chat({"go": [f"word{i} " for i in range(20)]}, delay=0.02)
    page.evaluate(
        """() => { window.announced = []; const live = document.getElementById('live');
            new MutationObserver(() => announced.push(live.textContent)).observe(live, {childList: true}); }"""
    )
    say(page, "go")
    finished(page, 1)
    assert page.evaluate("announced") == ["Generating an answer", " ".join(f"word{i}" for i in range(20))]
    assert page.locator("#live").get_attribute("role") == "status"
    assert page.locator("#log [aria-live], #log [role=log]").count() == 0


def test_reduced_motion_disables_animations(visit: Opener) -> None:
    with scripted.serve({"go": [1.0, "x ", 30.0]}) as server:
        for motion, moving in (("no-preference", True), ("reduce", False)):
            page = visit(server, reduced_motion=motion)
            say(page, "go")
            expect(page.locator(".dots")).to_be_visible()
            assert bool(page.evaluate("document.getAnimations().length")) == moving
            page.keyboard.press("Escape")
            finished(page, 1)
