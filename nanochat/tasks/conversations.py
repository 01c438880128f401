"""Conversations to train on: SmolTalk (arXiv 2502.02737), files of your own, and the assistant's identity.

A row of a conversation file is one of

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]      or {"messages": [...]} (OpenAI)
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}                 (ShareGPT)
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}                                        (Alpaca)
    {"prompt": "Hi", "completion": "Hello!"}               or two lists of messages; question and answer, and so on

with "system", a system message, if it is not among the messages. What the messages mean is in `data.chat_format`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat import jsonl
from nanochat.config import UserError
from nanochat.data import Conversation, chat_format
from nanochat.tasks.hub_table import HubTable, hub_task, shuffled_indices
from nanochat.tasks.task import Task, data_file

SMOLTALK = HubTable("HuggingFaceTB/smol-smoltalk", None, "data", {"messages": list})
DIALOGS = ("messages", "conversations", "conversation")
QUESTIONS, CONTEXTS = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERS = ("output", "completion", "response", "answer")
SYSTEMS = ("system", "system_prompt")
OTHER_FORMATS = {
    "chosen": "preference data: keep the better answer as messages",
    "role": "a single message: put all messages of a conversation into one array",
    "from": "a single message: put all messages of a conversation into one array",
    "label": "preference data: keep the good answers, without the label",
    "text": "plain text, for pretraining: split it into messages",
}
TEST_FRACTION = 10  # every tenth identity conversation is in the test split


def smoltalk(split: str = "train", *, source: str | Path | None = None) -> Task:
    """SmolTalk: 460,000 conversations on many topics, in the edition for small models."""

    reported: set[str] = set()

    def conversation(row: dict[str, Any]) -> Conversation:
        made, unused = from_row({**row, "source": None})
        if new := unused - reported:
            reported.update(new)
            print(f"warning: smoltalk: keys without effect: {', '.join(sorted(new))}", flush=True)
        return made

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
    unused: Counter[str] = Counter()
    for number, value in jsonl.read(path):
        try:
            row, keys = from_row(value)
            if chat_format.SIDES[row["messages"][-1]["role"].lower()] != "assistant":
                raise UserError("the last message must be the assistant's")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        rows.append(row)
        unused.update(keys)
    if not rows:
        raise UserError(f"{path}: contains no conversations")
    if unused:
        counts = ", ".join(f"{key} ({count:,} rows)" for key, count in sorted(unused.items()))
        print(f"warning: {path}: keys without effect: {counts}", flush=True)
    return rows


def from_row(row: Any) -> tuple[Conversation, set[str]]:
    """Return a row's conversation, and the keys that have no effect. Raises UserError for another format."""
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, dict):
        raise UserError(f"expected a conversation, an array of messages or an object, got {str(row)[:40]!r}")
    row = {key: value for key, value in row.items() if value is not None}
    dialogs, answers = [key for key in DIALOGS if key in row], [key for key in ANSWERS if key in row]
    contexts, systems = [key for key in CONTEXTS if row.get(key)], [key for key in SYSTEMS if row.get(key)]
    questions = [key for key in QUESTIONS if key in row] or [key for key in contexts if key == "input"]
    if dialogs:
        used, messages = dialogs[:1], row[dialogs[0]]
        if not isinstance(messages, list):
            raise UserError(f"{dialogs[0]} is {str(messages)[:40]!r}, expected an array of messages")
        messages = _messages(messages)
    elif len(questions) == len(answers) == 1 and not isinstance(row.get("label"), bool):
        used = list(dict.fromkeys([*questions, *contexts, *answers]))
        messages = [message for key in used[:-1] for message in _messages(_wrapped(row[key], "user"))]
        messages = [
            {"weight": 0} | m if isinstance(m, dict) else m for m in messages
        ]  # the completion is to be learned
        messages += _messages(_wrapped(row[answers[0]], "assistant"))
    else:
        known = [f"this is {name}" for key, name in OTHER_FORMATS.items() if key in row]
        expected = "messages, conversations (ShareGPT), instruction and output (Alpaca), or prompt and completion"
        raise UserError([*known, f"the row has the keys {', '.join(row)[:80]}; expected {expected}"][0])
    used += systems[:1]
    messages = [*({"role": "system", "content": row[key]} for key in systems[:1]), *messages]
    kept = (*chat_format.SWITCHES, *chat_format.UNSUPPORTED)
    made = {"messages": messages} | {key: row[key] for key in kept if key in row}
    chat_format.normalize(made)
    unused = {k for k, value in row.items() if k not in (*used, *kept) and value not in chat_format.EMPTY}
    return made, unused | chat_format.unused_keys(made)


def _wrapped(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _messages(values: list[Any]) -> list[Any]:
    """Return messages with ShareGPT's keys renamed to OpenAI's."""
    names = {"from": "role", "value": "content"}
    return [
        {names.get(key, key): x for key, x in value.items()}
        if isinstance(value, dict) and "role" not in value
        else value
        for value in values
    ]
