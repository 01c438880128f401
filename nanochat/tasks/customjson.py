"""CustomJSON: conversations of your own, a jsonl file with an array of messages on each line.

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! What can I do for you?"}]

An object {"messages": […]} is as good as the array, and messages may be all that `nanochat.conversation` can render.
"""

import json
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.data import Conversation, chat_format
from nanochat.tasks import hub_table
from nanochat.tasks.task import Task


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task.

    Args:
        split: train; a file has no other. source: the file.

    Raises:
        UserError: no file is given, it cannot be read, or a line is no conversation with an answer (says which line).
    """
    if source is None:
        raise UserError("task customjson needs a file of conversations: customjson:/path/file.jsonl")
    if split != "train":
        raise UserError(f"task customjson has no split {split}: a file is all train; take another file for {split}")
    found = read(Path(source).expanduser())
    order = hub_table.order(len(found))
    return Task("customjson", "chat", len(found), lambda index: found[order[index]])


def read(path: Path) -> list[Conversation]:
    """Return the conversations of a file, in its order.

    Raises:
        UserError: as for `load`.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"source={path}: cannot be read ({error.strerror or error})") from None
    found = [_conversation(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"source={path}: has no conversation in it")
    return found


def _conversation(path: Path, number: int, line: bytes) -> Conversation:
    where = f"source={path} line {number}"
    try:
        value: Any = json.loads(line)
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise UserError(f"{where}: is no JSON ({error})") from None
    if isinstance(value, list):
        value = {"messages": value}
    try:
        chat_format.check(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if value["messages"][-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is not the assistant's, so there is no answer to learn")
    return value
