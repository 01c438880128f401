"""Markdown to HTML on the server: safe, in blocks, in time."""

import html.parser
import time

import httpx
import pytest
import scripted
from xss import XSS

from nanochat.serve import markdown

TAGS = {"p", "br", "hr", "ul", "ol", "li", "blockquote", "pre", "code", "strong", "em", "s", "a", "span"}
TAGS |= {*(f"h{n}" for n in range(1, 7)), "table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"href", "title", "start", "class", "data-language"}


class Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", XSS)
def test_html_has_only_known_tags_and_safe_links(text: str) -> None:
    for _, block in markdown.render(text):
        for tag, attributes in Elements(block).found:
            assert tag in TAGS and attributes.keys() <= ATTRIBUTES, block
            assert str(attributes.get("href", "http://")).startswith(("http://", "https://", "mailto:")), block


def test_blocks_have_the_lines_on_which_they_begin() -> None:
    text = "# a\n\nb\nc\n\n- d\n- e\n\n```py\nf\n```\n$$\nx\n$$\n| g |\n|---|\n| h |\n\n---\n> i"
    lines = text.split("\n")
    starts = [lines[line] for line, _ in markdown.render(text)]
    assert starts == ["# a", "b", "- d", "```py", "$$", "| g |", "---", "> i"]
    whole = "".join(block for _, block in markdown.render(text))
    parts = zip(starts, [line for line, _ in markdown.render(text)], strict=True)
    for _, line in parts:  # the rest of a text from a block's line on is rendered as in the whole
        assert whole.endswith("".join(block for _, block in markdown.render("\n".join(lines[line:]))))


@pytest.mark.parametrize(
    "unit", ["[", "![](", "*a ", "`", "\\(", "\\[\n", "$$\na\n", "> ", "- ", "|a", "```c\n\n", "\n"]
)
def test_no_text_takes_long(unit: str) -> None:
    text = (unit * 8000)[:8000]
    start = time.process_time()
    markdown.render(text)
    markdown.render(f"```c\n{text}\n```")
    assert time.process_time() - start < 2


def test_route_renders_texts_of_a_limited_size() -> None:
    with scripted.serve({}, token="secret") as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/render", json={"texts": ["a"]}).status_code == 401
        http.headers["authorization"] = "Bearer secret"
        assert http.post("/render", json={"texts": ["*a*", ""]}).json() == [[[0, "<p><em>a</em></p>\n"]], []]
        for texts in (["x" * 20_000] * 2, ["x" * 40_000], "x", [""] * 101, [1]):
            refused = http.post("/render", json={"texts": texts})
            assert refused.status_code == 400 and "texts" in refused.json()["error"]["message"]
        sampling = http.get("/page").json()["sampling"]
        assert sampling["temperature"] == {"default": 0.8, "minimum": 0, "maximum": 2}
