"""Tasks of the hub: rows of local files, round trips, HumanEval in the sandbox, malformed and missing sources."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_rows import DATA, ROWS, TOKENIZER, question, reference, write

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.sandbox import bubblewrap
from nanochat.tasks import Task, gsm8k, hub_table, humaneval, plain_text

REAL = Path(__file__).parents[3] / "shared" / "task_data"
needs_sandbox = pytest.mark.skipif(bool(bubblewrap.available()), reason="needs bubblewrap and a kernel that isolates")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_shuffle_equals_that_of_datasets() -> None:
    assert hub_table.shuffled_indices(10) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    import datasets

    for size in (1, 10, 999):
        rows = datasets.Dataset.from_dict({"x": list(range(size))})
        assert hub_table.shuffled_indices(size) == rows.shuffle(seed=42)["x"][:]
    lines = [json.loads(line) for line in (ROWS / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    task = tasks.load("gsm8k", source=ROWS)
    assert [question(task.row(i)) for i in range(3)] == [lines[i]["question"] for i in (15, 9, 14)]


def text_of(parts: Sequence[dict[str, str]]) -> str:
    """Return the answer that `gsm8k.parse_answer` took apart."""
    pieces = []
    for part, following in zip(parts, [*parts[1:], {"type": "text"}]):
        text = part["text"]
        if part["type"] == "python":
            text = f"<<{text}=" if following["type"] == "python_output" else f"<<{text}>>"
        pieces.append(f"{text}>>" if part["type"] == "python_output" else text)
    return "".join(pieces)


def test_gsm8k_calculations_become_tool_calls() -> None:
    answer = "She eats 3 + 4 = <<3+4=7>>7.\nSo 2 * 7 = $<<2*7=14>>14.\n#### 14"
    assert [tuple(part.values()) for part in gsm8k.parse_answer(answer)] == [
        ("text", "She eats 3 + 4 = "),
        ("python", "3+4"),
        ("python_output", "7"),
        ("text", "7.\nSo 2 * 7 = $"),
        ("python", "2*7"),
        ("python_output", "14"),
        ("text", "14.\n#### 14"),
    ]
    for text in (answer, "", "<<1+1=2>>2", "a<<1=1>><<2=2>>", "<<a>>", "<<a=>>", "<<x=1=2>>", "< <1=1>>", "é"):
        assert text_of(gsm8k.parse_answer(text)) == text


def assert_round_trip(task: Task, texts: dict[str, str]) -> None:
    """Assert that text → parts → tokens → parts → text loses nothing, and that the loss mask skips tool outputs."""
    assert task.size == len(texts)
    for index in range(task.size):
        row = task.row(index)
        parts, text = reference(row), texts[question(row)]
        ids, mask = chat_format.render(TOKENIZER, row)
        start = ids.index(TOKENIZER.special("<|assistant_start|>")) + 1
        read = chat_format.content(TOKENIZER, ids[start:])
        assert read == (parts if len(parts) > 1 else parts[0]["text"])
        assert text_of(parts) == text
        assert sum(mask[:start]) == 0
        outputs = [len(part["text"].encode()) + 2 for part in parts if part["type"] == "python_output"]
        assert sum(mask[start:]) == len(ids) - start - sum(outputs)
        assert task.is_correct and task.is_correct(row, text) and task.is_correct(row, plain_text(parts))
        assert not task.is_correct(row, text.replace("####", "")) and not task.is_correct(row, f"#### 0.123 {text}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_rows_round_trip(split: str) -> None:
    rows = [json.loads(line) for line in (ROWS / f"gsm8k_{split}.jsonl").read_text("utf-8").splitlines()]
    assert_round_trip(tasks.load("gsm8k", split, source=ROWS), {row["question"]: row["answer"] for row in rows})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not there")
@pytest.mark.parametrize(("split", "size"), [("train", 200), ("test", 80)])
def test_real_gsm8k_rows_round_trip(split: str, size: int) -> None:
    rows = pq.read_table(REAL / f"gsm8k_{split}.parquet").to_pylist()
    assert len(rows) == size
    assert_round_trip(tasks.load("gsm8k", split, source=REAL), {row["question"]: row["answer"] for row in rows})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not there")
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "humaneval"])
def test_real_rows_render(name: str) -> None:
    task = tasks.load(name, "test", source=REAL)
    assert task.size == (40 if name == "humaneval" else 120)
    for index in range(task.size):
        row = task.row(index)
        assert sum(chat_format.render(TOKENIZER, row)[1]) == len(reference(row).encode()) + 1
        assert name == "humaneval" or reference(row) in row["letters"]


def test_arc_rows() -> None:
    easy, challenge = (tasks.load(name, "test", source=ROWS) for name in ("arc_easy", "arc_challenge"))
    assert (easy.name, easy.kind, easy.size, easy.baseline) == ("arc_easy", "multiple_choice", 4, 0.25)
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
        task = tasks.from_text(name, source=tmp_path)
        assert {question(task.row(i))[26:28]: reference(task.row(i)) for i in range(4)} == dict(
            q0="A", q1="B", q2="C", q3="D"
        )
    assert question(task.row(0)).endswith(
        "\n- w=A\n- x=B\n- y=C\n- z=D\n\nRespond only with the letter of the correct answer."
    )
    assert (task.row(0)["letters"], task.row(0)["subject"], task.baseline) == (["A", "B", "C", "D"], "law", 0.25)
    assert tasks.load("mmlu", "test", source=tmp_path).size == 2


# ---------------------------------------------------------------------------------------------------------------
# HumanEval


@needs_sandbox
def test_humaneval_answers_run_in_the_sandbox() -> None:
    task = tasks.load("humaneval", source=DATA / "humaneval.json", split="test", timeout_seconds=60.0)
    assert (task.kind, task.size) == ("generative", 6) and task.is_correct
    for index in range(task.size):
        row = task.row(index)
        assert reference(row).startswith(f"```python\n{question(row)}") and reference(row).endswith("\n```")
        assert task.is_correct(row, reference(row))
    quick = tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=1.0).is_correct
    assert quick
    returns_none = f"def {row['entry_point']}(*a):\n    return None"
    for wrong in (returns_none, "", "I do not know.", "import sys; sys.exit(0)", "while True: pass"):
        assert not quick(row, wrong)


@needs_sandbox
def test_humaneval_answer_may_be_fenced_or_bare_and_lack_imports() -> None:
    prompt = "import math\nfrom typing import List\n\n\ndef area(r: float) -> float:\n    '''Area.'''\n"
    row = {
        **tasks.qa_conversation(prompt, ""),
        "entry_point": "area",
        "test": "def check(f):\n    assert abs(f(2) - 4 * math.pi) < 1e-9",
    }
    is_correct = tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=60.0).is_correct
    body = "def area(r):\n    return math.pi * r ** 2"
    assert is_correct
    for answer in (body, f"Here:\n```python\n{body}\n```\nDone.", f"```\n{body}\n```", f"```py\n{body}", f"\n{body}\n"):
        assert is_correct(row, answer), answer
    assert not is_correct(row, f"```python\npass\n```\n```python\n{body}\n```")  # the first is the answer
    assert not is_correct(row, body.replace("math.pi", "math.e"))


def test_humaneval_program() -> None:
    row = {
        **tasks.qa_conversation("import math\n\n# why\nfrom a import b\nx = 1\nimport os\n", ""),
        "entry_point": "f",
        "test": "def check(c): ...",
    }
    program = "import math\nfrom a import b\n\ndef f(): ...\n\ndef check(c): ...\n\ncheck(f)\n"
    assert humaneval.program(row, "So:\n```python\ndef f(): ...\n```") == program


def test_unavailable_sandbox_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "available", lambda: "the sandbox needs bubblewrap: apt-get install bubblewrap")
    task = tasks.load("humaneval", "test", source=DATA / "humaneval.json")
    with pytest.raises(UserError, match="the sandbox needs bubblewrap: apt-get install bubblewrap; or accept weaker"):
        task.is_correct(task.row(0), "x")  # type: ignore[misc]
    task = tasks.from_text("humaneval:test:weak=true", source=DATA / "humaneval.json")
    assert task.is_correct and not task.is_correct(task.row(0), "x")


# ---------------------------------------------------------------------------------------------------------------
# Malformed, missing and unreachable data


GSM8K = {"question": "q", "answer": "#### 1"}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
MMLU = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", GSM8K | {"answer": "so it is 1"}, "row 1 (counted from 0): the answer has no number after #### "),
        ("gsm8k", GSM8K | {"question": None}, "row 1 (counted from 0): question is 'None', expected str"),
        ("arc_easy", ARC | {"answerKey": "E"}, "answerKey 'E' is not one of the labels A, B"),
        ("arc_easy", ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "one text for each label"),
        ("arc_challenge", ARC | {"choices": {"text": [], "label": []}}, "one text for each label"),
        ("mmlu", MMLU | {"answer": 4}, "expected four choices and an answer of 0 to 3, got answer 4"),
        ("mmlu", MMLU | {"choices": ["a"]}, "expected four choices"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_malformed_row_is_named(name: str, row: dict[str, Any], message: str, suffix: str, tmp_path: Path) -> None:
    good = {"gsm8k": GSM8K, "mmlu": MMLU}.get(name, ARC)
    path = write(tmp_path / f"rows{suffix}", good, row)
    task = tasks.load(name, "test", source=path)
    bad = [i for i in range(task.size) if hub_table.shuffled_indices(2)[i] == 1]
    assert task.row(1 - bad[0])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        task.row(bad[0])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "arc_challenge", "mmlu", "humaneval", "smoltalk"])
def test_missing_column_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a", "other": 1})
    with pytest.raises(UserError, match=rf"rows.jsonl: has no column \w+, which {name} needs; it has text, other"):
        tasks.load(name, "test", source=path)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
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
def test_empty_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    else:
        path.write_text("")
    with pytest.raises(UserError, match=rf"source=.*rows{suffix}: (has no rows|cannot be read)"):
        tasks.load("gsm8k", "test", source=path)


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GSM8K)
    assert tasks.load("gsm8k", "test", source=path).size == 1
    write(path, GSM8K, GSM8K | {"question": "another"})
    assert tasks.load("gsm8k", "test", source=path).size == 2


def test_local_files_are_cached_in_the_base_folder(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path / "files" / "rows.jsonl", GSM8K)
    table = hub_table.load(hub_table.Source("gsm8k", "openai/gsm8k", "main", "main", "test", {}), path)
    assert all(base in Path(file["filename"]).parents for file in table.rows.cache_files) and table.rows.cache_files
    assert {entry.name for entry in tmp_path.iterdir()} == {"files", "base"}


def test_unreachable_hub_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"the data set openai/gsm8k, split test, could not be loaded: the hub is not"
    ) as caught:
        tasks.load("gsm8k", "test")
    assert time.monotonic() - began < 20  # five attempts of `datasets` take longer
    assert "give a file or folder with its rows: source=/path" in str(caught.value) and "\n" not in str(caught.value)
    assert config.HF_HUB_OFFLINE is False


def test_hub_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def answer(*args: Any, **options: Any) -> Any:
        asked.append((*args, *options.values()))
        raise ValueError("enough")

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(hub_table, "_responds", lambda url: True)
    for text in ("arc_easy", "arc_challenge:test", "mmlu", "mmlu:test", "gsm8k", "humaneval:test", "smoltalk:test"):
        with pytest.raises(UserError, match=r"could not be loaded: enough; check the network"):
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


def test_cached_download_is_used_when_the_hub_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets import config

    def answer(*_: Any, **__: Any) -> Any:
        assert config.HF_HUB_OFFLINE  # only its cache is read
        return datasets.Dataset.from_list([GSM8K])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_table, "_responds", lambda url: False)
    assert tasks.load("gsm8k").size == 1 and not config.HF_HUB_OFFLINE
