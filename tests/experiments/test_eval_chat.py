"""eval_chat: its table and record, failed tasks that are retried, partial results, and two ranks."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from tiny_run import TOK, save_run

import launch
from experiments import eval_chat
from nanochat import checkpoint, distributed, jsonl
from nanochat.config import UserError
from nanochat.eval import Score, chat_eval
from nanochat.metrics import logger
from nanochat.model import ModelConfig

CONFIG = ModelConfig(sequence_len=160, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy_test": [
        {
            "question": f"Which is {i}?",
            "choices": {"label": ["A", "B"], "text": [str(i), "x"]},
            "answerKey": "AB"[i % 2],
        }
        for i in range(9)
    ],
    "mmlu_test": [
        {"question": f"Which is {i}?", "choices": list("wxyz"), "answer": i % 4, "subject": "letters"} for i in range(9)
    ],
    "gsm8k_test": [{"question": f"What is {i}?", "answer": f"<<{i}+0={i}>>{i}\n#### {i}"} for i in range(5)],
    "humaneval_test": [
        {
            "prompt": "def one():\n",
            "canonical_solution": "    return 1",
            "entry_point": "one",
            "test": "def check(f): f()",
        }
    ],
}
ROWS["arc_challenge_test"] = ROWS["arc_easy_test"]
LIMITS = ["--set", "max_problems=4", "--set", "max_tokens=6", "--set", "device=cpu"]


@pytest.fixture
def source(base: Path) -> Path:
    """Return a folder with a few rows of each task, beside a run called bot."""
    save_run(base, config=CONFIG, stage="sft")
    folder = base / "tasks"
    folder.mkdir()
    for name in ROWS:
        put(folder, name)
    return folder


def put(folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))


def evaluate(source: Path, **settings: Any) -> None:
    known: dict[str, Any] = {"run": "bot", "source": source, "max_problems": 4, "max_tokens": 6, "device": "cpu"}
    with distributed.distributed_context("cpu") as here:
        eval_chat.run(dataclasses.replace(eval_chat.config(), **(known | settings)), here)


def table(source: Path) -> list[dict[str, str]]:
    with (source.parent / "runs" / "bot" / "eval" / "chat_1.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def partial(source: Path) -> Path:
    return source.parent / "runs" / "bot" / "eval" / "chat_1.partial.jsonl"


def test_all_tasks_are_in_the_table_and_the_record(source: Path, capsys: pytest.CaptureFixture[str]):
    command = ["launch.py", "--experiment=eval_chat", "--set", "run=bot", "--set", f"source={source}", *LIMITS]
    assert launch.main(command) == 0
    out = capsys.readouterr().out
    rows = table(source)
    names = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    assert [row["Task"] for row in rows] == [*names, "ChatCORE"]
    assert [int(row["Total"]) for row in rows[:-1]] == [4, 4, 4, 4, 1, 4]
    for row in rows[:-1]:
        accuracy = int(row["Right"]) / int(row["Total"])
        assert float(row["Accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        baseline = 0.25 if row["Task"] in names[:3] else 0
        assert float(row["Centered"]) == pytest.approx((accuracy - baseline) / (1 - baseline), abs=1e-6)
        assert f"{row['Right']} of {row['Total']}" in out
    core = sum(float(row["Centered"]) for row in rows[:5]) / 5
    assert float(rows[-1]["Centered"]) == pytest.approx(core, abs=1e-5)
    (record,) = logger.read_evaluations(source.parent / "runs" / "bot")
    assert (record["step"], record["stage"], record["failed"]) == (1, "sft", {})
    assert record["metrics"]["chat/ChatCORE"] == pytest.approx(core, abs=1e-5)
    assert set(record["metrics"]) == {f"chat/{name}" for name in [*names, "ChatCORE"]}
    assert not partial(source).exists()
    assert "max_problems=4: not of all" in out and "--experiment=chat --set run=bot" in out


def test_failed_tasks_are_named_and_retried(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (source / "humaneval_test.jsonl").unlink()
    (source / "gsm8k_test.jsonl").write_text('{"question": "What?", "solution": "#### 1"}\n')
    with pytest.raises(UserError, match="2 of 6 tasks failed: gsm8k, humaneval"):
        evaluate(source)
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if "failed:" in line}
    assert "has no column answer" in lines["GSM8K"] and "has no file of humaneval" in lines["HumanEval"]
    assert [row["Task"] for row in table(source)] == ["ARC-Easy", "ARC-Challenge", "MMLU", "SpellingBee"]
    (record,) = logger.read_evaluations(source.parent / "runs" / "bot")
    assert set(record["failed"]) == {"GSM8K", "HumanEval"} and "chat/ChatCORE" not in record["metrics"]
    with partial(source).open("a") as file:
        file.write('{"task": "gsm8k", "ri')  # from a killed process

    put(source, "humaneval_test")
    (source / "gsm8k_test.jsonl").unlink()  # under the old name, `datasets` might give the old rows
    put(source, "gsm8k_test")
    asked = []
    score = chat_eval.score
    monkeypatch.setattr(
        chat_eval, "score", lambda bot, task, *args, **how: (asked.append(task.name), score(bot, task, *args, **how))[1]
    )
    evaluate(source)
    assert asked == ["gsm8k", "humaneval"]
    assert capsys.readouterr().out.count("done before") == 4
    assert len(table(source)) == 7 and not partial(source).exists()
    last = logger.latest_evaluation(source.parent / "runs" / "bot")
    first = {name: value for name, value in record["metrics"].items()}
    assert "chat/ChatCORE" in last and {name: last[name] for name in first} == first


def test_partial_results_need_the_same_settings_and_checkpoint(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert eval_chat.read_partial(partial(source), {"seed": 1}) == {}
    jsonl.append(partial(source), {"task": "mmlu", "right": 3, "total": 4, "baseline": 0.25})
    assert eval_chat.read_partial(partial(source), {"seed": 1}) == {"mmlu": Score(3, 4, 0.25)}
    assert eval_chat.read_partial(partial(source), {"seed": 2}) == {}
    assert "other settings" in capsys.readouterr().out
    assert eval_chat.read_partial(partial(source), {"seed": 1}) == {}

    def settings(**changed: Any) -> dict[str, Any]:
        with distributed.distributed_context("cpu") as here:
            config = dataclasses.replace(eval_chat.config(), run="bot", **changed)
            bot = checkpoint.load("bot", device="cpu", dtype=torch.float32)
            return json.loads(json.dumps(eval_chat.result_settings(config, bot, here)))

    same = settings()
    assert settings(tasks=("gsm8k",), compile=True) == same
    assert settings(max_tokens=9) != same and settings(source=source) != same
    save_run(source.parent / "elsewhere", steps=(1,), config=CONFIG, params=None)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(source.parent / "elsewhere"))
    assert settings() == same  # the same weights
    save_run(source.parent / "third", steps=(2,), config=CONFIG)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(source.parent / "third"))
    assert settings() != same
    partial(source).write_text("no json\n")
    with pytest.raises(UserError, match="not valid JSON"):
        eval_chat.read_partial(partial(source), {})


def test_tasks_with_options_and_sources(source: Path):
    evaluate(Path("/nowhere"), tasks=(f"mmlu:{source}/mmlu_test.jsonl", "arithmetic:train:size=3", "arithmetic"))
    assert [(row["Task"], row["Total"]) for row in table(source)] == [
        ("MMLU", "4"),
        ("arithmetic:train:size=3", "3"),
        ("Arithmetic", "4"),
    ]
    for tasks in ((), ("mmlu", "gsm8k", "mmlu")):
        with pytest.raises(UserError, match="at least one task, each once"):
            evaluate(source, tasks=tasks)
    with pytest.raises(UserError, match="1 of 1 tasks failed: mmmlu"):
        evaluate(source, tasks=("mmmlu",))
    with pytest.raises(UserError, match="no such run"):
        evaluate(source, run="other")


@pytest.mark.slow
def test_two_ranks_write_the_table_of_one(source: Path):
    tasks = ("arc_easy", "mmlu", "arithmetic")
    evaluate(source, tasks=tasks, slots=1, batch_tokens=300)
    want = table(source)
    (source.parent / "runs" / "bot" / "eval" / "chat_1.csv").unlink()
    settings = ["run=bot", f"source={source}", f"tasks={','.join(tasks)}", "slots=1", "batch_tokens=300"]
    outs = ranks.launch(2, "--experiment=eval_chat", *LIMITS, *(f"--set={value}" for value in settings))
    assert table(source) == want and outs[1] == ""
    assert len(logger.read_evaluations(source.parent / "runs" / "bot")) == 2
