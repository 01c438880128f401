"""The chat page in a real browser: untrusted text, Markdown, layout, colors, keyboard and screen readers."""

import re

import pytest
import scripted
from browser import Opener, answer, expect, finished, say, texts

pytestmark = pytest.mark.slow

pytest_plugins = ["browser"]  # the fixtures
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


# Untrusted text and Markdown


EVIL = """<img src=x onerror="pwned=1;alert(1)"><script>pwned=1</script><a href='javascript:alert(1)'>y</a>"""


def test_markup_in_messages_and_answers_stays_text(chat: Opener) -> None:
    everywhere = f"{EVIL}\n# {EVIL}\n- {EVIL}\n```\n{EVIL}\n```\n"
    pieces = [everywhere[i : i + 7] for i in range(0, len(everywhere), 7)]
    page, _ = chat({EVIL: [*pieces, ("python", "<b>1</b>"), ("output", "<i>2</i>\ufffc")]})
    say(page, EVIL)
    finished(page, 1)
    assert texts(page)[0] == EVIL
    shown = [answer(page).locator(tag).first.text_content() for tag in ("p", "h3", "li", "pre")]
    assert shown == [EVIL] * 4
    assert answer(page).locator(".tool").text_content() == "calculator: <b>1</b>=<i>2</i>\ufffc"
    assert page.locator("#log").locator("img, script, a, b, i").count() == 0
    assert page.evaluate("window.pwned") is None
    page.reload()  # stored text is rendered as text too
    expect(page.locator("article")).to_have_count(2)
    assert page.locator("#log").locator("img, script, a, b, i").count() == 0
    assert page.evaluate("window.pwned") is None


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


def test_markdown_and_copy_buttons(chat: Opener) -> None:
    code = "for i in range(3):\n    print(i * 2)  # **not bold**"
    lists = "3. three\n4. four\n\n- x\n  - y\n"
    text = f"## Title\nSome `code`, **bold**, 2*3*4 and a_b_c.\n\n{lists}\n```python\n{code}\n```\nEnd"
    page, server = chat(
        {"go": [text], "open": ["```\nnever closed"]}, browser={"permissions": ["clipboard-read", "clipboard-write"]}
    )
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
    assert len(server.requests) == 2  # no click regenerated


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
    page.evaluate("window.left = () => (s => s.scrollHeight - s.clientHeight - s.scrollTop)($('scroll'))")
    say(page, "long")
    expect(answer(page)).to_contain_text("20")
    assert page.evaluate("left()") < 60
    expect(page.locator("#bottom")).to_be_hidden()
    page.mouse.move(350, 200)
    page.mouse.wheel(0, -300)
    expect(page.locator("#bottom")).to_be_visible()
    top = page.evaluate("$('scroll').scrollTop")
    expect(answer(page)).to_contain_text("50")
    assert abs(page.evaluate("$('scroll').scrollTop") - top) < 2, "it stays where the user scrolled"
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
        assert page.evaluate("$('scroll').scrollWidth <= $('scroll').clientWidth")
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
    for message in ("go", "/topk 3", "/topk x", "/help"):
        say(page, message)
    expect(page.locator(".error")).to_be_visible()
    page.locator("article.answer .body").first.click()
    expect(page.locator("#toast")).to_be_visible()
    page.locator("#undo").click()
    ratios |= dict(page.evaluate(CONTRAST))
    say(page, "/nothing")
    page.locator("#text").fill("/")
    ratios |= dict(page.evaluate(CONTRAST))
    assert {"calculator", "Retry", "A base model."} <= ratios.keys()
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
        assert ring == "solid2px" or stops[-1] == "Message", f"no focus ring on {stops[-1]}"
    head = ["settings", "Skip to the message box", "Switch between light and dark", "New chat", "Conversation"]
    assert stops == [*head, "Edit message", "Copy code", "x", "Copy answer", "Regenerate answer", "Message"]
    page.keyboard.press("ArrowUp")  # in an empty box
    expect(page.locator(".editor textarea")).to_be_focused()
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Edit message"  # back on the button that opened the editor
    page.keyboard.press("Enter")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    finished(page, 1)
    assert texts(page) == ["go!", "You said: go!"]
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
