"""Conversations to train on: SmolTalk (arXiv 2502.02737), files of your own, and the assistant's identity.

A conversation file has one conversation a line: a JSON array of messages, or an object {"messages": [...]}.

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! What can I do for you?"}]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat import jsonl
from nanochat.config import UserError
from nanochat.data import Conversation, chat_format
from nanochat.tasks.hub_table import HubTable, hub_task, shuffled_indices
from nanochat.tasks.task import Task, data_file

SMOLTALK = HubTable("HuggingFaceTB/smol-smoltalk", None, "data", {"messages": list})
TEST_FRACTION = 10  # every tenth identity conversation is in the test split


def smoltalk(split: str = "train", *, source: str | Path | None = None) -> Task:
    """SmolTalk: 460,000 conversations on many topics, in the edition for small models."""

    def conversation(row: dict[str, Any]) -> Conversation:
        chat_format.check(row)
        return {"messages": row["messages"]}

    return hub_task("smoltalk", "chat", SMOLTALK, conversation, split, source)


def customjson(split: str = "train", *, source: str | Path | None = None) -> Task:
    """CustomJSON: your own conversations, a jsonl file with an array of messages on each line."""
    if source is None:
        raise UserError("task customjson needs a file of conversations: customjson:/path/file.jsonl")
    if split != "train":
        raise UserError(f"task customjson has no split {split}: a file is all train; use another file for {split}")
    return _shuffled("customjson", read_conversations(Path(source).expanduser()))


def identity(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Identity: conversations about who the assistant is and what it can do; a small set ships with the package.

    Args:
        split: train, test (every tenth line), or all.
        source: a conversation file, for example from `--experiment=synthesize`, or a folder with identity.jsonl. None,
            or a folder without it: the set that ships with the package.
    """
    if split not in ("train", "test", "all"):
        raise UserError(f"task identity has no split {split}; it has train, test and all")
    path = data_file("identity.jsonl", source)
    rows = read_conversations(path)
    if split == "test":
        rows = rows[TEST_FRACTION - 1 :: TEST_FRACTION]
    elif split == "train":
        rows = [row for number, row in enumerate(rows, start=1) if number % TEST_FRACTION]
    if not rows:
        raise UserError(f"{path}: has too few conversations for a test split: it needs {TEST_FRACTION}")
    return _shuffled("identity", rows)


def _shuffled(name: str, rows: Sequence[Conversation]) -> Task:
    order = shuffled_indices(len(rows))
    return Task(name, "chat", len(rows), lambda index: rows[order[index]])


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file, in its order; each has to end with an answer."""
    rows: list[Conversation] = []
    for number, value in jsonl.read(path):
        row = {"messages": value} if isinstance(value, list) else value
        try:
            chat_format.check(row)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if row["messages"][-1]["role"] != "assistant":
            raise UserError(f"{path}:{number}: the last message must be the assistant's")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: contains no conversations")
    return rows
