"""A tiny pretraining experiment end to end: plan, resume, interruption, error messages."""

import base64
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny_run
import torch
from tiny_run import assert_same_run, losses, pretrain_config, pretrain_run, saved_steps, stop_after

from experiments import convert, pretrain
from nanochat import checkpoint, distributed, model, train, tree
from nanochat import eval as evals
from nanochat.config import UserError, override
from nanochat.data import loader, tokenizer
from nanochat.distributed import runtime
from nanochat.metrics import logger, report, run_folder
from nanochat.model import loss
from nanochat.train import step

pytestmark = pytest.mark.usefixtures("corpus")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> Path:
    """An uninterrupted run of six steps."""
    return pretrain_run("name=uninterrupted")


def test_run_writes_checkpoints_metrics_and_curves(uninterrupted: Path):
    assert len(losses(uninterrupted)) == 6 and losses(uninterrupted)[-1] < losses(uninterrupted)[0]
    steps, bpb = logger.curve(logger.read(uninterrupted), "val/bpb")
    assert steps == saved_steps(uninterrupted) == [3, 6] and bpb[1] < bpb[0]
    assert checkpoint.step_metrics(uninterrupted / "checkpoints")[6]["val/bpb"] == bpb[1]
    for name in ("loss.svg", "bpb.svg"):
        assert (uninterrupted / name).read_text().rstrip().endswith("</svg>")
    saved = json.loads((uninterrupted / "config.json").read_text())
    assert saved["num_iterations"] == 6 and saved["model"]["vocab_size"] == 300
    _, meta, files = checkpoint.load_params(uninterrupted / "checkpoints")
    assert model.ModelConfig(**meta["model"]).n_layer == 2
    assert tokenizer.load(files["tokenizer.txt"].parent).vocab_size == 300


def test_full_parameters_are_not_gathered_without_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed.sharding, "full_params", lambda params: pytest.fail("gathered"))
    pretrain_run("name=quiet", "eval.prompts=none", "num_iterations=2")


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resumed_run_equals_uninterrupted_run(uninterrupted: Path, step: int):
    name = f"name=stopped{step}"
    with stop_after(step):
        pretrain_run(name)
    folder = train.run_folder(f"stopped{step}")
    assert saved_steps(folder)[-1] == len(losses(folder)) == step
    assert_same_run(uninterrupted, pretrain_run(name, "resume=true"))


@pytest.mark.parametrize(("split", "step"), [("train", 0), ("val", 3)])
def test_signal_ends_the_wait_for_a_disk(split: str, step: int, monkeypatch: Any, capsys: Any):
    read, released, metrics = loader.read_block, threading.Event(), train.run_folder(f"blocked{step}") / logger.FILE

    def blocked(found: Any, *args: Any) -> list[str]:
        if (found.path.name == "val.jsonl") == (split == "val") and metrics.exists():  # not in the check before the run
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            released.wait(60)
        return read(found, *args)

    monkeypatch.setattr(loader, "read_block", blocked)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        pretrain_run(f"name=blocked{step}", "data.token_cache=false", "eval.prompts=none")
    released.set()
    assert stopped.value.code == 130 and time.monotonic() - began < 50
    saved = f"step {step} is saved; --resume continues from it" if step else "no step was done"
    assert f"stopped by SIGINT; {saved}" in capsys.readouterr().out


VAL = "; the last file by name is the validation split"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], f"no documents to read for split val{VAL}"),
        (['{"text": ""}', '{"text": null}'], f"no documents to read for split val{VAL}"),
        (['{"text": "one"}', "not json"], r"val.jsonl: line 2 is not valid JSON"),
        (['{"body": "one"}'], r"val.jsonl row 1: no text column 'text', it has body: set data.text_column"),
    ],
)
def test_validation_split_without_text_is_noticed_before_the_run(corpus: Path, tmp_path: Path, rows: Any, message: str):
    shutil.copy(corpus / "text" / "a.jsonl", tmp_path)
    (tmp_path / "val.jsonl").write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(UserError, match=message):
        pretrain_run("name=no_val", f"data.source={tmp_path}")
    assert not train.run_folder("no_val").exists()


