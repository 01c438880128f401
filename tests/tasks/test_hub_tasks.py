"""Tasks of the hub: rows of local files, round trips, HumanEval in the sandbox, malformed and missing sources."""

import gzip
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import config
from task_rows import DATA, ROWS, TOKENIZER, question, reference, write

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.sandbox import bubblewrap
from nanochat.tasks import gsm8k, hub_table, plain_text

needs_sandbox = pytest.mark.skipif(bool(bubblewrap.available()), reason="needs bubblewrap and a kernel that isolates")

GSM8K = {"question": "q", "answer": "#### 1"}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
MMLU = {"question": "q", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 1}


pytestmark = pytest.mark.usefixtures("base")


def test_shuffle_equals_that_of_datasets() -> None:
    rows = datasets.Dataset.from_dict({"x": list(range(999))})
    assert hub_table.shuffled_indices(999) == rows.shuffle(seed=42)["x"][:]


def joined(parts: Sequence[dict[str, str]]) -> str:
    return "".join(part["text"] for part in parts)


def without_marks(answer: str) -> str:
    return re.sub("<<(.*?)>>", lambda call: "".join(call[1].rsplit("=", 1)), answer)


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
    for text in ("", "a<<1=1>><<2=2>>", "<<a>>", "<<a=>>", "<<x=1=2>>", "< <1=1>>"):
        assert joined(gsm8k.parse_answer(text)) == without_marks(text)


def test_gsm8k_rows_round_trip_and_the_loss_mask_skips_tool_outputs() -> None:
    lines = [json.loads(line) for line in (ROWS / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    task, texts = tasks.load("gsm8k", source=ROWS), {line["question"]: line["answer"] for line in lines}
    assert [question(task.row(i)) for i in range(3)] == [lines[i]["question"] for i in (15, 9, 14)]
    assert task.size == len(texts) and task.is_correct
    for row in map(task.row, range(task.size)):
        parts, text = reference(row), texts[question(row)]
        ids, mask = chat_format.render(TOKENIZER, row)
        start = ids.index(TOKENIZER.special("<|assistant_start|>")) + 1
        read = chat_format.content(TOKENIZER, ids[start:])
        assert read == (parts if len(parts) > 1 else parts[0]["text"])
        assert joined(parts) == without_marks(text)
        outputs = [len(part["text"].encode()) + 2 for part in parts if part["type"] == "python_output"]
        assert sum(mask[:start]) == 0 and sum(mask[start:]) == len(ids) - start - sum(outputs)
        assert task.is_correct(row, text) and task.is_correct(row, plain_text(parts))
        assert not task.is_correct(row, text.replace("####", "")) and not task.is_correct(row, f"#### 0.123 {text}")


def test_arc_rows() -> None:
    task = tasks.load("arc_easy", "test", source=ROWS)
    assert (task.name, task.kind, task.size, task.baseline) == ("arc_easy", "multiple_choice", 4, 0.25)
    row = next(row for row in map(task.row, range(4)) if "photosynthesis" in question(row))
    assert question(row) == (
        "Multiple Choice question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\n- Sunlight is the source of energy for nearly all ecosystems.=A\n- Most ecosystems are found on land "
        "instead of in water.=B\n- Carbon dioxide is more available than other gases.=C\n- The producers in all "
        "ecosystems are plants.=D\n\nRespond only with the letter of the correct answer."
    )
    assert (reference(row), row["letters"]) == ("A", ["A", "B", "C", "D"])


def test_mmlu_rows_from_files_as_on_the_hub(tmp_path: Path) -> None:
    rows = [MMLU | {"question": f"q{i}", "answer": i} for i in range(4)]
    write(tmp_path / "all" / "auxiliary_train-00000-of-00001.parquet", *rows)
    write(tmp_path / "all" / "test-00000-of-00001.parquet", *rows[:2])
    task = tasks.load("mmlu", source=tmp_path)
    answers = {question(task.row(i))[26:28]: reference(task.row(i)) for i in range(4)}
    assert answers == {"q0": "A", "q1": "B", "q2": "C", "q3": "D"}
    assert question(task.row(0)).partition("\n")[2].startswith("- w=A\n- x=B\n- y=C\n- z=D\n")
    assert (task.row(0)["letters"], task.row(0)["subject"], task.baseline) == (["A", "B", "C", "D"], "law", 0.25)
    assert tasks.load("mmlu", "test", source=tmp_path).size == 2


@needs_sandbox
def test_humaneval_answers_run_in_the_sandbox() -> None:
    task = tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=60.0)
    assert (task.kind, task.size) == ("generative", 6) and task.is_correct
    for row in map(task.row, range(task.size)):
        assert reference(row).startswith(f"```python\n{question(row)}") and reference(row).endswith("\n```")
        assert task.is_correct(row, reference(row))
    quick = tasks.load("humaneval", "test", source=DATA / "humaneval.json", timeout_seconds=1.0).is_correct
    assert quick
    for wrong in ("", "I do not know.", f"def {row['entry_point']}(*a): ...", "import sys; sys.exit(0)"):
        assert not quick(row, wrong)


def test_unavailable_sandbox_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "available", lambda: "the sandbox needs bubblewrap: apt-get install bubblewrap")
    task = tasks.load("humaneval", "test", source=DATA / "humaneval.json")
    with pytest.raises(UserError, match="the sandbox needs bubblewrap: apt-get install bubblewrap; or accept weaker"):
        task.is_correct(task.row(0), "x")  # type: ignore[misc]
    task = tasks.from_text("humaneval:test:weak=true", source=DATA / "humaneval.json")
    assert task.is_correct and not task.is_correct(task.row(0), "x")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", GSM8K | {"answer": "so it is 1"}, "row 2: the answer has no number after #### "),
        ("gsm8k", GSM8K | {"question": None}, "row 2: question is 'None', expected str"),
        ("arc_easy", ARC | {"answerKey": "E"}, "answerKey 'E' is not one of the labels A, B"),
        ("arc_easy", ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "one text for each label"),
        ("mmlu", MMLU | {"answer": 4}, "expected four choices and an answer of 0 to 3, got answer 4"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_malformed_row_is_named(name: str, row: dict[str, Any], message: str, suffix: str, tmp_path: Path) -> None:
    good = {"gsm8k": GSM8K, "mmlu": MMLU}.get(name, ARC)
    path = write(tmp_path / f"rows{suffix}", good, row)
    task = tasks.load(name, "test", source=path)
    bad = hub_table.shuffled_indices(2).index(1)
    assert task.row(1 - bad)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        task.row(bad)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "mmlu", "humaneval", "smoltalk"])
