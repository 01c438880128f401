"""Conversations to train on: SmolTalk (arXiv 2502.02737), files of your own, and the assistant's identity.

A row of a conversation file (.jsonl, .json, .parquet, .csv; compressed as well) is one of

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]      or {"messages": [...]} (OpenAI)
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}                 (ShareGPT)
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}                                        (Alpaca)
    {"prompt": "Hi", "completion": "Hello!"}               or two lists of messages; question and answer, and so on

with "system", a system message, if it is not among the messages. What the messages mean is in `data.chat_format`.
A row of preferences is {"prompt" or "messages": …, "chosen": …, "rejected": …}, each a text or messages; chosen and
rejected may repeat the prompt's messages, which then need no key of their own.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.data import Conversation, chat_format, records
from nanochat.tasks.hub_table import HubTable, hub_task, shuffled_indices
from nanochat.tasks.task import Task, data_file

SMOLTALK = HubTable("HuggingFaceTB/smol-smoltalk", None, "data", {"messages": list})
ULTRAFEEDBACK = HubTable("HuggingFaceH4/ultrafeedback_binarized", None, "data", {"chosen": list, "rejected": list})
Preference = Mapping[str, Any]  # "prompt", "chosen" and "rejected": lists of messages
DIALOGS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "response", "answer")
# Keys of rows that are one message -> its role, in the order of the messages.
TEXT_ROLES: dict[str, str] = dict.fromkeys(("system", "system_prompt"), "system")
TEXT_ROLES |= dict.fromkeys((*QUESTIONS, "input", "context"), "user") | dict.fromkeys(ANSWERS, "assistant")
OTHER_FORMATS = {
    "role": "a single message: put all messages of a conversation into one array",
    "from": "a single message: put all messages of a conversation into one array",
    "chosen": "preference data: train on it with --experiment=dpo, or keep the better answer as messages",
    "label": "preference data: keep the good answers, without the label",
    "text": "plain text, for pretraining: split it into messages",
}
TEST_FRACTION = 10  # every tenth identity conversation is in the test split


def smoltalk(split: str = "train", *, source: str | Path | None = None) -> Task:
    """SmolTalk: 460,000 conversations on many topics, in the edition for small models."""

    def conversation(row: dict[str, Any]) -> Conversation:
        made, unused = from_row({**row, "source": None})
        for key in unused:
            _warn(f"warning: smoltalk: ignored key: {key}")
        return made

    return hub_task("smoltalk", "chat", SMOLTALK, conversation, split, source)


def customjson(split: str = "train", *, source: str | Path | None = None) -> Task:
    """CustomJSON: your own conversations, a file of JSON, parquet or CSV."""
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
    unused: Counter[str] = Counter()

    def conversation(value: Any) -> Conversation:
        row, keys = from_row(value)
        if row["messages"][-1]["role"] != "assistant":
            raise UserError("the last message must be the assistant's")
        unused.update(keys)
        return row

    rows = _read(path, conversation, "conversations")
    if unused:
        counts = ", ".join(f"{key} (in {count:,} of {len(rows):,} rows)" for key, count in sorted(unused.items()))
        _warn(f"warning: {path}: ignored keys: {counts}")
    return rows


def read_preferences(path: Path) -> list[Preference]:
    """Return the pairs of answers in a file, in its order."""
    return _read(path, preference_from_row, "pairs of answers")


def _read(path: Path, make: Callable[[Any], Any], what: str) -> list[Any]:
    rows: list[Any] = []
    invalid: list[str] = []
    for number, value in records.read(path, is_row=_has_messages):
        try:
            rows.append(make(value))
        except UserError as error:
            invalid.append(f"{path}: row {number}: {error}")
    if invalid:
        raise UserError(invalid[0] + (f" (and {len(invalid) - 1:,} more rows are invalid)" if invalid[1:] else ""))
    if not rows:
        raise UserError(f"{path}: contains no {what}")
    return rows


def ultrafeedback(split: str, source: str | Path | None = None) -> Task:
    """UltraFeedback: 61,000 pairs of answers to prompts of many kinds; the splits are train_prefs and test_prefs."""
    return hub_task("ultrafeedback", "chat", ULTRAFEEDBACK, preference_from_row, split, source)


def preference_from_row(row: Any) -> Preference:
    """Return a row's prompt and answers as messages. Raises UserError for another format."""
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        keys = f"the row has the keys {', '.join(row)[:80]}; " if isinstance(row, dict) else ""
        raise UserError(f"{keys}expected prompt or messages, chosen and rejected")
    chosen, rejected = (
        _messages([row[key]] if isinstance(row[key], dict) else row[key], key, "assistant")
        for key in ("chosen", "rejected")
    )
    if chosen[:1] and chosen[0].get("role") != "assistant":  # both repeat the prompt
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        key = next((key for key in ("prompt", *DIALOGS) if row.get(key)), None)
        if key is None:
            raise UserError("no prompt: expected prompt or messages beside chosen and rejected")
        system = [message for k in ("system", "system_prompt") if row.get(k) for message in _messages(row[k], k)]
        prompt = [*system, *_messages(row[key], key, "user")]
    for key, answer in {"chosen": chosen, "rejected": rejected}.items():
        if not answer or answer[-1].get("role") != "assistant":
            raise UserError(f"{key}: the last message must be the assistant's")
        chat_format.normalize({"messages": [*prompt, *answer]})
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def from_row(row: Any) -> tuple[Conversation, set[str]]:
    """Return a row's conversation, and the keys that are ignored. Raises UserError for another format."""
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, dict):
        raise UserError(f"expected a conversation, an array of messages or an object, got {str(row)[:40]!r}")
    row = {key: value for key, value in row.items() if value not in chat_format.EMPTY or key in (*DIALOGS, *ANSWERS)}
    texts = [key for key in TEXT_ROLES if key in row]
    numbers = [sum(key in names for key in texts) for names in (QUESTIONS, ANSWERS)]
    if dialog := next((key for key in DIALOGS if key in row), None):
        used = [*(key for key in texts if TEXT_ROLES[key] == "system"), dialog]
    elif numbers in ([1, 1], [0, 1]) and len(texts) > 1 and not isinstance(row.get("label"), bool):
        used = texts
    else:
        known = [f"this is {name}" for key, name in OTHER_FORMATS.items() if key in row]
        expected = "messages, conversations (ShareGPT), instruction and output (Alpaca), or prompt and completion"
        raise UserError([*known, f"the row has the keys {', '.join(row)[:80]}; expected {expected}"][0])
    made = {key: row[key] for key in (*chat_format.SWITCHES, *chat_format.UNSUPPORTED) if key in row}
    made["messages"] = [message for key in used for message in _messages(row[key], key)]
    chat_format.normalize(made)
    return made, chat_format.unused_keys(made) | (row.keys() - {*used, *made, "metadata"})


def _messages(value: Any, key: str, role: str | None = None) -> list[Any]:
    """Return a text as a message, or an array of messages with ShareGPT's names replaced by OpenAI's."""
    if (key in TEXT_ROLES and not isinstance(value, list)) or (role and isinstance(value, str)):
        return [{"role": role or TEXT_ROLES[key], "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{key}: expected an array of messages, got {str(value)[:40]!r}")
    names = {"from": "role", "value": "content"}
    before: dict[str, Any] = {} if role or key in (*DIALOGS, *ANSWERS) else {"weight": 0}  # of a prompt: given
    messages = [before | {names.get(name, name): x for name, x in message.items()} for message in value]
    roles = [message.get("role") for message in messages]
    return [m | {"role": chat_format.ROLES.get(str(role).lower(), role)} for m, role in zip(messages, roles)]


def _has_messages(rows: list[Any]) -> bool:
    return any(isinstance(row, dict) and {"role", "from"} & row.keys() for row in rows)


@functools.cache
def _warn(text: str) -> None:
    print(text, flush=True)
