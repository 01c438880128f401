"""GSM8K: word problems of grade school, worked out in sentences with calculations marked in them.

    … she eats 3 + 4 = <<3+4=7>>7 …  #### 9

A mark is a call of the python tool and its output. The answer is the number behind `#### `.
Source: https://huggingface.co/datasets/openai/gsm8k, arXiv 2110.14168.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task, final_answer, match_final_number, qa_conversation

MARK = re.compile(r"<<(.*?)>>")
COLUMNS = {"question": str, "answer": str}


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task.

    Args:
        split: train or test. source: files to read instead of the hub.

    Raises:
        UserError: the data cannot be had, or is not of the right form.
    """
    table = hub_table.read(hub_table.Source("gsm8k", "openai/gsm8k", "main", "main", split, COLUMNS), source)
    return Task("gsm8k", "generative", len(table), lambda index: _row(table, index), match_final_number)


def _row(table: hub_table.Table, index: int) -> Conversation:
    row = table[index]
    if final_answer(row["answer"]) is None:
        raise table.bad(index, "the answer has no number behind #### ")
    return qa_conversation(row["question"], parts_of(row["answer"]))


def parts_of(answer: str) -> list[dict[str, str]]:
    """Return an answer's text as parts: what is marked as `<<expr=result>>` becomes a call and its output."""
    parts = []
    for number, piece in enumerate(MARK.split(answer)):
        if number % 2 == 0:
            parts += [{"type": "text", "text": piece}] * bool(piece)
            continue
        expression, equals, result = piece.rpartition("=")
        if not equals:
            expression, result = piece, ""
        parts.append({"type": "python", "text": expression})
        parts += [{"type": "python_output", "text": result}] * bool(equals)
    return parts


def text_of(parts: Sequence[dict[str, str]]) -> str:
    """Return the text of which `parts_of` made the parts."""
    pieces = []
    for part, after in zip(parts, [*parts[1:], {"type": "text"}]):
        text = part["text"]
        if part["type"] == "python":
            text = f"<<{text}=" if after["type"] == "python_output" else f"<<{text}>>"
        pieces.append(f"{text}>>" if part["type"] == "python_output" else text)
    return "".join(pieces)
