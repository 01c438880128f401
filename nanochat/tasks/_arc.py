"""ARC: school exams in science, as multiple choice; ARC-Easy and ARC-Challenge are two sets of one form.

Source: https://huggingface.co/datasets/allenai/ai2_arc, arXiv 1803.05457.
"""

from pathlib import Path
from typing import Any

from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task, multiple_choice, qa_conversation

COLUMNS = {"question": str, "choices": dict, "answerKey": str}


def load(name: str, subset: str, split: str, source: str | Path | None) -> Task:
    """Return one of the two sets; its own splits are train, validation and test.

    Raises:
        UserError: the data cannot be had, or is not of the right form.
    """
    table = hub_table.read(hub_table.Source(name, "allenai/ai2_arc", subset, subset, split, COLUMNS), source)
    return Task(name, "choice", len(table), lambda index: _row(table, index), baseline=0.25)


def _row(table: hub_table.Table, index: int) -> Conversation:
    row: dict[str, Any] = table[index]
    letters, texts, answer = row["choices"].get("label"), row["choices"].get("text"), row["answerKey"]
    if not letters or not texts or len(letters) != len(texts):
        raise table.bad(index, "choices: expected as many texts as labels, and one at least")
    if answer not in letters:
        raise table.bad(index, f"answerKey {answer!r} is none of the labels {', '.join(letters)}")
    return {**qa_conversation(multiple_choice(row["question"], letters, texts), answer), "letters": list(letters)}
