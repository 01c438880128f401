"""GSM8K (arXiv 2110.14168): math word problems with worked-out answers.

    … she eats 3 + 4 = <<3+4=7>>7 …  #### 9

`<<3+4=7>>` becomes a call of the python tool and its output. The final answer is the number after `#### `.
"""

import re
from pathlib import Path

from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.hub_table import Source, Table
from nanochat.tasks.task import Task, final_answer, match_final_number, qa_conversation

TOOL_CALL = re.compile(r"<<(.*?)>>")
COLUMNS = {"question": str, "answer": str}


def gsm8k(split: str = "train", *, source: str | Path | None = None) -> Task:
    """GSM8K: grade-school math word problems, answered in sentences with calculations by the tool."""
    table = hub_table.load(Source("gsm8k", "openai/gsm8k", "main", "main", split, COLUMNS), source)
    return Task("gsm8k", "generative", len(table), lambda index: _row(table, index), match_final_number)


def _row(table: Table, index: int) -> Conversation:
    row = table[index]
    if final_answer(row["answer"]) is None:
        raise table.error(index, "the answer has no number after #### ")
    return qa_conversation(row["question"], parse_answer(row["answer"]))


def parse_answer(answer: str) -> list[dict[str, str]]:
    """Return an answer as message parts, `<<expression=result>>` as a tool call and its output."""
    parts = []
    for number, piece in enumerate(TOOL_CALL.split(answer)):
        if number % 2 == 0:
            parts += [{"type": "text", "text": piece}] * bool(piece)
            continue
        expression, equals, result = piece.rpartition("=")
        if not equals:
            expression, result = piece, ""
        parts.append({"type": "python", "text": expression})
        parts += [{"type": "python_output", "text": result}] * bool(equals)
    return parts
