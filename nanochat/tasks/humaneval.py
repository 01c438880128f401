"""HumanEval (arXiv 2107.03374): functions to complete from signature and docstring, tested in the sandbox."""

import ast
import itertools
import re
import textwrap
import types
import warnings
from pathlib import Path
from typing import Any

from nanochat import sandbox
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks.hub_table import HubTable, hub_task
from nanochat.tasks.task import Task, qa_conversation

COLUMNS = ("prompt", "canonical_solution", "entry_point", "test")
TABLE = HubTable("openai/openai_humaneval", None, "openai_humaneval", dict.fromkeys(COLUMNS, str))
HELPERS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
FENCE = re.compile(r"^.*(?:```|~~~).*$", re.MULTILINE)
GLUED_FENCE = re.compile(r"(?<=[^\s`])(```+[ \t]*)$", re.MULTILINE)
QUOTE = re.compile(r"^(?:>>>|\.\.\.|>|`+(?:python )?) ?|`+$", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^;\n]*);?[ \t]*", re.MULTILINE)
STATEMENT = re.compile(r"([ \t]*)(?:@|(?:async|class|def|for|from|if|import|try|while|with)\b|\w[\w, ]*(?::.*)?=[^=])")


def humaneval(
    split: str = "test", *, source: str | Path | None = None, timeout_seconds: float = 5.0, weak: bool = False
) -> Task:
    """HumanEval: Python functions to write from their signature and docstring, run against tests in the sandbox.

    Args:
        timeout_seconds: for a program and its tests. weak: accept what `sandbox.run` calls weaker isolation.
    """
    if split != "test":
        raise UserError(f"task humaneval has no split {split}, only test: it is for evaluation, not for training")

    def is_correct(row: Conversation, answer: str) -> bool:
        return sandbox.run(program(row, answer), timeout_seconds=timeout_seconds, weak=weak).success

    return hub_task("humaneval", "generative", TABLE, _conversation, split, source, is_correct=is_correct)


def _conversation(row: dict[str, Any]) -> Conversation:
    solution = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return {**qa_conversation(row["prompt"], solution), "entry_point": row["entry_point"], "test": row["test"]}


def program(row: Conversation, answer: str) -> str:
    """Return the program that succeeds if and only if the answer passes the row's tests."""
    prompt, name = row["messages"][0]["content"], row["entry_point"]
    # Models seldom repeat what a prompt imports and defines above its function.
    above = [node for node in _parse(prompt.split("\n"))[0] if getattr(node, "name", "") != name]
    text = f"{ast.unparse(ast.Module(above, []))}\n\n{code(row, answer)}"
    header = FUTURE.findall(text)  # has to come first
    if "__name__" in text:
        header.append('__name__ = "builtins"')  # what an answer does as a script is not part of it
    return "\n\n".join(["\n".join(header), FUTURE.sub("", text), row["test"], f"check({name})\n"])


def code(row: Conversation, answer: str) -> str:
    """Return the code in an answer: its first lines that are Python and define the row's function with a `return`.

    Prose and the fences of code blocks are not Python, so neither they nor the language of a block matter. If no lines
    define the function, a block, or the whole answer, may be the rest of the prompt; else it is the first block, or
    the whole answer. What comes before a </think> counts only if nothing after it does.
    """
    prompt, name = row["messages"][0]["content"].rstrip("\n"), row["entry_point"]
    answer = GLUED_FENCE.sub(r"\n\1", re.sub("\r\n?", "\n", answer))
    final = answer.rpartition("</think>")[2]
    blocks = FENCE.split(final)
    # A body as it is, without its indentation, or without that of its first line.
    indented = [textwrap.indent(textwrap.dedent(block.expandtabs(4)), "    ") for block in blocks]
    rests = [*blocks, *indented, *("    " + block.lstrip() for block in blocks)]
    texts = [final, QUOTE.sub("", final), answer, *(f"{prompt}\n{rest}" for rest in rests)]
    found = (_find(name, text.split("\n")) for text in texts)
    return next(filter(None, found), (blocks[1:] or blocks)[0])


def _find(name: str, lines: list[str]) -> str:
    """Return the first lines that define a function, below the imports and definitions elsewhere; "" without any."""
    found: list[tuple[str, list[ast.stmt]]] = []
    end = 0
    for number, line in enumerate(lines):
        start = STATEMENT.match(line)
        if start and number >= end:
            inside = re.compile(start[1] + r"|\s*$").match
            own = [line.removeprefix(start[1]) for line in itertools.takewhile(inside, lines[number:])]
            body, size = _parse(own)
            found.append(("\n".join(own[:size]), body))
            end = number + size
    chosen = next((run for run in found if any(_defines(node, name) for node in run[1])), None)
    if chosen is None:
        return ""
    others = [node for run in found if run is not chosen for node in run[1] if isinstance(node, HELPERS)]
    helpers = [f"try:\n{textwrap.indent(ast.unparse(node), '    ')}\nexcept Exception:\n    pass" for node in others]
    return "\n\n".join([*helpers, chosen[0]])


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef) and node.name == name:
        return _contains(node, ast.Return | ast.Yield)
    return isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets)


def _contains(node: ast.AST, kinds: types.UnionType) -> bool:
    return any(isinstance(inner, kinds) for inner in ast.walk(node))


def _parse(lines: list[str]) -> tuple[list[ast.stmt], int]:
    """Return the statements that lines begin with, without a word of prose after them, and how many lines they are."""
    end, body = len(lines), []
    while end > 0:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse("\n".join(lines[:end]))
            ast.unparse(tree)  # fails where it is nested too deeply to be written again
            body = tree.body
            break
        except SyntaxError as error:
            end = min(end, error.lineno or end) - 1
            while end > 0 and not lines[end][:1].strip():  # to the start of the statement
                end -= 1
        except (ValueError, MemoryError, RecursionError):
            break
    while body and isinstance(body[-1], ast.Expr | ast.AnnAssign) and not _contains(body[-1], ast.Call | ast.Constant):
        body.pop()
    return body, body[-1].end_lineno or 0 if body else 0
