"""Conversation tasks: the identity set that ships, files of your own, and SmolTalk."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from task_rows import ROWS, TOKENIZER, question, write

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import chat_format


def test_shipped_identity_conversations() -> None:
    every, train, test = (tasks.load("identity", split) for split in ("all", "train", "test"))
    rows = [every.row(i) for i in range(every.size)]
    assert every.size > 100 and train.size + test.size == every.size and test.size == every.size // 10
    splits = [{json.dumps(task.row(i)) for i in range(task.size)} for task in (train, test)]
    assert not splits[0] & splits[1]
    for row in rows:
        ids, mask = chat_format.render(TOKENIZER, row)
        assert sum(mask) > 1 and len(ids) < 500
    assert tasks.load("identity", source=ROWS).size == train.size  # a folder of other tasks


def test_identity_from_a_file(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(20)]
    path = write(tmp_path / "identity.jsonl", *talk)
    for source in (path, tmp_path):
        assert tasks.load("identity", source=source).size == 18
        test = tasks.load("identity", "test", source=source)
        assert sorted(question(test.row(i)) for i in range(test.size)) == ["q19", "q9"]
    write(path, *talk[:3])
    with pytest.raises(UserError, match="too few conversations for a test split"):
        tasks.load("identity", "test", source=path)


def test_customjson_is_shuffled_with_the_seed(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] for i in range(10)]
    path = write(tmp_path / "my.jsonl", *talk[:9], {"messages": talk[9]})
    task = tasks.load("customjson", source=path)
    assert [question(task.row(i)) for i in range(10)] == ["5", "6", "0", "7", "3", "2", "4", "9", "1", "8"]
    assert (task.kind, task.size, task.is_correct) == ("chat", 10, None)


USER, BOT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[{"role": "user"', "not valid JSON"),
        ("42", "expected a conversation"),
        (f"[{USER}]", "the last message must be the assistant's"),
        (f"[{BOT}, {USER}]", "message 1: role 'assistant', expected user"),
        (USER, "this is a single message"),
        ('{"text": "q"}', "this is plain text"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "this is preference data"),
        ('{"prompt": "q", "completion": "a", "label": false}', "this is preference data"),
        ('{"instruction": "q", "output": "a", "history": [["b", "c"]]}', "history is not supported"),
        ('{"question": "q", "answer": "a", "output": "b"}', "has the keys question, answer, output; expected messages"),
        ('{"conversations": "[]"}', "conversations: expected an array of messages, got '[]'"),
        (f'{{"messages": [{USER}, {BOT}], "images": ["a.png"]}}', "images is not supported"),
    ],
)
def test_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(f"[{USER}, {BOT}]\n\n{line}\n")
    with pytest.raises(UserError, match=f"my.jsonl: (row|line) 3.*{re.escape(message)}"):
        tasks.load("customjson", source=path)
    path.write_text(f"[{USER}]\n[{USER}, {BOT}]\n" + f"{BOT}\n" * 5)
    with pytest.raises(UserError, match=r"row 1: the last .* \(and 5 more rows are invalid\)"):
        tasks.load("customjson", source=path)
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no conversations"):
        tasks.load("customjson", source=path)


def texts(task: tasks.Task, index: int = 0) -> list[tuple[str, str, bool]]:
    turns = chat_format.normalize(task.row(index))
    return [(turn.side, text, supervised) for turn in turns for _, text, supervised in turn.parts]


QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"messages": QA}, "q"),
        ({"conversations": SHAREGPT}, "q"),
        ({"conversation": QA, "system": "s"}, "s\n\nq"),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT], "tools": None}, "s\n\nq"),
        ({"instruction": "q", "input": "", "output": "a"}, "q"),
        ({"instruction": "q", "input": "i", "output": "a", "history": []}, "q\n\ni"),
        ({"instruction": "q", "context": "c", "response": "a"}, "q\n\nc"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "s\n\nq"),
        ({"prompt": QA[:1], "completion": QA[1:]}, "q"),
    ],
)
def test_formats_of_rows(row: dict[str, Any], question: str, tmp_path: Path) -> None:
    expected = [("user", question, False), ("assistant", "a", True)]
    for kind in ("jsonl", "parquet"):
        task = tasks.load("customjson", source=write(tmp_path / f"my.{kind}", row, row))
        assert task.size == 2 and texts(task) == expected, kind


@pytest.mark.parametrize(
    ("value", "size"), [(QA, 1), ([QA], 1), ([QA, QA], 2), ([SHAREGPT, QA], 2), ({"messages": QA}, 1)]
)
def test_file_of_one_json_value(value: Any, size: int, tmp_path: Path) -> None:
    for indent in (None, 2):
        (tmp_path / "my.json").write_text(json.dumps(value, indent=indent))
        assert tasks.load("customjson", source=tmp_path / "my.json").size == size


def test_switches_of_a_file_are_honored(tmp_path: Path) -> None:
    sharegpt = [SHAREGPT[0], SHAREGPT[1] | {"weight": 0}, *SHAREGPT]
    completion = {"prompt": [*QA, QA[0]], "completion": "b"}
    path = write(tmp_path / "my.jsonl", {"conversations": sharegpt}, {"messages": QA, "train": False}, completion)
    task = tasks.load("customjson", source=path)
    supervised = sorted([part[2] for part in texts(task, i) if part[0] == "assistant"] for i in range(3))
    assert supervised == [[False], [False, True], [False, True]]


def test_ignored_keys_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{"messages": QA, "id": i, "tools": []} for i in range(3)]
    part = {"type": "text", "text": "q", "cache_control": {}, "image_url": None, "lang": "en"}
    rows[0]["messages"] = [{"role": "user", "content": [part], "name": "Bob", "tool_calls": None}, QA[1]]
    path = write(tmp_path / "my.jsonl", *rows)
    tasks.load("customjson", source=path)
    keys = "id (in 3 of 3 rows), lang (in 1 of 3 rows), name (in 1 of 3 rows)"
    assert capsys.readouterr().out == f"warning: {path}: ignored keys: {keys}\n"


def test_smoltalk_rows(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", {"messages": talk, "source": "x"})
    task = tasks.load("smoltalk", source=tmp_path)
    assert [task.row(i) for i in range(task.size)] == [{"messages": talk}] * 2
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"messages": talk[:1], "source": "x"})
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet, row 1: .*no user message"):
        tasks.load("smoltalk", "test", source=tmp_path).row(0)
