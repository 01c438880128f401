"""The report: what it says of a chain of runs, and of one that lacks nearly everything."""

import dataclasses
import functools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import ranks as gloo
import torch
from tiny_run import save_run

from experiments import report as experiment
from nanochat import distributed
from nanochat.config import UserError, override
from nanochat.metrics import Sample, logger, machine, report, run_folder

MACHINE = {"GPU": "8 x NVIDIA H100", "CPU": "a | b"}


@dataclasses.dataclass(frozen=True)
class Settings:
    depth: int = 1
    num_iterations: int = 40


def make(base: Path, name: str, stage: str, parent: dict[str, Any] | None = None) -> Path:
    """Write a run of 40 steps as a training stage leaves it: metrics, settings and a checkpoint."""
    meta = {"stage": stage, "parent": parent, "num_steps": 40, "torch": "2.13.0", "progress": {"done": True}}
    folder = save_run(base, name, steps=(40,), **meta)
    log = logger.open_log(folder, config=Settings())
    for step in range(10, 41, 10):
        row = {"train/loss": 6.0 - step / 40, "train/loss_ema": 6.1 - step / 40, "train/tokens": step * 512}
        logger.write(log, step, row | {"perf/step_seconds": 90.0, "perf/wall_seconds": 100.0 * step})
        extra = {"rl/reward": step / 80, "rl/answer_tokens": 20.0, "rl/pass_at_1": 0.5, "rl/pass_at_8": 0.75}
        logger.write(log, step, {"val/bpb": 2.0 - step / 100} if stage != "rl" else extra)
    return folder


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its fine-tuned child and that one's child by RL, with evaluations; to be copied."""
    base = tmp_path_factory.mktemp("generations")
    first = make(base, "d1", "base")
    logger.append_evaluation(first, 40, "base", {"core/CORE": 0.2222, "core/copa": 0.1, "core/copa/accuracy": 0.55})
    second = make(base, "d1_sft", "sft", {"run": "d1", "step": 40, "stage": "base"})
    logger.append_evaluation(second, 40, "sft", {"chat/GSM8K": 0.0301, "chat/ARC-Easy": 0.41, "chat/Spelling": 0.9})
    logger.append_evaluation(second, 40, "sft", {"chat/GSM8K": 0.0312}, {"MMLU": "no network"})
    last = make(base, "d1_rl", "rl", {"run": "d1_sft", "step": 40, "stage": "sft"})
    logger.append_evaluation(last, 40, "rl", {"chat/GSM8K": 0.0512, "chat/GSM8K-lenient": 0.0733})
    return base


@pytest.fixture
def last(base: Path, generations: Path) -> Path:
    shutil.copytree(generations, base, dirs_exist_ok=True)
    return base / "runs" / "d1_rl"


def write(folder: Path, price: float | None = 24.0, **options: Any) -> tuple[str, dict[str, list[str]]]:
    """Return the page, and the cells of its tables by the name to their left; of equal names, the first."""
    page = report.write(run_folder.ancestors(folder), MACHINE, price, **options).read_text("utf-8")
    rows: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| :"):
            name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows.setdefault(name, cells)
    return page, rows


def test_all_stages_are_side_by_side(last: Path) -> None:
    page, rows = write(last, seconds={"tokenizer": 600.0})
    assert "- **BASE** `d1`, step 40\n- **SFT** `d1_sft`, step 40\n- **RL** `d1_rl`, step 40\n" in page
    assert list(rows)[:7] == ["", "CORE", "ARC-Easy", "GSM8K", "GSM8K, lenient", "bits per byte", "Spelling"]
    assert rows[""] == ["BASE", "SFT", "RL"] and rows["CORE"] == ["0.2222", "-", "-"]
    assert rows["GSM8K"] == ["-", "0.0312", "0.0512"], "the last evaluation of a metric counts"
    assert rows["GSM8K, lenient"] == ["-", "-", "0.0733"] and "Lenient: of answers" in page
    assert rows["bits per byte"] == ["1.6000", "1.6000", "-"]
    assert rows["pass@8"] == ["-", "-", "0.7500"] and rows["copa"] == ["0.5500", "0.1000"]
    assert "later stages on conversations" in page
    assert "- Not measured: ARC-Challenge, MMLU, HumanEval, SpellingBee, ChatCORE." in page
    # 40 steps of 90 s; 4000 s of wall time, at 24 dollars an hour.
    assert rows["BASE"] == ["40", "20.5k", "1h00m", "1h07m", "5.69", "$26.67"]
    assert rows["tokenizer"] == ["", "", "", "10m00s", "", "$4.00"]
    assert rows["total"] == ["", "", "3h00m", "3h30m", "", "$84.00"]
    files = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert {Path(file).name for file in files} >= {"base_loss.svg", "base_bpb.svg", "sft_bpb.svg", "rl_reward.svg"}
    assert all(ET.parse(last / file).getroot().tag.endswith("svg") for file in files)
    assert sorted(path.name for path in (last / "report").iterdir()) == sorted(Path(file).name for file in files)
    _, rows = write(last, None)
    assert rows["BASE"][-1] == rows["total"][-1] == "-" and "price" not in rows