def test_missing_column_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a", "other": 1})
    with pytest.raises(UserError, match=rf"rows.jsonl: has no column \w+, which {name} needs; it has text, other"):
        tasks.load(name, "test", source=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k_test.parquet", b"PAR1 is not enough", r"gsm8k_test.parquet: unreadable parquet \(.+\)$"),
        (
            "gsm8k_test.jsonl",
            b'{"question": "q", "answer": ""}\n{"quest',
            r"gsm8k_test.jsonl: line 2 is not valid JSON \(.+\)$",
        ),
        ("gsm8k_test.jsonl", b"", r"gsm8k_test.jsonl: has no rows"),
        ("rows.txt", b"x", r"has no file of gsm8k, test: expected gsm8k_test.parquet .* or main/test"),
    ],
)
def test_unreadable_source_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tasks.load("gsm8k", "test", source=tmp_path)
    with pytest.raises(UserError, match=r"expected a folder or a file of .parquet, .jsonl, .*json"):
        tasks.load("gsm8k", "test", source=__file__)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_local_file_is_read_again_even_if_size_and_time_are_the_same(base: Path, suffix: str) -> None:
    for letter in "ab":
        path = write(base / f"rows{suffix}", GSM8K | {"question": letter * 20})
        os.utime(path, ns=(1, 1))
        assert question(tasks.load("gsm8k", "test", source=path).row(0)) == letter * 20


@pytest.mark.parametrize("name", ["rows.json", "rows.JSONL", "rows.jsonl.gz", "rows.csv"])
def test_strings_of_local_files_stay_strings(tmp_path: Path, name: str) -> None:
    rows = [GSM8K | {"question": "2024-03-01T12:00:00"}, GSM8K | {"question": "2024-03-02"}]
    lines = [json.dumps(rows, indent=1) if name == "rows.json" else "\n".join(map(json.dumps, rows))]
    lines = ["question,answer", *(",".join(row.values()) for row in rows)] if name == "rows.csv" else lines
    data = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    task = tasks.load("gsm8k", "test", source=tmp_path / name)
    assert [question(task.row(i)) for i in hub_table.shuffled_indices(2)] == [row["question"] for row in rows]


def test_unreachable_hub_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    message = "the data set openai/gsm8k, split test, could not be loaded: the hub is not reachable"
    with pytest.raises(UserError, match=f"{message}.*give a file or folder with its rows: source=/path$"):
        tasks.load("gsm8k", "test")
    assert time.monotonic() - began < 20  # five attempts of `datasets` take longer
    assert config.HF_HUB_OFFLINE is False


def test_cached_download_is_used_when_the_hub_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> Any:
        assert (*arguments, options) == ("openai/gsm8k", "main", {"split": "train"})
        assert config.HF_HUB_OFFLINE  # only its cache is read
        return datasets.Dataset.from_list([GSM8K])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_table, "_responds", lambda *_: False)
    assert tasks.load("gsm8k").size == 1 and not config.HF_HUB_OFFLINE
