"""Slices and mixtures by literal indices, multiple-choice prompts, final answers, and tasks by name."""

import pydoc_data.topics
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from task_rows import ROWS, question, write

from experiments import eval_chat, sft
from nanochat import tasks
from nanochat.config import UserError, override
from nanochat.data import Tokenizer, chat_format, tokenizer
from nanochat.tasks import Task
from nanochat.tasks.task import final_answer, match_any_number, match_final_number


def numbers(name: str, size: int) -> Task:
    """Return a task whose row i asks `<name><i>`."""
    rows = [tasks.qa_conversation(f"{name}{i}", "a") for i in range(size)]
    return Task(name, "generative", size, rows.__getitem__, lambda *_: True)


def questions(task: Task) -> list[str]:
    return [question(task.row(i)) for i in range(task.size)]


@pytest.mark.parametrize(
    "arguments", [(0, None, 1), (2, 5, 1), (1, None, 3), (0, 100, 1), (-2, None, 1), (None, None, -4), (5, 5, 1)]
)
def test_slice_task_follows_python_slices(arguments: tuple[Any, ...]) -> None:
    sliced = tasks.slice_task(numbers("a", 10), *arguments)
    expected = list(range(10))[slice(*arguments)]
    assert questions(sliced) == [f"a{i}" for i in expected]
    assert (sliced.name, sliced.kind, sliced.is_correct is None) == ("a", "generative", False)
    with pytest.raises(IndexError):
        sliced.row(len(expected))
    assert questions(tasks.slice_task(sliced, 1, 4)) == questions(sliced)[1:4]


def test_mixture_is_one_shuffle_of_all_rows() -> None:
    mixed = tasks.mixture([numbers("a", 3), numbers("b", 4)])
    assert questions(mixed) == ["a1", "b0", "b1", "a2", "b3", "a0", "b2"]
    assert (mixed.name, mixed.kind, mixed.size, mixed.is_correct) == ("mixture", "chat", 7, None)
    with pytest.raises(IndexError):
        mixed.row(7)
    parts = [numbers("a", 30), numbers("empty", 0), numbers("b", 11), numbers("c", 1), numbers("b", 11)]
    for seed in (42, 7):
        rows = [f"{part.name}{i}" for part in parts for i in range(part.size)]  # a task listed twice counts twice
        random.Random(seed).shuffle(rows)
        assert questions(tasks.mixture(parts, seed=seed)) == rows
    with pytest.raises(ValueError, match="at least one task"):
        tasks.mixture([])


def test_letter_is_the_same_token_in_prompt_and_answer() -> None:
    trained = tokenizer.train(list(pydoc_data.topics.topics.values()), 965)
    letters = ["A", "B", "C", "D", "E", "1", "2", "3", "4"]
    choices = ["the sun", "42", "x", "an end.", "a (b)", "", "1", "é", "x="]
    ids = tasks.letter_ids(trained, letters)
    assert len(set(ids)) == len(letters) and [trained.decode([i]) for i in ids] == letters
    row = tasks.qa_conversation(tasks.multiple_choice_prompt("Which?", letters, choices), "C")
    tokens, mask = chat_format.render(trained, row)
    supervised = [token for token, weight in zip(tokens, mask) if weight]
    assert supervised == [ids[2], trained.special("<|assistant_end|>")]
    ends = [i for i, token in enumerate(tokens) if trained.decode([token]).endswith("=")]
    assert [tokens[i + 1] for i in ends if tokens[i + 1] in ids] == ids


def test_tokenizer_that_merges_a_letter_with_its_sign_is_refused() -> None:
    single = tuple(bytes([i]) for i in range(256))
    assert tasks.letter_ids(Tokenizer(single), ["A"]) == [65]
    with pytest.raises(UserError, match="letter 'A'"):
        tasks.letter_ids(Tokenizer((*single, b"=A")), ["A"])
    with pytest.raises(UserError, match="letter 'AB'"):
        tasks.letter_ids(Tokenizer(single), ["AB"])


def test_answer_is_correct_by_the_number_after_the_marker() -> None:
    numbers = {"so\n#### 42": "42", "#### -1,234.5 dollars": "-1234.5", "#### 1 then #### 2": "1", "#### 7.": "7."}
    for text, number in (numbers | dict.fromkeys(("####7", "#### $7", "42"))).items():
        assert final_answer(text) == number
    parts = [{"type": "python", "text": "9"}, {"type": "python_output", "text": "#### 9"}]
    row = tasks.qa_conversation("?", [*parts, {"type": "text", "text": "#### 1,000"}])
    assert match_final_number(row, "I say #### 1000") and match_final_number(row, "#### 1,000")
    assert not match_final_number(row, "#### 9") and not match_final_number(row, "1000")
    assert not match_final_number(tasks.qa_conversation("?", "no number"), "no number")


RIGHT = {
    "18": r"18|18.|$18|18.00|18 dollars|**18**|\boxed{18}|\boxed{18} in 3 steps|The answer is 18.|####18|#### $18|18%"
    r"|#### **18**|_18_|36/2|1.8e1|18€|9 + 9 = 18|a:18|18th|18.0000000000000000000|#### 18 cents, 5 left|\$18\)|(18),",
    "1,800": r"1,800|1800|$1,800.00|1.8e3|1{,}800|1\,800|1'800|#### 1,800.",
    "-3": "-3|−3|-$3|$-3|x = -3.0|(-3)",
    "0.75": "3/4|.75|75e-2|0.750",
    "123456789012345678901": "123,456,789,012,345,678,901|the 123456789012345678901.0",
}
WRONG = {
    "18": "|no|180|1.8|18.5|-18|118|1,8|18,00|18/5|1/18|18 and 19|B18|18:30|18.1.1|18e1|#### 19, not 18|18\n#### 19",
    "1,800": "1,80|180|1.800|18,00|1,8000|12,1800|800",
    "4": "3/4|4/0|1.2.4|1,4",
    "3": "-3|5-3=2",
    "123456789012345678901": "123456789012345678902|1.2345678901234568e20",
}