def test_run_names_the_shards_that_it_skipped(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b", "val"):
        shutil.copy(corpus / "text" / f"{name}.jsonl", tmp_path)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("not json\n")
    settings = ("name=skipping", f"data.source={tmp_path}", "data.skip_bad_shards=true", "data.buffer_docs=200")
    with stop_after(2):
        pretrain_run(*settings)
    folder = pretrain_run(*settings, "resume=true")
    line = f"shard {tmp_path / 'b.jsonl'}: line 131 is not valid JSON"
    assert capsys.readouterr().out.count(f"skipped: {line}") == 2, "at the end of each start"
    assert line.replace("_", "\\_") in report.skipped([run_folder.read_run(folder)])


@pytest.mark.slow
def test_run_killed_while_saving_resumes_to_the_same_state():
    settings = ("num_iterations=12", "checkpoint.every_steps=1", "eval.every_steps=none")
    folder = train.run_folder("killed") / "checkpoints"
    words = [f"--set={setting}" for setting in tiny_run.settings("name=killed", *settings)]
    with ranks.start_launch(1, "--experiment=pretrain", *words) as job:
        # A temporary folder beside a finished step: a save is under way.
        job.until(lambda: checkpoint.steps(folder) and any("tmp" in path.name for path in folder.iterdir()))
        job.send_signal(signal.SIGKILL)
    assert 0 < checkpoint.steps(folder)[-1] < 12
    resumed = pretrain_run("name=killed", "resume=true", *settings)
    assert_same_run(pretrain_run("name=never_killed", *settings), resumed)


@pytest.mark.parametrize(("name", "error"), [("killed_in_eval", KeyboardInterrupt), ("stopped_in_eval", SystemExit)])
def test_resume_runs_the_evaluation_that_a_stop_prevented(uninterrupted: Path, name: str, error: Any, monkeypatch):
    bits_per_byte = evals.bits_per_byte

    def interrupted(*args: Any) -> float:
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        return bits_per_byte(*args)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(evals, "bits_per_byte", interrupted)
        pretrain_run(f"name={name}")
    folder = train.run_folder(name)
    assert saved_steps(folder) == [3] and logger.curve(logger.read(folder), "val/bpb")[0] == []
    assert_same_run(uninterrupted, pretrain_run(f"name={name}", "resume=true"))


def test_resume_with_buffer_of_one_document():
    whole = pretrain_run("name=one", "data.buffer_docs=1")
    with stop_after(2):
        pretrain_run("name=one_stopped", "data.buffer_docs=1")
    assert_same_run(whole, pretrain_run("name=one_stopped", "data.buffer_docs=1", "resume=true"))


def test_resumed_run_keeps_its_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer.save(tokenizer.load(corpus / "tokenizer"), tmp_path)
    with stop_after(2):
        pretrain_run("name=own", f"tokenizer={tmp_path}")
    tokenizer.save(tokenizer.train(["something else altogether " * 50], 270), tmp_path)
    folder = pretrain_run("name=own", f"tokenizer={tmp_path}", "resume=true")
    assert saved_steps(folder)[-1] == 6 and "the run's own tokenizer" in capsys.readouterr().out


def test_progress_from_checkpoint_without_token_count():
    now = train.Progress(step=7, tokens=700, timed_tokens=300, timed_seconds=1.5)
    assert train.progress_from({"progress": now._asdict(), "tokens": 700}) == now
    old = {"step": 7, "skipped_steps": 1, "timed_steps": 3, "timed_seconds": 1.5}
    assert train.progress_from({"progress": old, "tokens": 700}) == train.Progress(7, skipped_steps=1, tokens=700)


@pytest.mark.parametrize(
    ("depth", "width", "batch_tokens", "steps"),
    [(12, 768, 2**19, 2520), (20, 1280, 2**20, 4980), (24, 1536, 2**20, 8352), (26, 1664, 2**20, 10510)],
)
def test_dry_run_prints_the_plan_without_allocating(depth, width, batch_tokens, steps, base: Path, monkeypatch, capsys):
    monkeypatch.setattr(model, "init", None)  # allocating anything would fail
    experiment = importlib.import_module(f"experiments.pretrain_d{depth}")
    experiment.run(override(experiment.config(), ["dry_run=true"]), runtime.init("cpu"))
    printed = capsys.readouterr().out
    for text in (f"{width} = ", f"{batch_tokens:,} tokens = ", f"{steps:,}\n"):
        assert text in printed
    assert list(base.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["total_batch_size=250"], "set total_batch_size=256"),
        (["device_batch_size=3"], "set device_batch_size=2"),
        (["model.vocab_size=290"], "the tokenizer has 300 tokens"),
        (["model.window_pattern=SX"], "letters S and L only"),
        (["num_iterations=none", "total_batch_size=2**30"], "one step is more than"),
        (["tokenizer=/nowhere"], "train a tokenizer with"),
        (["compile=true"], "install no-such-compiler, or set compile=false"),
    ],
)
def test_invalid_settings_raise_one_line_with_the_fix(settings: list[str], message: str, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError) as caught:
        pretrain_run("name=mistake", *settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "--resume continues it"),
        (["resume=true", "depth=3", "num_iterations=9"], "this model expects"),
        (["overwrite=true", "data.source=/nowhere"], "/nowhere"),
        (["overwrite=true", "train.attention=flex"], "needs compile=true"),
    ],
)
def test_existing_run_survives_a_mistake(uninterrupted: Path, settings: list[str], message: str):
    with pytest.raises(UserError, match=message):
        pretrain_run("name=uninterrupted", *settings)
    assert saved_steps(uninterrupted) == [3, 6]


