"""eval_base: what it writes and prints, resuming after a stop or an error, and two ranks."""

import csv
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import ranks
import task_rows
from core_ranks import BUNDLE, small_config, small_tokenizer
from small_model import random_params
from tiny_run import save_run

import launch
from nanochat.metrics import logger

LABELS = ["arc_easy", "copa", "winograd", "winogrande", "jeopardy", "lambada_openai"]
SETTINGS = (f"bundle={BUNDLE}", "device=cpu", "prompts=The cat", "sample_tokens=5", "free_samples=1", "free_tokens=4")


def save(base: Path, seed: int) -> None:
    settings = {"data.source": str(base / "texts"), "data.text_column": "body", "eval.tokens": 640, "seed": 1}
    shape, tok = small_config(), small_tokenizer()
    params = random_params(shape, seed)
    save_run(base, steps=(7,), config=shape, params=params, tok=tok, settings=settings, stage="base")


@pytest.fixture
def base(base: Path) -> Path:
    """A base folder with texts, and a run that was trained on them."""
    rng = random.Random(0)
    for name in ("train", "val"):
        rows = [{"body": " ".join(rng.choices(["the", "cat", "sat", "up"], k=40))} for _ in range(60)]
        task_rows.write(base / "texts" / f"{name}.jsonl", *rows)
    save(base, seed=0)
    return base


def main(*settings: str) -> int:
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return launch.main(["launch.py", "--experiment=eval_base", *words])


def table(base: Path) -> dict[str, list[str]]:
    lines = (base / "runs/bot/eval/core_7.csv").read_text().splitlines()
    return {name: values for name, *values in csv.reader(lines)}


def test_samples_bits_per_byte_and_core(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main() == 0
    out = capsys.readouterr().out
    (row,) = logger.read_evaluations(base / "runs/bot")
    assert (row["step"], row["stage"], row["failed"]) == (7, "base", {})
    recorded = row["metrics"]
    names = [f"core/{label}{what}" for label in LABELS for what in ("", "/accuracy")]
    assert sorted(recorded) == sorted(["train/bpb", "val/bpb", "core/CORE", *names])
    scores = table(base)
    assert list(scores) == ["Task", *LABELS, "CORE"]
    for label in LABELS:
        assert float(scores[label][0]) == pytest.approx(recorded[f"core/{label}/accuracy"], abs=1e-6)
        assert float(scores[label][1]) == pytest.approx(recorded[f"core/{label}"], abs=1e-6)
        assert re.search(rf"\d/6 {label} +[\d.]+% +-?[\d.]+ +\d rows, \S+s\n", out), label
    assert float(scores["CORE"][1]) == pytest.approx(sum(recorded[f"core/{label}"] for label in LABELS) / 6, abs=1e-6)
    assert f"{recorded['val/bpb']:.4f} bits per byte of {base / 'texts'}" in out
    assert recorded["val/bpb"] != recorded["train/bpb"]
    samples = map(json.loads, (base / "runs/bot/eval/samples_7.jsonl").read_text().splitlines())
    assert [(s["prompt"], s["temperature"]) for s in samples] == [("The cat", 0.0), ("", 1.0)]
    assert "of 6 of the 22 published tasks: not comparable with published numbers" in out
    assert "next: python launch.py --experiment=sft --set run=bot" in out


def test_finished_tasks_are_skipped_until_something_changes(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main("tasks=core") == 0
    first, kept = table(base), base / "runs/bot/eval/core_7.partial.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    kept.write_text("".join(lines[:3]) + lines[3][:20])  # killed while writing
    capsys.readouterr()

    def done(*settings: str) -> int:
        assert main("tasks=core", *settings) == 0
        return capsys.readouterr().out.count("done before")

    assert done() == 3 and table(base) == first
    assert done("tokens_per_batch=300") == 6 and table(base) == first
    assert done("max_tokens=60") == 0
    assert done("max_tokens=60", "max_per_task=8") == 5, "jeopardy alone has more rows"
    assert done("max_tokens=60", "max_per_task=8", "overwrite=true") == 0
    shutil.copytree(BUNDLE, base / "bundle")
    path = base / "bundle/eval_data/commonsense_reasoning/copa.jsonl"
    path.write_text(path.read_text().replace("faucet", "tap"))
    assert done("max_tokens=60", "max_per_task=8", f"bundle={base / 'bundle'}") == 5
    shutil.rmtree(base / "runs/bot/checkpoints")
    save(base, seed=1)
    assert done("max_tokens=60", "max_per_task=8") == 0, "another model, of the same name and step"


def test_failed_task_is_reported_and_retried(base: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(BUNDLE, base / "bundle")
    copa = base / "bundle/eval_data/commonsense_reasoning/copa.jsonl"
    text = copa.read_text()
    copa.write_text(text + "{}\n")
    (base / "bundle/archive.sha256").write_text("abc  eval_bundle.zip\n")
    assert main("tasks=core", f"bundle={base / 'bundle'}") == 1
    out, err = capsys.readouterr()
    assert re.search(r"\d/6 copa +failed: \S+copa\.jsonl:9: expected a string", out)
    assert err.startswith("error: 1 failed: core/copa, and so CORE, the mean over all its tasks; ") and "retries" in err
    assert "CORE" not in table(base) and len(table(base)) == 6
    (row,) = logger.read_evaluations(base / "runs/bot")
    assert list(row["failed"]) == ["core/copa"]
    assert "core/winograd" in row["metrics"] and "core/CORE" not in row["metrics"]
    assert '"core_bundle_sha256": "abc"' in (base / "runs/bot/evaluations.jsonl").read_text()
    copa.write_text(text)
    assert main("tasks=core", f"bundle={base / 'bundle'}") == 0
    assert capsys.readouterr().out.count("done before") == 5
    assert "CORE" in table(base)


def test_missing_data_does_not_stop_core(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main("tasks=bpb,core", f"source={base / 'nothing'}") == 1
    out, err = capsys.readouterr()
    assert "bpb failed: data.source=" in out and err.startswith("error: 1 failed: bpb; the reasons are above")
    assert "core/CORE" in logger.read_evaluations(base / "runs/bot")[-1]["metrics"]


def test_wrong_bundle_fails_at_once(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main(f"bundle={base}") == 1
    wrong = f"error: bundle={base}: has no core.yaml; set the folder of the unpacked eval_bundle.zip\n"
    assert capsys.readouterr() == ("", wrong), "before anything is evaluated"


@pytest.mark.slow
def test_two_ranks_equal_one(base: Path):
    assert main("device_batch_size=3") == 0  # rows of a step that do not divide the rows that count
    one, scores = logger.read_evaluations(base / "runs/bot")[-1]["metrics"], table(base)
    samples = (base / "runs/bot/eval/samples_7.jsonl").read_text()
    shutil.rmtree(base / "runs/bot/eval")
    words = [f"--set={setting}" for setting in SETTINGS]
    out = "".join(ranks.launch(2, "--experiment=eval_base", *words, env={"NANOCHAT_BASE_DIR": str(base)}))
    two = logger.read_evaluations(base / "runs/bot")[-1]["metrics"]
    assert two == pytest.approx(one, rel=1e-6) and list(two) == list(one)
    assert {k: v for k, v in two.items() if "core" in k} == {k: v for k, v in one.items() if "core" in k}
    assert table(base) == scores and (base / "runs/bot/eval/samples_7.jsonl").read_text() == samples
    assert out.count("arc_easy") == 1, "one rank prints"