def test_code_and_machine_are_on_the_page(base: Path) -> None:
    root = base / "code"
    (root / "nanochat").mkdir(parents=True)
    (root / "nanochat" / "a.py").write_text("x = 1\ny = 2\n")
    (root / "launch.py").write_text("z = 3\n")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch", "numpy"]\n')
    git = functools.partial(subprocess.run, cwd=root, check=True, capture_output=True)
    git(["git", "init", "-q", "-b", "trunk"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a | b <i>"])
    (root / "launch.py").write_text("z = 4\n")
    page, rows = write(make(base, "d1", "base"), root=root)
    assert re.fullmatch(r"`[0-9a-f]{10}` on trunk, with changes in 1 files: a \\\| b \\<i\\>", rows["commit"][0])
    assert rows["code"][0].startswith("2 files, 3 lines, 18 bytes") and "2 dependencies" in rows["code"][0]
    assert rows["CPU"] == ["a \\| b"] and rows["price"] == ["about $24.00 per hour"]
    assert f"torch {torch.__version__}" in rows["versions"][0]
    assert "depth           1" in page


def test_missing_files_are_missing_sections(base: Path) -> None:
    folder = base / "runs" / "bare"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_iterations": 500}')
    page, rows = write(folder, None, root=base)
    assert "no checkpoint yet, now at step 0 of 500" in page and "Not measured: CORE, " in page
    assert "commit" not in rows and "## Curves" not in page and "## Samples" not in page


def test_running_run_reports_its_checkpoint(base: Path) -> None:
    folder = make(base, "d1", "base")
    logger.append_evaluation(folder, 20, "base", {"core/CORE": 0.1})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "train/loss": 1.0, "val/bpb": 9.9}\n{"step": 60, "tr')  # torn: it is being written
    page, rows = write(folder)
    assert "checkpoint of step 40, now at step 50" in page
    assert rows["CORE"] == ["0.1000 (step 20)"] and rows["bits per byte"] == ["1.6000"]


def test_scores_from_training_are_marked(base: Path) -> None:
    folder = make(base, "d1_sft", "sft")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "chat/MMLU": 0.31, "chat/GSM8K": 0.02}\n')
    logger.append_evaluation(folder, 40, "sft", {"chat/GSM8K": 0.03})
    page, rows = write(folder)
    assert rows["MMLU"] == ["0.3100\\*"] and rows["GSM8K"] == ["0.0300"]
    assert "on a subset of the problems" in page


def test_an_ancestor_that_is_gone_or_was_trained_on(base: Path) -> None:
    last = make(base, "d1_sft", "sft", {"run": "d1", "step": 30, "stage": "base"})
    assert "started from `d1`, step 30 (base), whose folder is gone" in write(last)[0]
    make(base, "d1", "base")
    parent = run_folder.ancestors(last)[0]
    assert (parent.step, parent.steps) == (30, (40,)), "the child is of step 30, whatever is kept"
    assert write(last)[1]["bits per byte"][0] == "1.7000"
    with pytest.raises(UserError, match="its own ancestor"):
        write(make(base, "loop", "sft", {"run": "loop", "step": 40, "stage": "base"}))


def test_text_of_a_model_cannot_break_the_page(base: Path) -> None:
    text = "<script>alert(1)</script>\n```\n# not a title"
    odd = Sample("sft", "Ring!", "a bell: \x07, a bidi mark: \u202e.")
    samples = [Sample("base", "Say:", text), Sample("sft", "Why?", text), odd]
    page, _ = write(make(base, "d1", "base"), samples=samples)
    fences = re.findall(r"^`{4}(?:text)?$", page, re.MULTILINE)
    assert "a bell: \ufffd, a bidi mark: \ufffd." in page
    assert len(fences) == 4 and page.count(text) == 2
    assert "user: Why?\nsft:  <script>" in page and "Say:<script>" in page


def test_price_of_known_and_unknown_gpus() -> None:
    gpus = [["NVIDIA H100 80GB HBM3"] * 8, ["AMD Instinct MI50"], []]
    assert [machine.dollars_per_hour(names) for names in gpus] == [24.0, machine.UNKNOWN_DOLLARS_PER_HOUR, None]


@pytest.mark.slow
def test_two_ranks_write_the_page_of_one_with_samples_of_every_stage(
    last: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["run=d1_rl", "prompts=the cat", "questions=the mat?", "sample_tokens=5", "answer_tokens=5"]
    experiment.run(override(experiment.config(), settings), distributed.init("cpu", "float32"))
    page = (last / "report.md").read_text("utf-8")
    assert re.search(r"```text\nthe cat[^`]+\n```", page)
    assert re.search(r"```text\nuser: the mat\?\nsft:  [^`]+\nrl:   [^`]+\n```", page)
    out = capsys.readouterr().out
    assert f"report of d1 → d1_sft → d1_rl: {last / 'report.md'}" in out and "| GSM8K" in out
    outs = gloo.launch(2, "--experiment=report", *(f"--set={word}" for word in ["device=cpu", *settings]))
    assert outs[0] and not outs[1]
    same, _, _ = (last / "report.md").read_text("utf-8").partition("## Code and machine")
    assert page.startswith(same)


def test_experiment_without_a_run_says_what_to_do(base: Path) -> None:
    here = distributed.init("cpu", "float32")
    with pytest.raises(UserError, match="quickstart"):
        experiment.run(experiment.config(), here)
    make(base, "d1", "base")
    with pytest.raises(UserError, match="did you mean d1"):
        experiment.run(dataclasses.replace(experiment.config(), run="d11"), here)