def test_overwrite_keeps_old_checkpoints():
    pretrain_run("name=replaced")
    folder = pretrain_run("name=replaced", "overwrite=true", "num_iterations=3")
    assert saved_steps(folder) == [3] and checkpoint.steps(folder / "checkpoints.old") == [3, 6]


def test_nonfinite_loss_saves_the_last_good_state_and_its_advice_works():
    settings = ("name=diverged", "optim.embedding_lr=1e30", "optim.warmup_steps=1", "num_iterations=20")
    with pytest.raises(UserError, match="is not finite; the last good checkpoint is step") as caught:
        pretrain_run(*settings)
    folder = train.run_folder("diverged")
    step = saved_steps(folder)[-1]
    assert f"the last good checkpoint is step {step}" in str(caught.value)
    assert "train.skip_nonfinite=true" in str(caught.value) and "\n" not in str(caught.value)
    assert int(tiny_run.saved_state(folder, step)[0].step) == step
    with pytest.raises(UserError, match="is not finite"):  # the same batch, and the same weights
        pretrain_run("resume=true", *settings)
    pretrain_run("resume=true", "train.skip_nonfinite=true", *settings)
    assert saved_steps(folder)[-1] == 20
    assert logger.curve(logger.read(folder), "train/skipped_steps")[1][-1] > 0


def test_nonfinite_first_step_raises_clear_error(monkeypatch: pytest.MonkeyPatch):
    init = model.init

    def with_nan(*args: Any, **kwargs: Any) -> model.Params:
        params = init(*args, **kwargs)
        return params if params["lm_head"].is_meta else tree.map(lambda p: p * float("nan"), params)

    monkeypatch.setattr(model, "init", with_nan)
    with pytest.raises(UserError, match="step 0: the loss is not finite, and no checkpoint is saved yet"):
        pretrain_run("name=nan")


def test_corrupt_data_during_training_saves_a_checkpoint(monkeypatch: pytest.MonkeyPatch):
    real = loader.batches

    def breaking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, item in enumerate(real(*args, **kwargs)):
            if i == 2 and kwargs["split"] == "train":
                raise UserError("shard 7: cut off")
            yield item

    monkeypatch.setattr(loader, "batches", breaking)
    with pytest.raises(UserError, match="shard 7"):
        pretrain_run("name=bad_data", "eval.every_steps=none", "checkpoint.every_steps=none")
    assert saved_steps(train.run_folder("bad_data")) == [2]