@pytest.mark.parametrize(
    ("number", "answers", "right"), [(*x, True) for x in RIGHT.items()] + [(*x, False) for x in WRONG.items()]
)
def test_lenient_check_reads_the_last_number_in_any_form(number: str, answers: str, right: bool) -> None:
    row = tasks.qa_conversation("?", f"so 5\n#### {number}")
    for answer in answers.split("|"):
        assert match_any_number(row, answer) is right, answer
        assert right or not match_final_number(row, answer)
    assert match_any_number(row, f"#### {number}\nOr 7?") and not match_any_number(row, "9" * 9000)


def test_text_names_a_task_with_split_source_and_options(tmp_path: Path) -> None:
    task = tasks.from_text("arithmetic:test:size=7:digits=1")
    assert (task.name, task.size) == ("arithmetic", 7)
    assert all(len(n) == 1 for i in range(7) for n in re.findall("[0-9]+", question(task.row(i))))
    assert tasks.from_text("arithmetic", "test", size=5).row(3) == tasks.load("arithmetic", "test").row(3)
    assert tasks.from_text("arithmetic:test", "train").row(0) == tasks.load("arithmetic", "test").row(0)
    path = write(tmp_path / "my.jsonl", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert tasks.from_text(f"customjson:{path}").size == 1
    assert tasks.from_text("gsm8k:test", source=ROWS).size == 20


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "path",
    [
        *("talks 2025-03-01 10:30/talks.jsonl", "C:/talks.jsonl", "notes:v2.jsonl", "a::b.jsonl", "10:30/v:2.json"),
        *("run=3/t.jsonl", "t:size=3.jsonl", "[draft] (1)/t[0].jsonl", "x,y/t, u.jsonl", "test/2*x.jsonl"),
    ],
)
def test_path_may_have_any_characters(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / path, *[TALK] * 5)
    assert tasks.from_text(f"customjson:{path}").size == tasks.from_text(f"customjson:{tmp_path / path}").size == 5
    assert tasks.from_text(f"customjson:train:./{path}:stop=2").size == 2
    setting = f"tasks=2*customjson:{path}:start=1,arithmetic:size=3".replace(path, path.replace(",", r"\,"))
    config = override(sft.Config(), [setting])
    assert sft.mix(config.tasks, None).size == 11
    assert eval_chat.result_name(f"customjson:{path}:start=1") == "customjson:start=1"


def test_relative_parquet_path_with_a_colon_is_not_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gs:m" / "rows.parquet", {"question": "q", "answer": "#### 1"})
    assert tasks.from_text("gsm8k:test:gs:m/rows.parquet").size == 1


def test_every_task_can_be_cut(tmp_path: Path) -> None:
    for name in ("gsm8k", "spellingbee", "arithmetic"):
        every, part = (tasks.from_text(f"{name}:test{cut}", source=ROWS) for cut in ("", ":start=3:stop=9"))
        assert (part.name, part.size) == (name, 6) and part.is_correct
        assert questions(part) == questions(tasks.slice_task(every, 3, 9))
    assert tasks.load("gsm8k", "test", source=ROWS, start=-4).size == 4
    assert tasks.load("gsm8k", "test", source=ROWS, stop=5200).size == 20


def test_misspelled_task_is_noticed_before_the_first_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "from_text", lambda *_, **__: pytest.fail("a task was loaded"))
    for second, message in (("gms8k", "did you mean gsm8k"), ("y/t.jsonl", r"a comma within a path is written \,")):
        with pytest.raises(UserError, match=re.escape(message)):
            sft.mix(("customjson:x", second), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arithmetic:start=20000", "start=20000, stop=None: contains none of the 20,000 rows"),
        ("arithmetic:test-2", "task arithmetic has no split test-2"),
        ("arithmetik", "'arithmetik': no such task; did you mean arithmetic?"),
        ("", "'': no such task; there are: arc_challenge"),
        ("arithmetic:sise=3", "task arithmetic has no option sise; did you mean size?"),
        ("arithmetic:size=many", "task arithmetic:size=many: size=many: expected an integer or none"),
        ("arithmetic:size=0", "size=0: expected 1 to 10,000,000"),
        ("arithmetic:digits=0", "digits=0, product_digits=2: expected 1 or more"),
        ("arithmetic:validation", "task arithmetic has no split validation; it has train and test"),
        ("humaneval:train", "task humaneval has no split train, only test"),
        ("customjson", "task customjson needs a file of conversations"),
        ("customjson:test:/x.jsonl", "a file is all train"),
        ("customjson:/no/such.jsonl", "No such file or directory"),
        ("gsm8k:/no/such", "source=/no/such: no such file or folder"),
    ],
)
def test_load_error_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        tasks.from_text(text)
    assert "\n" not in str(caught.value)


def test_listing_tasks_imports_neither_datasets_nor_torch() -> None:
    code = "import sys; from nanochat import tasks; print(all(map(tasks.about, tasks.names())), *sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], stdout=-1, check=True, cwd=Path(__file__).parents[2]).stdout
    assert output.startswith(b"True") and not {b"datasets", b"torch"} & set(output.split())
