"""HumanEval (arXiv 2107.03374): functions to complete from signature and docstring, tested in the sandbox."""

import itertools
import re
from pathlib import Path
from typing import Any

from nanochat import sandbox
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks.hub_table import HubTable, hub_task
from nanochat.tasks.task import Task, qa_conversation

COLUMNS = ("prompt", "canonical_solution", "entry_point", "test")
TABLE = HubTable("openai/openai_humaneval", None, "openai_humaneval", dict.fromkeys(COLUMNS, str))
CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


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
    block = CODE_BLOCK.search(answer)
    code = (block[1] if block else answer).strip("\r\n")  # without a code block, the whole answer
    # Models seldom repeat the imports at the top of a prompt.
    lines = row["messages"][0]["content"].splitlines()
    top = itertools.takewhile(lambda line: line.startswith(("import ", "from ", "#")) or not line.strip(), lines)
    imports = "\n".join(line for line in top if line.startswith(("import ", "from ")))
    return "\n\n".join([imports, code, row["test"], f"check({row['entry_point']})\n"])
