"""MMLU: exams of 57 subjects, as multiple choice with four choices.

Source: https://huggingface.co/datasets/cais/mmlu, arXiv 2009.03300.
"""

from pathlib import Path

from nanochat.data import Conversation
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task, multiple_choice, qa_conversation

LETTERS = ("A", "B", "C", "D")
COLUMNS = {"question": str, "choices": list, "answer": int}


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task.

    Args:
        split: train, which the data set calls auxiliary_train, or test, validation, dev.
        source: files to read instead of the hub.

    Raises:
        UserError: the data cannot be had, or is not of the right form.
    """
    split = "auxiliary_train" if split == "train" else split
    table = hub_table.read(hub_table.Source("mmlu", "cais/mmlu", "all", "all", split, COLUMNS), source)
    return Task("mmlu", "choice", len(table), lambda index: _row(table, index), baseline=0.25)


def _row(table: hub_table.Table, index: int) -> Conversation:
    row = table[index]
    if len(row["choices"]) != len(LETTERS) or not 0 <= row["answer"] < len(LETTERS):
        raise table.bad(index, f"expected four choices and an answer of 0 to 3, got answer {row['answer']}")
    asked = multiple_choice(row["question"], LETTERS, row["choices"])
    return {
        **qa_conversation(asked, LETTERS[row["answer"]]),
        "letters": list(LETTERS),
        "subject": row.get("subject", ""),
    }
