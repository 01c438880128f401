"""The report card: what it says of a chain of runs, and of one that lacks nearly everything."""

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
import small_model
import torch

from experiments import report as experiment
from nanochat import checkpoint, distributed, model, train
from nanochat.config import UserError
from nanochat.data import tokenizer
from nanochat.distributed import hardware
from nanochat.metrics import Machine, Sample, logger, report, run_folder
from nanochat.model import ModelConfig

SHAPE = ModelConfig(sequence_len=64, vocab_size=270, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
HERE = Machine({"GPU": "8 x NVIDIA H100", "CPU": "a | b"}, 24.0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(["the cat sat on the mat " * 9], 270), folder)
    return folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a made-up run was made with."""

    depth: int = 1
    num_iterations: int = 40


def make(base: Path, words: Path, name: str, stage: str, parent: dict[str, Any] | None = None, steps: int = 40) -> Path:
    """Write a run as a training stage leaves it: record, settings and a checkpoint."""
    folder = base / "runs" / name
    log = logger.open_log(folder, config=Settings(num_iterations=steps))
    for step in range(10, steps + 1, 10):
        row = {"train/loss": 6.0 - step / 40, "train/loss_ema": 6.1 - step / 40, "train/tokens": step * 512}
        logger.write(log, step, row | {"perf/step_seconds": 90.0, "perf/wall_seconds": 100.0 * step})
        extra = {"rl/reward": step / 80, "rl/answer_tokens": 20.0, "rl/pass_at_1": 0.5, "rl/pass_at_8": 0.75}
        logger.write(log, step, {"val/bpb": 2.0 - step / 100} if stage != "rl" else extra)
    logger.close(log)
    state = train.init(small_model.random_params(SHAPE), model.spec(SHAPE))._replace(step=torch.tensor(steps))
    meta = {
        "stage": stage, "parent": parent, "model": vars(SHAPE), "config": {}, "num_steps": steps, "torch": "2.13.0",
        "progress": {"done": True},
    }  # fmt: skip
    manager = checkpoint.open_manager(folder / "checkpoints")
    checkpoint.save(manager, state, meta, files={file: words / file for file in tokenizer.FILES})
    checkpoint.close(manager)
    return folder


@pytest.fixture(scope="module")
def generations(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its fine-tuned child and that one's child by practice, with evaluations; to be copied."""
    base = tmp_path_factory.mktemp("generations")
    first = make(base, words, "d1", "base")
    logger.append_evaluation(first, 40, "base", {"core/CORE": 0.2222, "core/copa": 0.1, "core/copa/accuracy": 0.55})
    second = make(base, words, "d1_sft", "sft", {"run": "d1", "step": 40, "stage": "base"})
    logger.append_evaluation(second, 40, "sft", {"chat/GSM8K": 0.0301, "chat/ARC-Easy": 0.41, "chat/Spelling": 0.9})
    logger.append_evaluation(second, 40, "sft", {"chat/GSM8K": 0.0312}, {"MMLU": "no network"})
    last = make(base, words, "d1_rl", "rl", {"run": "d1_sft", "step": 40, "stage": "sft"})
    logger.append_evaluation(last, 40, "rl", {"chat/GSM8K": 0.0512})
    return base


@pytest.fixture
def last(base: Path, generations: Path) -> Path:
    """The youngest of three generations, in the base folder."""
    shutil.copytree(generations, base, dirs_exist_ok=True)
    return base / "runs" / "d1_rl"


def rows(page: str) -> dict[str, list[str]]:
    """Return the cells of the page's tables by the name to their left; of equal names, the first."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| :"):
            name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found.setdefault(name, cells)
    return found


@pytest.mark.slow
def test_all_stages_are_side_by_side(last: Path) -> None:
    runs = run_folder.ancestors(last)
    assert [(one.name, one.stage, one.step) for one in runs] == [
        ("d1", "base", 40),
        ("d1_sft", "sft", 40),
        ("d1_rl", "rl", 40),
    ]
    page = report.write(runs, HERE).read_text("utf-8")
    found = rows(page)
    assert found[""] == ["BASE", "SFT", "RL"], "stages that there are"
    assert found["CORE"] == ["0.2222", "-", "-"]
    assert found["ARC-Easy"] == ["-", "0.4100", "-"]
    assert found["GSM8K"] == ["-", "0.0312", "0.0512"], "the last evaluation of a metric counts"
    assert found["bits per byte"] == ["1.6000", "1.6000", "-"]
    assert found["Spelling"] == ["-", "0.9000", "-"]
    assert found["pass@8"] == ["-", "-", "0.7500"]
    assert found["copa"] == ["0.5500", "0.1000"]
    assert "later stages on conversations" in page
    assert list(found)[1:7] == ["CORE", "ARC-Easy", "GSM8K", "bits per byte", "Spelling", "pass@1"]
    assert "- Not measured: ARC-Challenge, MMLU, HumanEval, SpellingBee, ChatCORE." in page


def test_times_and_costs_add_up(last: Path) -> None:
    page = report.write(run_folder.ancestors(last), HERE, seconds={"tokenizer": 600.0}).read_text("utf-8")
    found = rows(page)
    # 40 steps of 90 s; 4000 s of wall time, at 24 dollars an hour.
    assert found["BASE"] == ["40", "20.5k", "1h00m", "1h07m", "5.69", "$26.67"]
    assert found["tokenizer"] == ["", "", "", "10m00s", "", "$4.00"]
    assert found["total"] == ["", "", "3h00m", "3h30m", "", "$84.00"]
    free = rows(report.write(run_folder.ancestors(last), Machine({}, None)).read_text("utf-8"))
    assert free["BASE"][-1] == free["total"][-1] == "-" and "price" not in free


@pytest.mark.slow
def test_every_picture_is_drawn_and_named_on_the_page(last: Path) -> None:
    page = report.write(run_folder.ancestors(last), HERE).read_text("utf-8")
    files = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert {Path(file).name for file in files} >= {"base_loss.svg", "base_bpb.svg", "sft_bpb.svg", "rl_reward.svg"}
    for file in files:
        assert ET.parse(last / file).getroot().tag.endswith("svg")
    assert sorted(path.name for path in (last / "report").iterdir()) == sorted(Path(file).name for file in files)


def test_where_it_was_made_is_on_the_page(base: Path, words: Path, tmp_path: Path) -> None:
    root = tmp_path / "code"
    (root / "nanochat").mkdir(parents=True)
    (root / "nanochat" / "a.py").write_text("x = 1\ny = 2\n")
    (root / "launch.py").write_text("z = 3\n")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch", "numpy"]\n')
    git = functools.partial(subprocess.run, cwd=root, check=True, capture_output=True)
    git(["git", "init", "-q", "-b", "trunk"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a | b <i>"])
    (root / "launch.py").write_text("z = 4\n")
    page = report.write(run_folder.ancestors(make(base, words, "d1", "base")), HERE, root=root).read_text("utf-8")
    found = rows(page)
    assert re.fullmatch(r"`[0-9a-f]{10}` on trunk, with changes in 1 files: a \\\| b \\<i\\>", found["commit"][0])
    assert found["code"][0].startswith("2 files, 3 lines, 18 bytes") and "2 dependencies" in found["code"][0]
    assert found["CPU"] == ["a \\| b"] and found["price"] == ["about $24.00 per hour"]
    assert f"torch {torch.__version__}" in found["versions"][0]
    assert "depth           1" in page


def test_no_git_and_no_files_are_a_line_less(base: Path, tmp_path: Path) -> None:
    folder = base / "runs" / "bare"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_iterations": 500}')
    page = report.write(run_folder.ancestors(folder), Machine({}, None), root=tmp_path).read_text("utf-8")
    assert "no checkpoint yet, step 0 of 500" in page and "Not measured: CORE, " in page
    assert "commit" not in rows(page) and "## Curves" not in page and "## Samples" not in page


def test_a_run_under_way(base: Path, words: Path) -> None:
    folder = make(base, words, "d1", "base")
    logger.append_evaluation(folder, 20, "base", {"core/CORE": 0.1})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "train/loss": 1.0, "val/bpb": 9.9}\n{"step": 60, "tr')  # torn: it is being written
    page = report.write(run_folder.ancestors(folder), HERE).read_text("utf-8")
    assert "checkpoint of step 40, now at step 50" in page
    assert rows(page)["CORE"][0] == "0.1000 (step 20)", "an evaluation of an earlier step says so"
    assert rows(page)["bits per byte"][0] == "1.6000", "what comes after the checkpoint is not of it"


def test_what_was_measured_on_the_way_is_marked(base: Path, words: Path) -> None:
    folder = make(base, words, "d1_sft", "sft")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "chat/MMLU": 0.31, "chat/GSM8K": 0.02}\n')
    logger.append_evaluation(folder, 40, "sft", {"chat/GSM8K": 0.03})
    page = report.write(run_folder.ancestors(folder), HERE).read_text("utf-8")
    assert rows(page)["MMLU"][0] == "0.3100\\*" and rows(page)["GSM8K"][0] == "0.0300"
    assert "on a subset of the problems" in page


def test_an_ancestor_that_is_gone_or_was_trained_on(base: Path, words: Path) -> None:
    last = make(base, words, "d1_sft", "sft", {"run": "d1", "step": 30, "stage": "base"})
    page = report.write(run_folder.ancestors(last), HERE).read_text("utf-8")
    assert "started from `d1`, step 30 (base), whose folder is gone" in page
    make(base, words, "d1", "base")
    runs = run_folder.ancestors(last)
    assert (runs[0].step, runs[0].steps) == (30, (40,)), "the child is of step 30, whatever is kept"
    assert rows(report.write(runs, HERE).read_text("utf-8"))["bits per byte"][0] == "1.7000"
    make(base, words, "loop", "sft", {"run": "loop", "step": 40, "stage": "base"})
    with pytest.raises(UserError, match="its own ancestor"):
        run_folder.ancestors(base / "runs" / "loop")


def test_text_of_a_model_cannot_break_the_page(base: Path, words: Path) -> None:
    runs = run_folder.ancestors(make(base, words, "d1", "base"))
    text = "<script>alert(1)</script>\n```\n# not a title"
    odd = Sample("sft", "Ring!", "a bell: \x07, a bidi mark: \u202e.", True)
    samples = [Sample("base", "Say:", text, False), Sample("sft", "Why?", text, True), odd]
    page = report.write(runs, HERE, samples).read_text("utf-8")
    fences = re.findall(r"^`{4}(?:text)?$", page, re.MULTILINE)
    assert "a bell: \ufffd, a bidi mark: \ufffd." in page
    assert len(fences) == 4 and page.count(text) == 2
    assert "user: Why?\nsft:  <script>" in page and "Say:<script>" in page


@pytest.mark.parametrize(
    ("names", "price"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, 24.0),
        (["NVIDIA A100-SXM4-80GB"], 1.80),
        (["Tesla V100-SXM2-16GB"] * 2, 1.10),
        (["NVIDIA GeForce RTX 4090"], 0.40),
        (["NVIDIA H200"], 3.50),
        (["AMD Instinct MI300X"], 2.0),
        ([], None),
    ],
)
def test_prices(names: list[str], price: float | None) -> None:
    assert hardware.dollars_per_hour(names) == (None if price is None else pytest.approx(price))


@pytest.mark.slow
def test_the_experiment_writes_samples_of_every_stage(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(
        experiment.config(),
        run="d1_rl",
        prompts=("the cat",),
        questions=("the mat?",),
        sample_tokens=5,
        answer_tokens=5,
    )
    experiment.run(config, distributed.init("cpu", "float32"))
    page = (last / "report.md").read_text("utf-8")
    assert re.search(r"```text\nthe cat[^`]+\n```", page)
    assert re.search(r"```text\nuser: the mat\?\nsft:  [^`]+\nrl:   [^`]+\n```", page)
    out = capsys.readouterr().out
    assert f"report of d1 → d1_sft → d1_rl: {last / 'report.md'}" in out and "| GSM8K" in out
    experiment.run(dataclasses.replace(config, samples=False), distributed.init("cpu", "float32"))
    assert "## Samples" not in (last / "report.md").read_text("utf-8")


def test_the_experiment_without_a_run_says_what_to_do(base: Path, words: Path) -> None:
    here = distributed.init("cpu", "float32")
    with pytest.raises(UserError, match="quickstart"):
        experiment.run(experiment.config(), here)
    make(base, words, "d1", "base")
    with pytest.raises(UserError, match="did you mean d1"):
        experiment.run(dataclasses.replace(experiment.config(), run="d11"), here)


@pytest.mark.slow
def test_two_ranks_write_the_page_of_one(last: Path) -> None:
    settings = {"run": "d1_rl", "questions": ("the mat?",), "sample_tokens": 4, "answer_tokens": 4}
    experiment.run(dataclasses.replace(experiment.config(), **settings), distributed.init("cpu", "float32"))
    alone = (last / "report.md").read_text("utf-8").partition("## Code and machine")[0]
    words = [f"--set={name}={x[0] if isinstance(x, tuple) else x}" for name, x in settings.items()]
    outs = gloo.launch(2, "--experiment=report", "--set=device=cpu", *words)
    assert outs[0] and not outs[1]
    assert (last / "report.md").read_text("utf-8").partition("## Code and machine")[0] == alone
