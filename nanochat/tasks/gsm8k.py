"""GSM8K (arXiv 2110.14168): math word problems with worked-out answers.

    … she eats 3 + 4 = <<3+4=7>>7 …  #### 9

`<<3+4=7>>` becomes a call of the python tool and its output. The final answer is the number after `#### `.
"""

import re
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks.hub_table import HubTable, hub_task
from nanochat.tasks.task import Task, final_answer, match_final_number, qa_conversation

TABLE = HubTable("openai/gsm8k", "main", "main", {"question": str, "answer": str})
TOOL_CALL = re.compile(r"<<(.*?)>>")


def gsm8k(split: str = "train", *, source: str | Path | None = None) -> Task:
    """GSM8K: grade-school math word problems, answered in sentences with calculations by the tool."""
    return hub_task("gsm8k", "generative", TABLE, _conversation, split, source, is_correct=match_final_number)


def _conversation(row: dict[str, Any]) -> Conversation:
    if final_answer(row["answer"]) is None:
        raise UserError("the answer has no number after #### ")
    return qa_conversation(row["question"], parse_answer(row["answer"]))


def parse_answer(answer: str) -> list[dict[str, str]]:
    """Return an answer as message parts, `<<expression=result>>` as a tool call and its output."""
    parts = []
    for number, piece in enumerate(TOOL_CALL.split(answer)):
        if number % 2 == 0:
            parts += [{"type": "text", "text": piece}] * bool(piece)
            continue
        expression, equals, result = piece.rpartition("=")
        parts.append({"type": "python", "text": expression if equals else piece})
        parts += [{"type": "python_output", "text": result}] * bool(equals)
    return parts
