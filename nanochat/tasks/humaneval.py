"""HumanEval (arXiv 2107.03374): functions to complete from signature and docstring, tested in the sandbox."""

import re
from pathlib import Path

from nanochat import sandbox
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.hub_table import Source, Table
from nanochat.tasks.task import Task, qa_conversation

COLUMNS = {"prompt": str, "canonical_solution": str, "entry_point": str, "test": str}
CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def humaneval(
    split: str = "test", *, source: str | Path | None = None, timeout_seconds: float = 5.0, weak: bool = False
) -> Task:
    """HumanEval: Python functions to write from their signature and docstring, run against tests in the sandbox.

    Args:
        timeout_seconds: for a program and its tests. weak: accept what `sandbox.run` calls weaker isolation.

    Raises:
        UserError: as for `tasks.load`. `is_correct` raises it where the sandbox cannot run.
    """
    if split != "test":
        raise UserError(f"task humaneval has no split {split}, only test: it is for evaluation, not for training")
    table = hub_table.load(
        Source("humaneval", "openai/openai_humaneval", None, "openai_humaneval", split, COLUMNS), source
    )

    def is_correct(row: Conversation, answer: str) -> bool:
        return sandbox.run(program(row, answer), timeout_seconds=timeout_seconds, weak=weak).success

    return Task("humaneval", "generative", len(table), lambda index: _row(table, index), is_correct)


def _row(table: Table, index: int) -> Conversation:
    row = table[index]
    solution = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return {**qa_conversation(row["prompt"], solution), "entry_point": row["entry_point"], "test": row["test"]}


def program(row: Conversation, answer: str) -> str:
    """Return the program that succeeds if and only if the answer passes the row's tests."""
    block = CODE_BLOCK.search(answer)
    code = (block[1] if block else answer).strip("\r\n")  # without a code block, the whole answer
    imports = _imports(row["messages"][0]["content"])
    return "\n\n".join([imports, code, row["test"], f"check({row['entry_point']})\n"])


def _imports(prompt: str) -> str:
    """Return the imports at the top of a prompt; models seldom repeat them."""
    lines = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            lines.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return "\n".join(lines)
