"""Arithmetic and spelling: rows, correct answers, disjoint splits, and the words to spell."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from task_rows import question, reference

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.infer import tool_use
from nanochat.tasks import Task, arithmetic, plain_text, spelling


def operands(row: Conversation) -> tuple[str, str, str]:
    call = next(part["text"] for part in reference(row) if part["type"] == "python")
    match = re.fullmatch(r"([0-9]+)([-+*])([0-9]+)", call)
    assert match, call
    return match[1], match[2], match[3]


def rows(task: Task) -> list[Conversation]:
    return [task.row(index) for index in range(task.size)]


def test_rows_are_pinned_by_their_seeds() -> None:
    row = tasks.load("arithmetic").row(1)
    assert question(row) == "Compute the sum of 361 and 1"
    assert reference(row) == [
        {"type": "text", "text": "Let me calculate: "},
        {"type": "python", "text": "361+1"},
        {"type": "python_output", "text": "362"},
        {"type": "text", "text": "\n\n#### 362"},
    ]
    assert spelling.counting_answer("robot", "o") == [
        {"type": "text", "text": "robot:r,o,b,o,t\n\nCounting o:\nr 0\no 1\nb 1\no 2\nt 2\nCheck: "},
        {"type": "python", "text": "'robot'.count('o')"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "\n\n#### 2"},
    ]
    for name, *first_questions in [
        ("arithmetic", "43 minus 8 = ?", "How much is 44 minus 875?"),
        ("spellingbee", """How many "e"s are in 'prefixed'?""", "How many t are in operator?"),
        ("simplespelling", "Spell the word: prefixed", "Spell the word: operator"),
    ]:
        assert [question(tasks.load(name, split).row(0)) for split in ("train", "test")] == first_questions
    few, many = tasks.load("spellingbee", size=10), tasks.load("spellingbee")
    assert [few.row(i) for i in reversed(range(10))] == [many.row(i) for i in range(10)][::-1]
    with pytest.raises(IndexError):
        few.row(10)


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_answers_are_correct_and_copy_the_operands(split: str) -> None:
    task = tasks.load("arithmetic", split, size=600, digits=6, product_digits=4)
    operations: Counter[str] = Counter()
    lengths: dict[str, set[int]] = {"+": set(), "-": set(), "*": set()}
    for row in rows(task):
        a, operation, b = operands(row)
        operations[operation] += 1
        lengths[operation] |= {len(a), len(b)}
        assert re.findall("[0-9]+", question(row)) == [a, b]
        _, call, output, final = (part["text"] for part in reference(row))
        assert tool_use.calculate(call) == output and final == f"\n\n#### {output}"
        assert task.is_correct and task.is_correct(row, plain_text(reference(row)))
        assert not task.is_correct(row, f"#### {output}1") and not task.is_correct(row, output)
    assert min(operations.values()) > 150
    assert lengths == {"+": {1, 2, 3, 4, 5, 6}, "-": {1, 2, 3, 4, 5, 6}, "*": {1, 2, 3, 4}}


def test_arithmetic_splits_share_no_operands() -> None:
    train, test = (
        {frozenset(operands(row)[::2]) for row in rows(tasks.load("arithmetic", split, size=4000))}
        for split in ("train", "test")
    )
    assert len(train) > 1500 and len(test) > 1000 and not train & test
    fraction = sum(arithmetic.is_test_pair(a, b) for a in range(100) for b in range(100)) / 100**2
    assert math.isclose(fraction, 1 / 8, abs_tol=0.01)


def test_identity_sums_look_like_arithmetic_and_are_not_test_problems() -> None:
    with_tools = [row for row in rows(tasks.load("identity", "all")) if isinstance(reference(row), list)]
    assert len(with_tools) == 3
    for row in with_tools:
        a, _, b = operands(row)
        assert not arithmetic.is_test_pair(int(a), int(b))
        lead, call, output, final = (part["text"] for part in reference(row))
        assert (lead, final) == ("Let me calculate: ", f"\n\n#### {tool_use.calculate(call)}") and output in final


@pytest.mark.parametrize("split", ["train", "test"])
def test_spelling_answers_are_correct(split: str) -> None:
    task, phrasings = tasks.load("spellingbee", split, size=300), set()
    for row in rows(task):
        _, call, output, _ = (part["text"] for part in reference(row))
        word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", call).groups()  # type: ignore[union-attr]
        assert tool_use.calculate(call) == output == str(word.count(letter))
        assert word in question(row) and letter in question(row)
        assert task.is_correct and task.is_correct(row, plain_text(reference(row)))
        assert not task.is_correct(row, "#### 99")
        phrasings.add(question(row).replace(word, "W"))
    assert len(phrasings) > 150
    task = tasks.load("simplespelling", split, size=100)
    for row in rows(task):
        word = question(row).removeprefix("Spell the word: ")
        assert reference(row) == f"{word}:{','.join(word)}"
        assert task.is_correct and task.is_correct(row, f" {reference(row)}\n")
        assert not task.is_correct(row, reference(row)[:-1])


def test_words_from_a_file(tmp_path: Path) -> None:
    shipped = spelling.load_words(None)
    assert all(re.fullmatch("[a-z]{3,17}", word) for word in shipped) and 3000 < len(shipped) == len(set(shipped))
    path = tmp_path / "list.txt"
    path.write_text("añil\n\n  zorro \n", "utf-8")
    task = tasks.load("simplespelling", source=path, size=30)
    assert {question(row) for row in rows(task)} == {"Spell the word: añil", "Spell the word: zorro"}
    assert spelling.load_words(tmp_path) == shipped  # a folder of other tasks
    path.rename(tmp_path / "words.txt")
    assert spelling.load_words(tmp_path) == ("añil", "zorro")
    for text, message in (("ok\ntwo words\n", "list.txt line 2: expected one word"), ("\n", "contains no words")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            spelling.load_words(path)
