"""Conversation tasks: the identity set that ships, files of your own, and SmolTalk."""

import json
import re
from pathlib import Path

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
        (f"[{USER}, {USER}]", "message 2: role 'user', expected assistant"),
    ],
)
def test_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(f"[{USER}, {BOT}]\n\n{line}\n")
    with pytest.raises(UserError, match=f"my.jsonl:3: .*{re.escape(message)}"):
        tasks.load("customjson", source=path)
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no conversations"):
        tasks.load("customjson", source=path)


def test_smoltalk_rows(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", {"messages": talk, "source": "x"})
    task = tasks.load("smoltalk", source=tmp_path)
    assert [task.row(i) for i in range(task.size)] == [{"messages": talk}] * 2
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"messages": talk[:1], "source": "x"})
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet, row 0 \(counted from 0\): .*no user message"):
        tasks.load("smoltalk", "test", source=tmp_path).row(0)
