"""CORE against the plain implementation in plain_core.py, row by row; seeds, ranks, the CSV, and errors."""

import dataclasses
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import core_ranks
import plain_core
import pytest
import ranks
import torch
from core_ranks import BUNDLE, small_config, small_tokenizer
from small_model import WINDOWED, random_params

from nanochat.config import UserError
from nanochat.data import PATTERN, Options, Tokenizer, download
from nanochat.eval import Question, core, core_bundle, likelihood
from nanochat.eval.core_bundle import CoreTask, Row
from nanochat.eval.likelihood import Prompt, Scored
from nanochat.model import Compute, ModelConfig

LABELS = ["arc_easy", "copa", "winograd", "winogrande", "jeopardy", "lambada_openai"]
WINDOWS = dataclasses.replace(WINDOWED, vocab_size=400)


def assert_as_plain(
    folder: Path, label: str, config: ModelConfig, tok: Tokenizer, max_tokens: int | None = None, **batch: Any
) -> None:
    params, max_tokens = random_params(config), max_tokens or 10 * config.sequence_len
    task = core_bundle.load(core_bundle.read(folder), label)
    questions = list(core.questions(task, tok, max_tokens))
    scored = likelihood.score(params, config, [q.prompts for q in questions], **batch)
    plain = plain_core.answers(folder, label, params, config, tok, max_tokens)
    for index, (question, scores, want) in enumerate(zip(questions, scored, plain, strict=True)):
        got = core.answer(question, scores)
        assert [prompt.ids for prompt in question.prompts] == want.prompts, (label, index)
        assert [(prompt.start, prompt.end) for prompt in question.prompts] == want.spans, (label, index)
        assert got.losses == pytest.approx(want.losses, abs=2e-5, nan_ok=True), (label, index)
        assert got.is_correct == want.is_correct, (label, index)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("tokens_per_batch", [1, 700, None])
def test_answers_equal_the_plain_implementation(label: str, tokens_per_batch: int | None):
    assert_as_plain(BUNDLE, label, small_config(), small_tokenizer(), tokens_per_batch=tokens_per_batch)


@pytest.mark.parametrize("label", ["arc_easy", "winograd", "jeopardy"])
@pytest.mark.parametrize("max_tokens", [3, 40, 150])
def test_long_prompts_keep_their_last_tokens(label: str, max_tokens: int):
    assert_as_plain(BUNDLE, label, WINDOWS, small_tokenizer(), max_tokens)


def test_order_of_rows_and_few_shot_examples_is_pinned():
    assert core.few_shot_indices(0, 40, 10) == [29, 8, 1, 6, 3, 36, 7, 23, 38, 37]
    assert core.few_shot_indices(7, 12, 3) == [10, 11, 8]
    assert core.few_shot_indices(5, 10, 0) == []
    bundle = core_bundle.read(BUNDLE)
    assert [row.line for row in core_bundle.load(bundle, "copa", 3).rows] == [1, 4, 8], "shuffled, then truncated"
    assert [row.line for row in core_bundle.load(bundle, "jeopardy").rows] == [1, 4, 8, 3, 2, 7, 5, 6, 9]


BYTES = Tokenizer(tuple(bytes([i]) for i in range(256)))
COPA = "eval_data/commonsense_reasoning/copa.jsonl"
Change = Callable[[Path], object]