def test_out_of_memory_is_one_line_error(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")

    monkeypatch.setattr(step, "fit", full)
    with pytest.raises(UserError, match=r"=4 runs out of memory \(CUDA out of memory\); set a smaller"):
        pretrain_run("name=full")


def test_auto_device_batch_size_fits_estimate_and_trial(monkeypatch: pytest.MonkeyPatch, capsys):
    settings = ("device_batch_size=auto", "num_iterations=1", "name=auto")
    pretrain_run(*settings)
    assert re.search(r"step +256 tokens = 1 x 8 rows x 32 tokens", capsys.readouterr().out)
    monkeypatch.setattr(distributed, "free_bytes", lambda *_: 2**20)
    with pytest.raises(UserError, match="device_batch_size=auto: not even one row of 32 tokens fits"):
        pretrain_run(*settings)


def test_auto_device_batch_size_skips_sizes_that_run_out_of_memory(corpus: Path, capsys: pytest.CaptureFixture[str]):
    config = pretrain_config("device_batch_size=8")
    shape, _ = pretrain.resolve(config, tokenizer.load(corpus / "tokenizer"))
    here = dataclasses.replace(runtime.init("cpu"), device=torch.device("meta"))

    def make_step(rows: int) -> Any:
        def step_fn(state: Any, batch: Any, number: int, stats: Any) -> None:
            assert batch["inputs"].device.type == "meta" and state.params["wte"].device.type == "meta"
            assert len(batch["inputs"]) == min(8, 2 * rows)
            if rows > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        return step_fn

    limit, arguments = 3, (config, shape, 8, here, None, make_step)
    assert train.try_batch_size(*arguments) == 2
    assert capsys.readouterr().out.count("runs out of memory; trying less") == 2
    limit = 0
    with pytest.raises(UserError, match="not even one row fits"):
        train.try_batch_size(*arguments)


def test_evaluation_reads_eval_tokens(monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    bits_per_byte = evals.bits_per_byte

    def counting(params: Any, batches: Any, *rest: Any) -> float:
        batches = list(batches)
        read.append(sum(batch["inputs"].numel() for batch in batches))
        return bits_per_byte(params, batches, *rest)

    monkeypatch.setattr(evals, "bits_per_byte", counting)
    pretrain_run("name=counted", "eval.tokens=1024", "data.buffer_docs=1000")
    assert read == [1024, 1024]


def test_core_is_evaluated_if_bundle_exists(corpus: Path, capsys: pytest.CaptureFixture[str]):
    bundle = Path(__file__).parents[1] / "data" / "core_bundle"
    folder = pretrain_run("name=cored", "num_iterations=2", f"core.bundle={bundle}")
    [score] = logger.curve(logger.read(folder), "core/CORE")[1]
    assert f"step 2: CORE {score:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"core.yaml"):
        pretrain_run("name=uncored", f"core.bundle={corpus}")
    pretrain_run("name=bare", "num_iterations=1")
    assert "CORE is skipped: no evaluation bundle in" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_gradients_are_deterministic():
    """Compiled code accumulates embedding gradients in any thread order unless torch is deterministic."""
    here, threads = runtime.init("cpu"), torch.get_num_threads()
    shape = model.ModelConfig(256, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=128, window_pattern="L")
    params = model.init(shape, 0)
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(30, (16, 256), generator=generator) for name in ("inputs", "targets")}
    compute = model.Compute(here.compute_dtype)
    loss_fn = functools.partial(loss.next_token, config=shape, compute=compute, chunk_tokens=512)
    torch.set_num_threads(2)
    try:
        value_and_grad = train.gradient(loss_fn, compile=distributed.compile_fn)
        first, *others = (tree.flatten(value_and_grad(params, batch, torch.tensor(1.0))[0]) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


def test_convert_writes_a_checkpoint_that_loads(corpus: Path, tmp_path: Path, capsys):
    golden = np.load(ROOT / "tests/golden/reference_d4.npz", allow_pickle=False)
    weights = {n.removeprefix("param/"): torch.from_numpy(golden[n]) for n in golden.files if n.startswith("param/")}
    torch.save(weights, tmp_path / "model_7.pt")
    shape = {"sequence_len": 32, "vocab_size": 300, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    (tmp_path / "meta_7.json").write_text(json.dumps({"step": 7, "model_config": shape | {"vocab_size": 100}}))
    settings = [f"model={tmp_path / 'model_7.pt'}", f"meta={tmp_path / 'meta_7.json'}", "name=converted"]
    config = override(convert.config(), settings)
    convert.run(config, runtime.init("cpu"))
    params, meta, _ = checkpoint.load_params(train.run_folder("converted") / "checkpoints", step=7)
    logits = model.apply(params, torch.from_numpy(golden["tokens"][0, :, :-1]))
    assert model.config_of(params) == model.ModelConfig(**meta["model"])
    assert logits.shape == (2, 32, 100)
    assert "window_pattern L" in capsys.readouterr().out
    tok = tokenizer.load(corpus / "tokenizer")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tok.tokens)]
    (tmp_path / "ranks").write_text("\n".join(lines))
    assert convert.read_ranks(tmp_path / "ranks") == tok
    with pytest.raises(UserError, match="300 tokens with special tokens, the model has 100"):
        convert.run(dataclasses.replace(config, name="other", ranks=str(tmp_path / "ranks")), runtime.init("cpu"))
    with pytest.raises(UserError, match="already has checkpoints"):
        convert.run(config, runtime.init("cpu"))
    (tmp_path / "ranks").write_text("\n".join([lines[0], "?? 1"]))
    with pytest.raises(UserError, match="ranks, line 2"):
        convert.read_ranks(tmp_path / "ranks")
