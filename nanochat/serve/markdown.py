"""Markdown to safe HTML, for the page: CommonMark with tables, strikethrough, readable math and highlighted code.

Raw HTML stays text, an image becomes a link, and a link is one only to http, https or mailto: what a model writes, or
makes up from what it reads, can neither run nor load anything.
"""

import functools
import html
from collections.abc import Sequence
from typing import Any

import pygments
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

MATH = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}  # its marks
MAX_HIGHLIGHTED_CHARS, MAX_BLANK_LINES = 16_000, 200  # some of Pygments' lexers are quadratic in these
MAX_MATH_LINES = 40
SCHEMES = ("http://", "https://", "mailto:")
LANGUAGES = {
    *(
        "bash",
        "c",
        "c++",
        "cpp",
        "css",
        "diff",
        "go",
        "html",
        "java",
        "javascript",
        "js",
        "json",
        "kotlin",
        "latex",
        "lua",
    ),
    *("makefile", "markdown", "md", "python", "py", "r", "ruby", "rust", "sh", "shell", "sql", "swift", "toml", "ts"),
    *("typescript", "xml", "yaml"),
}


def render(text: str) -> list[tuple[int, str]]:
    """Return the top-level blocks of a text as (line on which the block begins, counted from 0; its HTML)."""
    parser, env = _parser(), {}
    tokens = parser.parse(text, env)
    blocks: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
        if token.type in ("th_open", "td_open") and (style := token.attrs.pop("style", None)):
            token.attrs["class"] = str(style).removeprefix("text-align:")  # the page's policy forbids styles
    lines = [block[0].map[0] if block[0].map else 0 for block in blocks]
    return [(line, parser.renderer.render(block, parser.options, env)) for line, block in zip(lines, blocks)]


@functools.cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.validateLink = lambda url: url.strip().lower().startswith(SCHEMES)  # type: ignore[method-assign]
    parser.inline.ruler.before("escape", "math", _math_inline)
    parser.block.ruler.before("fence", "math", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    rules = parser.renderer.rules  # type: ignore[attr-defined]
    rules["image"] = _image
    rules["fence"] = rules["code_block"] = _code
    return parser


def _image(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    text = html.escape(tokens[index].content or "image")
    url = html.escape(str(tokens[index].attrs["src"]))
    depth = sum(token.nesting for token in tokens[:index] if token.type.startswith("link_"))
    return text if depth else f'<a href="{url}">{text}</a>'


def _code(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    name, code = tokens[index].info.strip().partition(" ")[0], tokens[index].content.removesuffix("\n")
    is_small = (
        len(code) <= MAX_HIGHLIGHTED_CHARS and sum(not line.strip() for line in code.split("\n")) <= MAX_BLANK_LINES
    )
    if name.lower() in LANGUAGES and is_small:
        lexer = get_lexer_by_name(name.lower(), stripnl=False, ensurenl=False)
        content = pygments.highlight(code, lexer, HtmlFormatter(nowrap=True)).removesuffix("\n")
    else:
        content = html.escape(code)
    return f'<pre data-language="{html.escape(name)}"><code>{content}</code></pre>\n'


def _math_inline(state: StateInline, silent: bool) -> bool:
    """Keep $…$, $$…$$, \\(…\\) and \\[…\\] as they are; $5 and $10 are no math."""
    source, start = state.src, state.pos
    opened = next((mark for mark in MATH if source.startswith(mark, start)), None)
    if opened is None:
        return False
    first = start + len(opened)
    last = source.find(MATH[opened], first, state.posMax)
    end = last + len(MATH[opened])
    is_price = opened == "$" and (
        source[first : first + 1].isspace() or source[last - 1].isspace() or source[end : end + 1].isdigit()
    )
    if last <= first or is_price:
        return False
    if not silent:
        token = state.push("code_inline", "code", 0)
        token.content, token.attrs = source[start:end], {"class": "math"}
    state.pos = end
    return True


def _math_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Keep lines from one that begins with $$ or \\[ to one that ends with its counterpart."""
    opened = state.getLines(start, start + 1, state.blkIndent, False).strip()
    closed = {"$$": "$$", "\\[": "\\]"}.get(opened)
    if closed is None or state.is_code_block(start):
        return False
    last = next(
        (
            line
            for line in range(start + 1, min(end, start + MAX_MATH_LINES))
            if state.getLines(line, line + 1, 0, False).strip() == closed
        ),
        None,
    )
    if last is None:
        return False
    if not silent:
        token = state.push("code_block", "code", 0)
        token.content, token.info, token.map = (
            state.getLines(start, last + 1, state.blkIndent, False),
            "math",
            [start, last + 1],
        )
        state.line = last + 1
    return True
