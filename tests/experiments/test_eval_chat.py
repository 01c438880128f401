"""eval_chat: its table and record, failed tasks that are retried, partial results, and two ranks."""

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import task_rows
from tiny_run import TOK, save_run

import launch
from experiments import eval_chat
from nanochat import distributed
from nanochat.config import UserError
from nanochat.metrics import logger
from nanochat.model import ModelConfig
from nanochat.train import run_folder

CONFIG = ModelConfig(sequence_len=160, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
ARC = [
    {"question": f"Which is {i}?", "choices": {"label": ["A", "B"], "text": [str(i), "x"]}, "answerKey": "AB"[i % 2]}
    for i in range(9)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy_test": ARC,
    "arc_challenge_test": ARC,
    "mmlu_test": [
        {"question": f"Which is {i}?", "choices": list("wxyz"), "answer": i % 4, "subject": "letters"} for i in range(9)
    ],
    "gsm8k_test": [{"question": f"What is {i}?", "answer": f"<<{i}+0={i}>>{i}\n#### {i}"} for i in range(5)],
    "humaneval_test": [
        {"prompt": "def f():\n", "canonical_solution": "    return 1", "entry_point": "f", "test": "def check(f): f()"}
    ],
}
NAMES = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
LENIENT = ["GSM8K-lenient", "SpellingBee-lenient"]
SETTINGS: dict[str, Any] = {"run": "bot", "max_problems": 4, "max_tokens": 6, "device": "cpu"}


@pytest.fixture
def source(base: Path) -> Path:
    """Return a folder with a few rows of each task, beside a run called bot."""
    save_run(base, config=CONFIG, stage="sft")
    for name, rows in ROWS.items():
        task_rows.write(base / "tasks" / f"{name}.jsonl", *rows)
    return base / "tasks"


def evaluate(source: Path, **settings: Any) -> None:
    with distributed.distributed_context("cpu") as runtime:
        eval_chat.run(eval_chat.Config(**{**SETTINGS, "source": source, **settings}), runtime)


def partial() -> Path:
    return run_folder("bot") / "eval" / "chat_1.partial.jsonl"


def table() -> list[dict[str, str]]:
    return list(csv.DictReader((run_folder("bot") / "eval" / "chat_1.csv").read_text().splitlines()))


def arguments(source: Path, **more: Any) -> list[str]:
    settings = {**SETTINGS, "source": source, **more}
    return ["--experiment=eval_chat", *(f"--set={name}={value}" for name, value in settings.items())]


def test_all_tasks_are_in_the_table_and_the_record(source: Path, capsys: pytest.CaptureFixture[str]):
    assert launch.main(["launch.py", *arguments(source)]) == 0
    out = capsys.readouterr().out
    *rows, last = table()
    assert [row["Task"] for row in rows] == NAMES and last["Task"] == "ChatCORE"
    assert [int(row["Total"]) for row in rows] == [4, 4, 4, 4, 1, 4]
    for row in rows:
        accuracy = int(row["Right"]) / int(row["Total"])
        assert float(row["Accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        baseline = 0.25 if row["Task"] in NAMES[:3] else 0
        assert float(row["Centered"]) == pytest.approx((accuracy - baseline) / (1 - baseline), abs=1e-6)
        assert f"{row['Right']} of {row['Total']}" in out
    core = sum(float(row["Centered"]) for row in rows[:5]) / 5
    assert float(last["Centered"]) == pytest.approx(core, abs=1e-5)
    (record,) = logger.read_evaluations(run_folder("bot"))
    assert (record["step"], record["stage"], record["failed"]) == (1, "sft", {})
    assert record["metrics"]["chat/ChatCORE"] == pytest.approx(core, abs=1e-5)
    assert set(record["metrics"]) == {f"chat/{name}" for name in [*NAMES, "ChatCORE", *LENIENT]}
    assert [row["Task"] + "-lenient" for row in table() if row["Lenient"]] == LENIENT
    assert out.count("by the lenient check") == 2
    assert not partial().exists()
    assert "max_problems=4: not of all" in out and "--experiment=chat --set run=bot" in out


def test_failed_tasks_are_named_and_retried(source: Path, capsys: pytest.CaptureFixture[str]):
    (source / "humaneval_test.jsonl").unlink()
    (source / "gsm8k_test.jsonl").write_text('{"question": "What?", "solution": "#### 1"}\n')
    with pytest.raises(UserError, match="2 of 6 tasks failed: gsm8k, humaneval"):
        evaluate(source)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if " failed: " in line}
    assert "has no column answer" in lines["GSM8K"] and "has no file of humaneval" in lines["HumanEval"]
    assert [row["Task"] for row in table()] == ["ARC-Easy", "ARC-Challenge", "MMLU", "SpellingBee"]
    (record,) = logger.read_evaluations(run_folder("bot"))
    assert set(record["failed"]) == {"GSM8K", "HumanEval"} and "chat/ChatCORE" not in record["metrics"]
    with partial().open("a") as file:
        file.write('{"task": "gsm8k", "ri')  # from a killed process

    (source / "gsm8k_test.jsonl").unlink()  # under the old name, `datasets` might give the old rows
    for name in ("humaneval_test", "gsm8k_test"):
        task_rows.write(source / f"{name}.jsonl", *ROWS[name])
    evaluate(source)
    assert capsys.readouterr().out.count("done before") == 4
    assert len(table()) == 7 and not partial().exists()
    latest = logger.read_evaluations(run_folder("bot"))[-1]["metrics"]
    assert "chat/ChatCORE" in latest and record["metrics"].items() <= latest.items()


def test_results_are_reused_for_the_same_model_and_settings(source: Path, capsys: pytest.CaptureFixture[str]):
    def output(mmlu: str = "mmlu", **settings: Any) -> str:
        with pytest.raises(UserError, match="1 of 2 tasks failed"):  # so the results of the other are kept
            evaluate(source, tasks=(mmlu, "gsm8k:/nowhere"), **settings)
        return capsys.readouterr().out

    assert "done before" not in output()
    assert "done before" in output() and "done before" in output(compile=True)
    assert "its results are ignored" in output(f"mmlu:{source}/mmlu_test.jsonl"), "rows of another file"
    assert "its results are ignored" in output(max_tokens=9)
    assert "done before" in output()
    shutil.rmtree(run_folder("bot") / "checkpoints")
    save_run(source.parent, config=dataclasses.replace(CONFIG, n_layer=1), stage="sft")
    assert "its results are ignored" in output()
    partial().write_text("no json\n")
    with pytest.raises(UserError, match="not valid JSON"):
        evaluate(source)


def test_tasks_with_options_and_sources(source: Path):
    evaluate(Path("/nowhere"), tasks=(f"mmlu:{source}/mmlu_test.jsonl", "arithmetic:train:size=3", "arithmetic"))
    totals = {"MMLU": "4", "arithmetic:train:size=3": "3", "Arithmetic": "4"}
    assert {row["Task"]: row["Total"] for row in table()} == totals
    for tasks in ((), ("mmlu", "gsm8k", "mmlu")):
        with pytest.raises(UserError, match="at least one task, each once"):
            evaluate(source, tasks=tasks)
    with pytest.raises(UserError, match="1 of 1 tasks failed: mmmlu"):
        evaluate(source, tasks=("mmmlu",))


@pytest.mark.slow
def test_two_ranks_write_the_table_of_one(source: Path):
    settings = {"slots": 1, "batch_tokens": 300}
    evaluate(source, tasks=("arc_easy", "mmlu", "arithmetic"), **settings)
    want = table()
    (run_folder("bot") / "eval" / "chat_1.csv").unlink()
    outs = ranks.launch(2, *arguments(source, tasks="arc_easy,mmlu,arithmetic", **settings))
    assert table() == want and outs[1] == ""
    assert len(logger.read_evaluations(run_folder("bot"))) == 2
