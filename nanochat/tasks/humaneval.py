"""HumanEval: functions to be written from their signature and docstring, judged by running tests in the sandbox.

Source: https://huggingface.co/datasets/openai/openai_humaneval, arXiv 2107.03374.
"""

import re
from pathlib import Path

from nanochat import sandbox
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task, qa_conversation

COLUMNS = {"prompt": str, "canonical_solution": str, "entry_point": str, "test": str}
FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def load(
    split: str = "test", *, source: str | Path | None = None, timeout_seconds: float = 5.0, weak: bool = False
) -> Task:
    """Return the task. `right` runs what a model wrote.

    Args:
        split: test; there is no other. source: files to read instead of the hub.
        timeout_seconds: for a program and its tests. weak: accept what `sandbox.run` calls weaker isolation.

    Raises:
        UserError: the data cannot be had, or is not of the right form. `right` raises it where the sandbox cannot run.
    """
    if split != "test":
        raise UserError(f"task humaneval has no split {split}, only test: it is to be examined by, not to learn from")
    data = hub_table.Source("humaneval", "openai/openai_humaneval", None, "openai_humaneval", split, COLUMNS)
    table = hub_table.read(data, source)

    def right(row: Conversation, answer: str) -> bool:
        return sandbox.run(program(row, answer), timeout_seconds=timeout_seconds, weak=weak).success

    return Task("humaneval", "generative", len(table), lambda index: _row(table, index), right)


def _row(table: hub_table.Table, index: int) -> Conversation:
    row = table[index]
    solution = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return {**qa_conversation(row["prompt"], solution), "entry_point": row["entry_point"], "test": row["test"]}


def program(row: Conversation, answer: str) -> str:
    """Return the program that passes if and only if the answer is right: imports, answer, tests, and their call."""
    prompt = row["messages"][0]["content"]
    return "\n\n".join([imports(prompt), code(answer), row["test"], f"check({row['entry_point']})\n"])


def code(answer: str) -> str:
    """Return what stands in the first fence of an answer, or all of it where there is none."""
    found = FENCE.search(answer)
    return (found[1] if found else answer).strip("\r\n")


def imports(prompt: str) -> str:
    """Return the imports at the top of a prompt; a model seldom repeats them."""
    lines = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            lines.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return "\n".join(lines)
