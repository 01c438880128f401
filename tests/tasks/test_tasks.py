"""The tasks: rows against literals, what is right, sources on disk and out of reach, and the viewer."""

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import tasks as viewer
from nanochat import distributed, tasks
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, tokenizer
from nanochat.infer import tool_use
from nanochat.sandbox import bubblewrap
from nanochat.tasks import (
    Task,
    _generated,
    arithmetic,
    customjson,
    gsm8k,
    hub_table,
    humaneval,
    plain_text,
    spellingbee,
)

DATA = Path(__file__).parents[1] / "data"
ROWS = DATA / "tasks"
REAL = Path(__file__).parents[3] / "shared" / "task_data"
TOK = Tokenizer(tuple(bytes([i]) for i in range(256)))


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def question(row: chat_format.Conversation) -> str:
    return row["messages"][0]["content"]


def reference(row: chat_format.Conversation) -> Any:
    return row["messages"][-1]["content"]


def write(path: Path, *rows: Any) -> Path:
    """Write rows as jsonl or parquet, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(name: str, split: str, **options: Any) -> Task:
    return tasks.load(name, split, **options)


# ---------------------------------------------------------------------------------------------------------------
# Names and settings


def test_tasks_are_found_by_their_files() -> None:
    listed = "arc_challenge arc_easy arithmetic customjson gsm8k humaneval identity mmlu simplespelling smoltalk"
    assert tasks.names() == [*listed.split(), "spellingbee"]
    assert all(tasks.about(name) for name in tasks.names())


def test_a_setting_names_a_task_with_split_source_and_options(tmp_path: Path) -> None:
    made = tasks.from_text("arithmetic:test:size=7:digits=1")
    assert (made.name, made.size) == ("arithmetic", 7)
    assert all(len(n) == 1 for i in range(7) for n in re.findall("[0-9]+", question(made.row(i))))
    assert tasks.from_text("arithmetic", "test", size=5).row(3) == tasks.load("arithmetic", "test").row(3)
    assert tasks.from_text("arithmetic:test", "train").row(0) == tasks.load("arithmetic", "test").row(0)
    path = write(tmp_path / "my.jsonl", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert tasks.from_text(f"customjson:{path}").size == 1
    assert tasks.from_text("gsm8k:test", source=ROWS).size == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arithmetik", "'arithmetik': no such task; did you mean arithmetic?"),
        ("_table", "'_table': no such task"),
        ("", "'': no such task; there are: arc_challenge"),
        ("arithmetic:sise=3", "task arithmetic has no option sise; did you mean size?"),
        ("gsm8k:size=3", "task gsm8k has no option size; there are none"),
        ("arithmetic:size=many", "task arithmetic:size=many: size=many: expected a whole number or none"),
        ("arithmetic:size=0", "size=0: expected 1 to 10,000,000"),
        ("arithmetic:digits=0", "digits=0, product_digits=2: expected 1 or more"),
        ("arithmetic:validation", "task arithmetic has no split validation; it has train and test"),
        ("spellingbee:val", "task spellingbee has no split val; it has train and test"),
        ("identity:val", "task identity has no split val; it has train, test and all"),
        ("humaneval:train", "task humaneval has no split train, only test"),
        ("customjson", "task customjson needs a file of conversations"),
        ("customjson:test:/x.jsonl", "a file is all train"),
        ("customjson:/no/such.jsonl", "source=/no/such.jsonl: cannot be read (No such file or directory)"),
        ("gsm8k:/no/such", "source=/no/such: no such file or folder"),
        ("simplespelling:/no/such.json", "source=/no/such.json: cannot be read"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        tasks.from_text(text)
    assert "\n" not in str(caught.value)


def test_importing_tasks_does_not_import_datasets() -> None:
    code = "import sys; from nanochat import tasks; [tasks.about(n) for n in tasks.names()]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[1])
    loaded = done.stdout.split()
    assert "nanochat.tasks.task.smoltalk" in loaded and "datasets" not in loaded


# ---------------------------------------------------------------------------------------------------------------
# Generated tasks


def test_arithmetic_rows_are_these() -> None:
    row = generated("arithmetic", "train").row(1)
    assert question(row) == "Compute the sum of 361 and 1"
    assert reference(row) == [
        {"type": "text", "text": "Let me calculate: "},
        {"type": "python", "text": "361+1"},
        {"type": "python_output", "text": "362"},
        {"type": "text", "text": "\n\n#### 362"},
    ]


def operands(row: chat_format.Conversation) -> tuple[str, str, str]:
    call = next(part["text"] for part in reference(row) if part["type"] == "python")
    found = re.fullmatch(r"([0-9]+)([-+*])([0-9]+)", call)
    assert found, call
    return found[1], found[2], found[3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_is_right_and_copies_its_operands(split: str) -> None:
    some = generated("arithmetic", split, size=600)
    operations: Counter[str] = Counter()
    for index in range(some.size):
        row = some.row(index)
        a, operation, b = operands(row)
        operations[operation] += 1
        asked = question(row)
        assert re.findall("[0-9]+", asked) == [a, b]
        assert re.search(rf"{re.escape(operation)}|plus|minus|times|sum|difference|product", asked)
        assert max(len(a), len(b)) <= (2 if operation == "*" else 3)
        _, call, output, final = (part["text"] for part in reference(row))
        assert tool_use.calculate(call) == output and final == f"\n\n#### {output}"
        assert some.right and some.right(row, plain_text(reference(row)))
        assert not some.right(row, f"#### {output}1") and not some.right(row, output)
    assert min(operations[operation] for operation in "+-*") > 150


def test_arithmetic_problems_of_train_and_test_are_disjoint() -> None:
    pairs: dict[str, set[tuple[int, int]]] = {"train": set(), "test": set()}
    for split, found in pairs.items():
        some = generated("arithmetic", split, size=4000)
        for index in range(some.size):
            a, _, b = operands(some.row(index))
            found.add((min(int(a), int(b)), max(int(a), int(b))))
    assert len(pairs["train"]) > 1500 and len(pairs["test"]) > 1000
    assert not pairs["train"] & pairs["test"]
    share = sum(arithmetic.held_out(a, b) for a in range(100) for b in range(100)) / 100**2
    assert math.isclose(share, 1 / 8, abs_tol=0.01)


def test_arithmetic_takes_larger_operands() -> None:
    some = generated("arithmetic", "test", size=200, digits=6, product_digits=4)
    lengths = {operation: set[int]() for operation in "+-*"}
    for index in range(some.size):
        a, operation, b = operands(some.row(index))
        lengths[operation] |= {len(a), len(b)}
    assert lengths == {"+": {1, 2, 3, 4, 5, 6}, "-": {1, 2, 3, 4, 5, 6}, "*": {1, 2, 3, 4}}


def test_digits_are_the_same_tokens_in_question_and_call() -> None:
    tok = tokenizer.train([f"{i} is {i * 7} or {i}+{i}\n" for i in range(1000)], 360)
    some = generated("arithmetic", "train", size=200)
    for index in range(some.size):
        a, _, b = operands(some.row(index))
        ids, _ = chat_format.render(tok, some.row(index))
        cut = ids.index(tok.special("<|python_start|>"))
        call = ids[cut + 1 : ids.index(tok.special("<|python_end|>"))]
        for number in (a, b):
            part = tok.encode(number)
            for where in (ids[:cut], call):
                assert any(where[i : i + len(part)] == part for i in range(len(where)))


def test_spelling_rows_are_these() -> None:
    row = generated("simplespelling", "train").row(0)
    word = question(row).removeprefix("Spell the word: ")
    assert reference(row) == f"{word}:{','.join(word)}"
    parts = spellingbee.answer("robot", "o")
    assert parts == [
        {"type": "text", "text": "robot:r,o,b,o,t\n\nCounting o:\nr 0\no 1\nb 1\no 2\nt 2\nCheck: "},
        {"type": "python", "text": "'robot'.count('o')"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "\n\n#### 2"},
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_spelling_answers_are_right(split: str) -> None:
    some = generated("spellingbee", split, size=300)
    asked = set()
    for index in range(some.size):
        row = some.row(index)
        _, call, output, _ = (part["text"] for part in reference(row))
        word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", call).groups()  # type: ignore[union-attr]
        assert tool_use.calculate(call) == output == str(word.count(letter))
        assert word in question(row) and letter in question(row)
        assert some.right and some.right(row, plain_text(reference(row))) and not some.right(row, "#### 99")
        asked.add(question(row).replace(word, "W"))
    assert len(asked) > 150
    some = generated("simplespelling", split, size=100)
    for index in range(some.size):
        row = some.row(index)
        assert some.right and some.right(row, f" {reference(row)}\n") and not some.right(row, reference(row)[:-1])


def test_every_phrasing_has_letter_and_word_and_several_languages_are_among_them() -> None:
    for text in spellingbee.PHRASINGS:
        asked = text.format(letter="q", word="zebra")
        assert "q" in asked and "zebra" in asked and asked.lower().format() == asked.lower()
    for word in ("How", "Cuántas", "Combien", "Wie", "Quante", "Quantas", "几个"):
        assert any(word in text for text in spellingbee.PHRASINGS)


@pytest.mark.parametrize("name", ["arithmetic", "spellingbee", "simplespelling"])
def test_seeds_of_test_rows_are_apart_from_those_of_training_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    seeds: list[int] = []
    real = random.Random

    def spy(seed: int) -> random.Random:
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(f"nanochat.tasks.task.{name}.random.Random", spy)
    train, test = generated(name, "train"), generated(name, "test")
    for made in (train, test):
        made.row(0)
        made.row(made.size - 1)
    assert seeds == [0, train.size - 1, 10_000_000, 10_000_000 + test.size - 1]
    assert test.size == 256 and train.size == {"arithmetic": 20_000, "spellingbee": 80_000}.get(name, 200_000)
    with pytest.raises(IndexError):
        train.row(train.size)


def test_rows_do_not_depend_on_size_or_order() -> None:
    few, many = generated("spellingbee", "train", size=10), generated("spellingbee", "train")
    assert [few.row(i) for i in reversed(range(10))] == [many.row(i) for i in range(10)][::-1]


def test_the_words_that_ship_are_a_few_thousand() -> None:
    words = _generated.words(None)
    assert 3000 < len(words) == len(set(words)) and list(words) == sorted(words)
    assert all(re.fullmatch("[a-z]{3,17}", word) for word in words) and "strawberry" in words


def test_words_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("añil\n\n  zorro \n", "utf-8")
    found = {question(tasks.load("simplespelling", source=path, size=30).row(i)) for i in range(30)}
    assert found == {"Spell the word: añil", "Spell the word: zorro"}
    assert question(tasks.load("spellingbee", source=path).row(0))
    assert _generated.words(tmp_path) == _generated.words(None)  # a folder for other tasks
    path.rename(tmp_path / "words.txt")
    assert _generated.words(tmp_path) == ("añil", "zorro")
    (tmp_path / "bad.txt").write_text("ok\ntwo words\n")
    with pytest.raises(UserError, match=r"bad.txt line 2: expected one word of letters, got 'two words'"):
        _generated.words(tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="has no word in it"):
        _generated.words(tmp_path / "none.txt")


# ---------------------------------------------------------------------------------------------------------------
# Conversations: what ships, and files of one's own


def test_identity_ships_more_than_a_hundred_conversations_of_one_and_of_several_turns() -> None:
    every, train, test = (tasks.load("identity", split) for split in ("all", "train", "test"))
    rows = [every.row(i) for i in range(every.size)]
    assert every.size > 100 and train.size + test.size == every.size and test.size == every.size // 10
    assert sum(len(row["messages"]) > 3 for row in rows) >= 10
    assert any(row["messages"][0]["role"] == "system" for row in rows)
    assert any(isinstance(reference(row), list) for row in rows)
    apart = [{json.dumps(some.row(i)) for i in range(some.size)} for some in (train, test)]
    assert not apart[0] & apart[1]
    for row in rows:
        ids, mask = chat_format.render(TOK, row)
        assert sum(mask) > 1 and len(ids) < 500
    assert tasks.load("identity", source=ROWS).size == train.size  # a folder for other tasks


def test_sums_among_the_identity_conversations_are_no_test_problems_and_have_the_form_of_arithmetic() -> None:
    some = tasks.load("identity", "all")
    rows = [row for row in map(some.row, range(some.size)) if isinstance(reference(row), list)]
    assert len(rows) == 3
    for row in rows:
        a, _, b = operands(row)
        assert not arithmetic.held_out(int(a), int(b))
        lead, call, output, final = (part["text"] for part in reference(row))
        assert (lead, final) == ("Let me calculate: ", f"\n\n#### {tool_use.calculate(call)}") and output in final


def test_identity_reads_a_file_of_ones_own(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(20)]
    path = write(tmp_path / "identity.jsonl", *talk)
    for source in (path, tmp_path):
        assert tasks.load("identity", source=source).size == 18
        test = tasks.load("identity", "test", source=source)
        assert sorted(question(test.row(i)) for i in range(test.size)) == ["q19", "q9"]
    write(path, *talk[:3])
    with pytest.raises(UserError, match="too few conversations for a split test"):
        tasks.load("identity", "test", source=path)


def test_customjson_is_shuffled_with_the_seed(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] for i in range(10)]
    path = write(tmp_path / "my.jsonl", *talk[:9], {"messages": talk[9]})
    some = tasks.load("customjson", source=path)
    assert [question(some.row(i)) for i in range(10)] == ["5", "6", "0", "7", "3", "2", "4", "9", "1", "8"]
    assert (some.kind, some.size, some.right) == ("chat", 10, None)


USER, BOT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "is no JSON"),
        ('[{"role": "user"', "is no JSON"),
        ("\xff", "is no JSON"),
        ("42", "expected a conversation"),
        ("[]", "no user message"),
        (f"[{USER}]", "the last message is not the assistant's"),
        (f"[{BOT}]", "message 1: role 'assistant'"),
        (f"[{USER}, {USER}]", "message 2: role 'user', expected assistant"),
        ('[{"role": "user"}]', "message 1: expected an object"),
        (f'[{USER}, {{"role": "assistant", "content": [{{"type": "image", "text": ""}}]}}]', "message 2, part 1"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(f"[{USER}, {BOT}]\n\n".encode() + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=f"my.jsonl line 3: .*{re.escape(message)}"):
        tasks.load("customjson", source=path)


def test_a_file_without_a_conversation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no conversation in it"):
        customjson.read(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------------------------------------------------------
# Data sets of the hub


def test_splits_are_shuffled_as_datasets_shuffles() -> None:
    assert hub_table.order(10) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    import datasets

    for size in (1, 10, 999):
        rows = datasets.Dataset.from_dict({"x": list(range(size))})
        assert hub_table.order(size) == rows.shuffle(seed=42)["x"][:]
    lines = [json.loads(line) for line in (ROWS / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    some = tasks.load("gsm8k", source=ROWS)
    assert [question(some.row(i)) for i in range(3)] == [lines[i]["question"] for i in (15, 9, 14)]


def test_gsm8k_marks_become_calls_and_outputs() -> None:
    answer = "She eats 3 + 4 = <<3+4=7>>7.\nSo 2 * 7 = $<<2*7=14>>14.\n#### 14"
    parts = gsm8k.parts_of(answer)
    assert [tuple(part.values()) for part in parts] == [
        ("text", "She eats 3 + 4 = "),
        ("python", "3+4"),
        ("python_output", "7"),
        ("text", "7.\nSo 2 * 7 = $"),
        ("python", "2*7"),
        ("python_output", "14"),
        ("text", "14.\n#### 14"),
    ]
    assert gsm8k.text_of(parts) == answer


@pytest.mark.parametrize("text", ["", "<<1+1=2>>2", "a<<1=1>><<2=2>>", "<<a>>", "<<a=>>", "<<x=1=2>>", "< <1=1>>", "é"])
def test_gsm8k_text_comes_back_from_its_parts(text: str) -> None:
    assert gsm8k.text_of(gsm8k.parts_of(text)) == text


def round_trips(some: Task, texts: dict[str, str]) -> None:
    """Hold that text → parts → tokens and mask → parts → text loses nothing, and that the mask is as it should be."""
    assert some.size == len(texts)
    for index in range(some.size):
        row = some.row(index)
        parts, text = reference(row), texts[question(row)]
        ids, mask = chat_format.render(TOK, row)
        start = ids.index(TOK.special("<|assistant_start|>")) + 1
        read = chat_format.content(TOK, ids[start:])
        assert read == (parts if len(parts) > 1 else parts[0]["text"])
        assert gsm8k.text_of(parts) == text
        assert sum(mask[:start]) == 0
        outputs = [len(part["text"].encode()) + 2 for part in parts if part["type"] == "python_output"]
        assert sum(mask[start:]) == len(ids) - start - sum(outputs)
        assert some.right and some.right(row, text) and some.right(row, plain_text(parts))
        assert not some.right(row, text.replace("####", "")) and not some.right(row, f"#### 0.123 {text}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_rows_round_trip(split: str) -> None:
    rows = [json.loads(line) for line in (ROWS / f"gsm8k_{split}.jsonl").read_text("utf-8").splitlines()]
    round_trips(tasks.load("gsm8k", split, source=ROWS), {row["question"]: row["answer"] for row in rows})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not there")
@pytest.mark.parametrize(("split", "size"), [("train", 200), ("test", 80)])
def test_all_real_rows_of_gsm8k_round_trip(split: str, size: int) -> None:
    rows = pq.read_table(REAL / f"gsm8k_{split}.parquet").to_pylist()
    assert len(rows) == size
    round_trips(tasks.load("gsm8k", split, source=REAL), {row["question"]: row["answer"] for row in rows})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not there")
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "humaneval"])
def test_all_real_rows_render(name: str) -> None:
    some = tasks.load(name, "test", source=REAL)
    assert some.size == (40 if name == "humaneval" else 120)
    for index in range(some.size):
        row = some.row(index)
        assert sum(chat_format.render(TOK, row)[1]) == len(reference(row).encode()) + 1
        assert name == "humaneval" or reference(row) in row["letters"]


def test_arc_rows() -> None:
    easy, challenge = (tasks.load(name, "test", source=ROWS) for name in ("arc_easy", "arc_challenge"))
    assert (easy.name, easy.kind, easy.size, easy.baseline, easy.right) == ("arc_easy", "choice", 4, 0.25, None)
    assert challenge.name == "arc_challenge"
    row = next(row for row in map(easy.row, range(4)) if "photosynthesis" in question(row))
    assert question(row) == (
        "Multiple Choice question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\n- Sunlight is the source of energy for nearly all ecosystems.=A\n- Most ecosystems are found on land "
        "instead of in water.=B\n- Carbon dioxide is more available than other gases.=C\n- The producers in all "
        "ecosystems are plants.=D\n\nRespond only with the letter of the correct answer."
    )
    assert (reference(row), row["letters"]) == ("A", ["A", "B", "C", "D"])


def test_mmlu_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": i} for i in range(4)]
    write(tmp_path / "all" / "auxiliary_train-00000-of-00001.parquet", *rows)
    write(tmp_path / "all" / "test-00000-of-00001.parquet", *rows[:2])
    for name in ("mmlu", "mmlu:auxiliary_train"):
        some = tasks.from_text(name, source=tmp_path)
        assert {question(some.row(i))[26:28]: reference(some.row(i)) for i in range(4)} == dict(
            q0="A", q1="B", q2="C", q3="D"
        )
    assert question(some.row(0)).endswith(
        "\n- w=A\n- x=B\n- y=C\n- z=D\n\nRespond only with the letter of the correct answer."
    )
    assert (some.row(0)["letters"], some.row(0)["subject"], some.baseline) == (["A", "B", "C", "D"], "law", 0.25)
    assert tasks.load("mmlu", "test", source=tmp_path).size == 2


def test_smoltalk_rows(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", {"messages": said, "source": "x"})
    some = tasks.load("smoltalk", source=tmp_path)
    assert [some.row(i) for i in range(some.size)] == [{"messages": said}] * 2
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"messages": said[:1], "source": "x"})
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet, row 0, counted from 0: .*no user message"):
        tasks.load("smoltalk", "test", source=tmp_path).row(0)


# ---------------------------------------------------------------------------------------------------------------
# HumanEval


@pytest.fixture
def kernel() -> None:
    """Skip where the kernel does not isolate."""
    if reason := bubblewrap.available():
        pytest.skip(reason)


def test_humaneval_rows_are_judged_in_the_sandbox(kernel: None) -> None:
    some = tasks.load("humaneval", source=DATA / "humaneval.json", split="test", timeout_seconds=60.0)
    assert (some.kind, some.size) == ("generative", 6) and some.right
    for index in range(some.size):
        row = some.row(index)
        assert reference(row).startswith(f"```python\n{question(row)}") and reference(row).endswith("\n```")
        assert some.right(row, reference(row))
    name = row["entry_point"]
    for wrong in (
        f"def {name}(*a):\n    return None",
        "",
        "I do not know.",
        "import sys; sys.exit(0)",
        "while True: pass",
    ):
        assert not tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=1.0).right(
            row, wrong
        )  # type: ignore[misc]


def test_an_answer_may_be_fenced_or_bare_and_leave_out_the_imports(kernel: None) -> None:
    prompt = "import math\nfrom typing import List\n\n\ndef area(r: float) -> float:\n    '''Area.'''\n"
    row = {
        **tasks.qa_conversation(prompt, ""),
        "entry_point": "area",
        "test": "def check(f):\n    assert abs(f(2) - 4 * math.pi) < 1e-9",
    }
    right = tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=60.0).right
    body = "def area(r):\n    return math.pi * r ** 2"
    assert right
    for answer in (body, f"Here:\n```python\n{body}\n```\nDone.", f"```\n{body}\n```", f"```py\n{body}", f"\n{body}\n"):
        assert right(row, answer), answer
    assert not right(row, f"```python\npass\n```\n```python\n{body}\n```")  # the first is the answer
    assert not right(row, body.replace("math.pi", "math.e"))


def test_the_program_that_judges_an_answer_is_this() -> None:
    row = {
        **tasks.qa_conversation("import math\n\n# why\nfrom a import b\nx = 1\nimport os\n", ""),
        "entry_point": "f",
        "test": "def check(c): ...",
    }
    program = "import math\nfrom a import b\n\ndef f(): ...\n\ndef check(c): ...\n\ncheck(f)\n"
    assert humaneval.program(row, "So:\n```python\ndef f(): ...\n```") == program


def test_a_sandbox_that_cannot_run_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "available", lambda: "the sandbox needs bubblewrap: apt-get install bubblewrap")
    some = tasks.load("humaneval", "test", source=DATA / "humaneval.json")
    with pytest.raises(UserError, match="the sandbox needs bubblewrap: apt-get install bubblewrap; or accept weaker"):
        some.right(some.row(0), "x")  # type: ignore[misc]
    some = tasks.from_text("humaneval:test:weak=true", source=DATA / "humaneval.json")
    assert some.right and not some.right(some.row(0), "x")


# ---------------------------------------------------------------------------------------------------------------
# Sources that are not as they should be


GSM8K = {"question": "q", "answer": "#### 1"}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
MMLU = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", GSM8K | {"answer": "so it is 1"}, "row 1, counted from 0: the answer has no number behind #### "),
        ("gsm8k", GSM8K | {"question": None}, "row 1, counted from 0: question is 'None', expected str"),
        ("arc_easy", ARC | {"answerKey": "E"}, "answerKey 'E' is none of the labels A, B"),
        ("arc_easy", ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "expected as many texts as labels"),
        ("arc_challenge", ARC | {"choices": {"text": [], "label": []}}, "expected as many texts as labels"),
        ("mmlu", MMLU | {"answer": 4}, "expected four choices and an answer of 0 to 3, got answer 4"),
        ("mmlu", MMLU | {"choices": ["a"]}, "expected four choices"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_bad_row_is_named(name: str, row: dict[str, Any], message: str, suffix: str, tmp_path: Path) -> None:
    good = {"gsm8k": GSM8K, "mmlu": MMLU}.get(name, ARC)
    path = write(tmp_path / f"rows{suffix}", good, row)
    some = tasks.load(name, "test", source=path)
    bad = [i for i in range(some.size) if hub_table.order(2)[i] == 1]
    assert some.row(1 - bad[0])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        some.row(bad[0])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "arc_challenge", "mmlu", "humaneval", "smoltalk"])
def test_a_missing_column_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a", "other": 1})
    with pytest.raises(UserError, match=rf"rows.jsonl: has no column \w+, which {name} needs; it has text, other"):
        tasks.load(name, "test", source=path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match=r"source=.*gsm8k_test.parquet: cannot be read \(.+\)$"):
        tasks.load("gsm8k", "test", source=tmp_path)
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"quest')
    with pytest.raises(UserError, match=r"source=.*gsm8k_train.jsonl: cannot be read \(.+\)$"):
        tasks.load("gsm8k", "train", source=tmp_path)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(UserError, match=r"rows.txt: expected a folder or a file of .parquet, .jsonl, .json"):
        tasks.load("gsm8k", "train", source=tmp_path / "rows.txt")
    with pytest.raises(UserError, match=r"has no file of mmlu, test: expected mmlu_test.parquet .* or all/test"):
        tasks.load("mmlu", "test", source=tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_empty_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    else:
        path.write_text("")
    with pytest.raises(UserError, match=rf"source=.*rows{suffix}: (has no rows|cannot be read)"):
        tasks.load("gsm8k", "test", source=path)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GSM8K)
    assert tasks.load("gsm8k", "test", source=path).size == 1
    write(path, GSM8K, GSM8K | {"question": "another"})
    assert tasks.load("gsm8k", "test", source=path).size == 2


def test_what_is_read_of_local_files_is_kept_in_the_base_folder(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path / "files" / "rows.jsonl", GSM8K)
    table = hub_table.read(hub_table.Source("gsm8k", "openai/gsm8k", "main", "main", "test", {}), path)
    assert all(base in Path(file["filename"]).parents for file in table.rows.cache_files) and table.rows.cache_files
    assert {entry.name for entry in tmp_path.iterdir()} == {"files", "base"}


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"the data set openai/gsm8k, split test, cannot be had: the hub does not"
    ) as caught:
        tasks.load("gsm8k", "test")
    assert time.monotonic() - began < 20  # five attempts of `datasets` take longer
    assert "name a file or folder with its rows: source=/path" in str(caught.value) and "\n" not in str(caught.value)
    assert config.HF_HUB_OFFLINE is False


def test_the_hub_is_asked_for_the_right_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def answer(*args: Any, **options: Any) -> Any:
        asked.append((*args, *options.values()))
        raise ValueError("enough")

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(hub_table, "_answers", lambda address: True)
    for text in ("arc_easy", "arc_challenge:test", "mmlu", "mmlu:test", "gsm8k", "humaneval:test", "smoltalk:test"):
        with pytest.raises(UserError, match=r"cannot be had: enough; check the network"):
            tasks.from_text(text)
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "train"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("cais/mmlu", "all", "auxiliary_train"),
        ("cais/mmlu", "all", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/openai_humaneval", None, "test"),
        ("HuggingFaceTB/smol-smoltalk", None, "test"),
    ]


def test_an_earlier_download_serves_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets import config

    def answer(*_: Any, **__: Any) -> Any:
        assert config.HF_HUB_OFFLINE  # it looks into its cache alone
        return datasets.Dataset.from_list([GSM8K])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_table, "_answers", lambda address: False)
    assert tasks.load("gsm8k").size == 1 and not config.HF_HUB_OFFLINE


# ---------------------------------------------------------------------------------------------------------------
# The viewer


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    tokenizer.save(TOK, tmp_path / "tok")
    return str(tmp_path / "tok")


def show(**settings: Any) -> None:
    viewer.run(viewer.Config(**settings), distributed.init("cpu"))


def test_the_viewer_marks_what_is_learned(tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(task="arithmetic:train", start=1, count=1, tokenizer=tokenizer_folder)
    assert capsys.readouterr().out.splitlines() == [
        "arithmetic: 20,000 rows, generative",
        "",
        "--- row 1: 73 tokens, 36 learned",
        "<|bos|><|user_start|>Compute the sum of 361 and 1<|user_end|><|assistant_start|>[[Let me calculate: "
        "<|python_start|>361+1<|python_end|>]]<|output_start|>362<|output_end|>[[",
        "",
        "#### 362<|assistant_end|>]]",
    ]


def test_the_viewer_shows_tokens_letters_and_a_cut(tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(ROWS)
    show(task="arc_easy", split="test", source=source, count=1, tokens=True, max_tokens=5, tokenizer=tokenizer_folder)
    assert capsys.readouterr().out.splitlines() == [
        "arc_easy: 4 rows, choice",
        "",
        "--- row 0: 5 tokens, 0 learned",
        "letters: ['A', 'B', 'C', 'D']",
        "<|bos|>|<|user_start|>|M|u|l",
    ]


def test_the_viewer_colours_on_a_terminal() -> None:
    row = tasks.qa_conversation("é\x1b[5m", "b")
    ids, mask = chat_format.render(TOK, row)
    text = viewer.painted(TOK, ids, mask, "", colour=True)
    assert text == (
        "\x1b[2m<|bos|><|user_start|>\x1b[0mé\ufffd[5m\x1b[2m<|user_end|><|assistant_start|>\x1b[0m"
        "\x1b[32mb<|assistant_end|>\x1b[0m"
    )


def test_the_viewer_lists_the_tasks_and_refuses_what_makes_no_sense(
    tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == tasks.names() and "(size, digits, product_digits)" in out
    with pytest.raises(UserError, match="start=300: arithmetic has 256 rows"):
        show(task="arithmetic:test", start=300, tokenizer=tokenizer_folder)
    with pytest.raises(UserError, match="count=0: must be at least 1"):
        viewer.Config(count=0)
    with pytest.raises(UserError, match="train a tokenizer"):
        show(task="arithmetic")