def edited(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def test_rows_that_begin_with_space_are_encoded_with_the_text_before(tmp_path: Path):
    """There, a token may cross from one row to the next, so a row cannot be encoded by itself."""
    spaces = (" ", "\n", "", "  ")
    rows = [{"query": f"{space}q{i}", "choices": ["a", " b"], "gold": 1} for i, space in enumerate(spaces)]
    tok = Tokenizer((*BYTES.tokens, b"\n\n", b"\n\n\n", b"\n\n "), PATTERN)
    for kept in (rows, rows[2:3] * 2):
        folder = shutil.copytree(BUNDLE, tmp_path / str(len(kept)))
        (folder / COPA).write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        edited("core.yaml", "num_fewshot:\n  - 0", "num_fewshot:\n  - 1")(folder)
        config = dataclasses.replace(small_config(), vocab_size=tok.vocab_size)
        assert_as_plain(folder, "copa", config, tok)


def test_lowest_mean_loss_wins_and_a_continuation_is_correct_if_every_token_is_the_argmax():
    prompts = [Prompt([0], 1, 1)] * 3

    def choice(*scores: tuple[float, int]) -> int:
        return core.answer(Question(prompts, 1), [Scored(nats, 0, tokens) for nats, tokens in scores]).choice

    assert choice((4.0, 2), (3.0, 1), (9.0, 9)) == 2
    assert choice((4.0, 2), (2.0, 1), (6.0, 3)) == 0, "the first of equals"
    assert choice((9.0, 1), (2.0, 1), (0.0, 0)) == 1, "an answer without tokens has no loss"
    question = Question([Prompt([0], 1, 1)], None)
    assert core.answer(question, [Scored(1.5, 3, 3)]) == (True, 0, (0.5,))
    assert core.answer(question, [Scored(1.5, 2, 3)]) == (False, 0, (0.5,))


def test_scores_are_centered_and_averaged():
    results = core_ranks.evaluate(random_params(small_config()))
    arc = results.tasks["arc_easy"]
    right = sum(answer.is_correct for answer in arc.answers)
    assert (arc.rows, arc.right, arc.accuracy) == (8, right, right / 8)
    assert arc.centered == pytest.approx((right / 8 - 0.25) / 0.75)
    assert list(results.tasks) == LABELS and results.failed == {}
    assert results.core == pytest.approx(sum(task.centered for task in results.tasks.values()) / 6)


@pytest.mark.slow
def test_two_ranks_equal_one_to_the_last_bit():
    want = core_ranks.as_json(core_ranks.evaluate(random_params(small_config())))
    for mode in ("replicate", "fsdp"):
        assert ranks.call(2, core_ranks.evaluate_on_ranks, mode) == [want, want], mode


def test_max_tokens_beyond_the_model_is_refused():
    bundle, params = core_bundle.read(BUNDLE), random_params(small_config())
    with pytest.raises(UserError, match=r"max_tokens=641: expected 2 … 640"):
        core.evaluate(params, small_config(), small_tokenizer(), bundle, max_tokens=641)


def test_bfloat16_is_close_to_float32():
    half = core_ranks.evaluate(random_params(small_config(), dtype=torch.bfloat16), Compute(torch.bfloat16))
    full = core_ranks.evaluate(random_params(small_config()))
    for label in LABELS:
        for a, b in zip(half.tasks[label].answers, full.tasks[label].answers, strict=True):
            assert a.losses == pytest.approx(b.losses, abs=0.25), label


WRONG: list[tuple[Change, str]] = [
    (lambda folder: (folder / "core.yaml").unlink(), r"bundle=\S+: has no core.yaml; set the folder"),
    (edited("core.yaml", "- label: copa", "- label: [copa"), r"core.yaml:\d+: not valid YAML \("),
    (lambda folder: (folder / "core.yaml").write_text("tasks: []"), "core.yaml: has no list of icl_tasks"),
    (edited("core.yaml", "label: copa", "name: copa"), "core.yaml: task 2 of icl_tasks has no label"),
    (edited("core.yaml", "label: copa", "label: arc_easy"), "task 2 .* repeats the label arc_easy"),
    (lambda folder: (folder / "eval_meta_data.csv").unlink(), "eval_meta_data.csv cannot be read"),
    (edited("eval_meta_data.csv", "Random", "Any"), "eval_meta_data.csv:1: has no column 'Random baseline'"),
    (edited("core.yaml", "multiple_choice\n- label: w", "choice\n- label: w"), "icl_task_type 'choice'"),
    (edited("core.yaml", "  - 0", "  - many"), r"copa has num_fewshot 'many'; expected a list of one"),
    (edited("core.yaml", "  - 0", "  - 8"), r"copa.jsonl: 8 rows \(max_per_task=8\) are too few for 8 few-shot"),
    (lambda folder: (folder / COPA).unlink(), "copa.jsonl cannot be read: No such file"),
    (edited(COPA, '"gold": 1', '"gold": one'), r"copa.jsonl:1: not valid JSON \("),
    (lambda folder: (folder / COPA).write_text("\n[1]\n"), "copa.jsonl:2: expected an object"),
    (edited(COPA, '"query": "', '"query": 1, "x": "'), "copa.jsonl:1: expected a string 'query'"),
    (
        edited(COPA, '"choices": [', '"choices": ["a"], "x": ['),
        "copa.jsonl:1: .* list of at least two strings 'choices'",
    ),
    (edited(COPA, '"gold": 1', '"gold": 2'), "copa.jsonl:1: gold is 2; expected the index .* 0 … 1"),
    (edited(COPA, '"gold": 1', '"gold": true'), "gold is True"),
    (edited("eval_meta_data.csv", "copa", "cola"), "eval_meta_data.csv: has no line for copa"),
    (edited("eval_meta_data.csv", "reasoning,50", "reasoning,half"), r"csv:4: the random .* is 'half'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_invalid_bundle_or_task_is_named(change: Change, message: str, tmp_path: Path):
    folder = shutil.copytree(BUNDLE, tmp_path / "bundle")
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        core_bundle.load(core_bundle.read(folder), "copa", 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("continuation", ["", "s"])
def test_continuation_that_changes_the_tokens_before_it(continuation: str):
    tok = Tokenizer((*BYTES.tokens, b"ts"))
    rows = [{"context": "some cat", "continuation": "s"}, {"context": "all cats", "continuation": continuation}]
    numbered = tuple(Row(i, row) for i, row in enumerate(rows, start=1))
    task = CoreTask("made", "language_modeling", Path("made.jsonl"), 1, "", 0.0, numbered)
    with pytest.raises(UserError, match=r"made.jsonl:1: the tokens of the context"):
        list(core.questions(task, tok, 100))


def test_task_hash_covers_everything_that_decides_a_result():
    bundle = core_bundle.read(BUNDLE)
    task = core_bundle.load(bundle, "copa")
    others = [core_bundle.load(bundle, label, rows) for label, rows in (("winograd", None), ("copa", 7))]
    for change in ({"num_fewshot": 1}, {"delimiter": "\n"}, {"baseline": 0.1}, {"rows": task.rows[::-1]}):
        others.append(dataclasses.replace(task, **change))
    assert core_bundle.task_hash(task) == core_bundle.task_hash(core_bundle.load(bundle, "copa"))
    assert core_bundle.task_hash(task) not in map(core_bundle.task_hash, others)


@pytest.mark.parametrize("top", ["eval_bundle/", ""])
def test_bundle_is_downloaded_and_unpacked_once(base: Path, monkeypatch: pytest.MonkeyPatch, top: str):
    urls = []

    def fetch(url: str, path: Path, options: Options, *, check: Callable[[Path], str]) -> None:
        urls.append(url)
        path.write_bytes(b"<html>log in first</html>")
        assert check(path) == "not a zip file; does a proxy answer in the server's place?"
        with zipfile.ZipFile(path, "w") as file:
            for source in sorted(BUNDLE.rglob("*")):
                file.write(source, f"{top}{source.relative_to(BUNDLE)}")
        assert check(path) == ""

    monkeypatch.setattr(download, "fetch", fetch)
    folder = base / "eval_bundle"
    with pytest.raises(UserError, match=f"its SHA-256 is [0-9a-f]{{64}}, expected {core_bundle.SHA256}"):
        core_bundle.fetch()
    assert core_bundle.fetch(sha256=None) == core_bundle.fetch(sha256=None) == folder
    assert urls == [core_bundle.URL] * 2 and list(core_bundle.read(folder).entries) == LABELS
    assert [path.name for path in folder.parent.iterdir()] == ["eval_bundle"]
    digest = core_bundle.read_hash(folder)
    assert core_bundle.fetch(sha256=digest) == folder
    with pytest.raises(UserError, match=f"its zip file had the SHA-256 {digest}, expected .*; delete it"):
        core_bundle.fetch()


def zipped(name: str, content: bytes = b"", mode: int = 0, **fields: int) -> Callable[[zipfile.ZipFile], None]:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16

    def write(file: zipfile.ZipFile) -> None:
        file.writestr(info, content, zipfile.ZIP_DEFLATED)
        for field, value in fields.items():
            setattr(file.filelist[-1], field, value)

    return write


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (zipped("../outside", b"x"), "'../outside' is a link or leads out of the folder"),
        (zipped("/tmp/outside", b"x"), "'/tmp/outside' is a link or leads out"),
        (zipped("eval_data/link", b"/etc/passwd", stat.S_IFLNK | 0o777), "'eval_data/link' is a link"),
        (zipped("pipe", mode=stat.S_IFIFO), "'pipe' is a link"),
        (
            zipped("bomb", bytes(1000), file_size=10**12),
            r"2 files of 1,000,000,000,013 bytes are more than 1000 of 2,000,000,000",
        ),
        (zipped("bomb", bytes(10**6), file_size=10), "Bad CRC-32 for file 'bomb'"),
        (zipped("secret", b"x", flag_bits=1), "'secret' .* is encrypted"),
        (zipped("new", b"x", compress_type=99), "compression method is not supported"),
        (zipped("core.yaml/x", b"x"), "Not a directory|File exists"),
        (lambda file: [file.writestr(f"{i}", b"") for i in range(1000)], "1,001 files of 13 bytes are more than"),
    ],
)
def test_archive_that_is_refused_leaves_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[zipfile.ZipFile], None], problem: str
):
    def fetch(url: str, path: Path, options: Options, *, check: Callable[[Path], str]) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("core.yaml", "icl_tasks: []")
            write(file)

    monkeypatch.setattr(download, "fetch", fetch)
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(UserError, match=rf"eval_bundle.zip cannot be unpacked .*{problem}.*delete both") as error:
        core_bundle.fetch(sha256=None)
    assert "\n" not in str(error.value) and sorted(base.parent.rglob("*")) == before


def test_damaged_archive_of_the_user_is_named_and_kept(base: Path):
    (base / "eval_bundle.zip").write_bytes(b"PK not a zip")
    for sha256, problem in ((None, "File is not a zip file"), ("0" * 64, "its SHA-256 is d12ee")):
        with pytest.raises(UserError, match=rf"eval_bundle.zip cannot be unpacked .*{problem}"):
            core_bundle.fetch(sha256=sha256)
    assert [path.name for path in base.iterdir()] == ["eval_bundle.zip"]
