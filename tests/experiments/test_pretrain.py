"""A tiny pretraining experiment end to end: plan, resume, interruption, error messages."""

import base64
import dataclasses
import functools
import importlib
import json
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import small_model
import torch

from experiments import bench_train, convert, pretrain, quickstart
from nanochat import checkpoint, distributed, model, optim, train, tree
from nanochat import eval as evals
from nanochat.config import UserError, override
from nanochat.data import loader, tokenizer
from nanochat.distributed import runtime
from nanochat.metrics import logger
from nanochat.model import loss
from nanochat.train import stage as events
from nanochat.train import step as steps

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "depth=2",
    "name=tiny",
    "compile=false",
    "device=cpu",
    "model.sequence_len=32",
    "model.aspect_ratio=32",
    "model.head_dim=32",
    "model.window_pattern=L",
    "device_batch_size=4",
    "total_batch_size=256",
    "num_iterations=6",
    "checkpoint.every_steps=3",
    "eval.every_steps=3",
    "eval.tokens=256",
    "eval.sample_tokens=4",
    "eval.prompts=the cat",
    "metrics.every_steps=1",
    "train.chunk_tokens=50",
    "data.buffer_docs=20",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a tokenizer and a folder of small documents."""
    folder = tmp_path_factory.mktemp("base")
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "under",
        "mat",
        "tree",
        "and",
        "then",
        "it",
        "quick",
        "lazy",
        "over",
    ]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) + "." for _ in range(400)]
    data = folder / "text"
    data.mkdir()
    for name, part in {"a": texts[:180], "b": texts[180:360], "val": texts[360:]}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tokenizer.save(tokenizer.train(texts, 300), folder / "tokenizer")
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["NANOCHAT_BASE_DIR"]
    else:
        os.environ["NANOCHAT_BASE_DIR"] = before


def tiny(base: Path, *more: str) -> pretrain.Config:
    return override(pretrain.config(), [*TINY, f"data.source={base / 'text'}", *more])


def train_tiny(base: Path, *more: str) -> Path:
    config = tiny(base, *more)
    pretrain.run(config, runtime.init("cpu", config.dtype))
    return train.run_folder(str(config.name))


def losses(folder: Path) -> list[float]:
    return logger.curve(logger.read(folder), "train/loss")[1]


def final_state(base: Path, name: str, step: int | None = None) -> tuple[train.TrainState, dict]:
    shape, _ = pretrain.resolve(tiny(base), tokenizer.load(base / "tokenizer"))
    abstract = train.init(model.init(shape, 0, device="meta"), model.spec(shape))
    state, meta, _ = checkpoint.restore(train.run_folder(name) / "checkpoints", abstract, step=step)
    return state, meta


def assert_same_run(base: Path, first: str, second: str) -> None:
    """Losses, parameters, optimizer state, loader and metrics of two runs are equal, bit for bit."""
    (a, meta_a), (b, meta_b) = final_state(base, first), final_state(base, second)
    for name, value in tree.flatten(a._asdict()).items():
        assert torch.equal(value, tree.flatten(b._asdict())[name]), name
    assert meta_a["loader"] == meta_b["loader"] and meta_a["progress"]["ema"] == meta_b["progress"]["ema"]
    rows = [logger.read(train.run_folder(name)) for name in (first, second)]
    for row_a, row_b in zip(*rows, strict=True):
        same = {k for k in row_a if k.startswith(("train/", "val/")) or k == "step"}
        assert {k: row_a[k] for k in same} == {k: row_b[k] for k in same}


@pytest.fixture(scope="module")
def uninterrupted(base: Path) -> Path:
    """An uninterrupted run of six steps."""
    return train_tiny(base, "name=uninterrupted")


def test_run_writes_checkpoints_metrics_and_curves(uninterrupted: Path):
    rows = logger.read(uninterrupted)
    assert len(losses(uninterrupted)) == 6
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0]
    steps, bpb = logger.curve(rows, "val/bpb")
    assert steps == [3, 6] and bpb[1] < bpb[0]
    assert checkpoint.steps(uninterrupted / "checkpoints") == [3, 6]
    assert checkpoint.step_metrics(uninterrupted / "checkpoints")[6]["val/bpb"] == bpb[1]
    assert (uninterrupted / "loss.svg").read_text().rstrip().endswith("</svg>") and (uninterrupted / "bpb.svg").exists()
    saved = json.loads((uninterrupted / "config.json").read_text())
    assert saved["num_iterations"] == 6 and saved["model"]["vocab_size"] == 300
    _, meta, files = checkpoint.load_params(uninterrupted / "checkpoints")
    assert model.ModelConfig(**meta["model"]).n_layer == 2
    assert tokenizer.load(files["tokenizer.txt"].parent).vocab_size == 300


def stop_tiny(base: Path, steps: int, *more: str) -> None:
    """Train until SIGTERM after `steps` steps."""
    after_step = events.log_step

    def and_stop(ctx: Any, state: Any, at: train.Progress, numbers: Any) -> train.Progress:
        at = after_step(ctx, state, at, numbers)
        if at.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return at

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(events, "log_step", and_stop)
        train_tiny(base, *more)
    assert caught.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_resumed_run_equals_uninterrupted_run(base: Path, uninterrupted: Path, stop_after: int):
    name = f"stopped{stop_after}"
    stop_tiny(base, stop_after, f"name={name}")
    assert checkpoint.latest_step(train.run_folder(name) / "checkpoints") == stop_after
    assert len(losses(train.run_folder(name))) == stop_after
    train_tiny(base, f"name={name}", "resume=true")
    assert_same_run(base, "uninterrupted", name)


def start_tiny(base: Path, *more: str) -> ranks.Job:
    settings = [*TINY, f"data.source={base / 'text'}", *more]
    return ranks.start_launch(1, "--experiment=pretrain", *(f"--set={s}" for s in settings))


@pytest.mark.slow
def test_run_killed_while_saving_resumes_to_the_same_state(base: Path):
    settings = ("num_iterations=12", "checkpoint.every_steps=1", "eval.every_steps=none")
    train_tiny(base, "name=never_killed", *settings)
    folder = train.run_folder("killed") / "checkpoints"
    with start_tiny(base, "name=killed", *settings) as job:
        # A temporary folder beside a finished step: a save is under way.
        job.until(lambda: checkpoint.steps(folder) and any("tmp" in path.name for path in folder.iterdir()))
        job.send_signal(signal.SIGKILL)
    kept = checkpoint.latest_step(folder)
    assert kept is not None and kept < 12
    train_tiny(base, "name=killed", "resume=true", *settings)
    assert_same_run(base, "never_killed", "killed")


def test_resume_runs_the_evaluation_that_a_kill_skipped(
    base: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **_how: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(events, "evaluate_bpb", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(base, "name=unevaluated")
    assert checkpoint.steps(train.run_folder("unevaluated") / "checkpoints") == [3]
    train_tiny(base, "name=unevaluated", "resume=true")
    assert_same_run(base, "uninterrupted", "unevaluated")


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(base: Path):
    record = train.run_folder("termed") / "metrics.jsonl"
    settings = ("num_iterations=2000", "checkpoint.every_steps=none", "eval.every_steps=none")
    with start_tiny(base, "name=termed", *settings) as job:
        job.until(lambda: record.exists() and record.read_text().count("\n") > 3)
        job.send_signal(signal.SIGTERM)
        (finished,) = job.wait(60)
    output = finished.out + finished.err
    assert finished.code == 128 + signal.SIGTERM, output
    step = checkpoint.latest_step(train.run_folder("termed") / "checkpoints")
    assert step and f"stopped by SIGTERM; step {step} is saved" in output


def test_torch_func_gradients_match_autograd_losses(base: Path):
    default = losses(train_tiny(base, "name=autograd", "num_iterations=20"))
    func = losses(train_tiny(base, "name=func", "num_iterations=20", "train.grad=torch_func"))
    torch.testing.assert_close(torch.tensor(func), torch.tensor(default), rtol=1e-5, atol=0)


def test_torch_func_rejects_custom_backward(base: Path):
    config = tiny(base, "train.grad=torch_func", "train.attention=flex", "compile=true")
    shape, _ = pretrain.resolve(config, tokenizer.load(base / "tokenizer"))
    with pytest.raises(UserError, match=r"custom backward|does not work on this cpu"):
        train.build_step_functions(config, shape, runtime.init("cpu"))


def test_micro_batches_do_not_change_the_losses(base: Path, uninterrupted: Path):
    split = losses(train_tiny(base, "name=split", "device_batch_size=2"))
    torch.testing.assert_close(torch.tensor(split), torch.tensor(losses(uninterrupted)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("depth", "width", "batch_tokens", "steps"),
    [(12, 768, 2**19, 2520), (20, 1280, 2**20, 4980), (24, 1536, 2**20, 8352), (26, 1664, 2**20, 10510)],
)
def test_dry_run_prints_the_plan_without_allocating(
    depth: int, width: int, batch_tokens: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(model, "init", None)  # allocating anything would fail
    config = override(pretrain.config(), [f"depth={depth}", "dry_run=true"])
    pretrain.run(config, runtime.init("cpu"))
    printed = capsys.readouterr().out
    assert f"{width} = " in printed
    assert f"{batch_tokens:,} tokens = " in printed
    assert f"{steps:,}\n" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.source=/nowhere"], "/nowhere"),
        (["total_batch_size=250"], "set total_batch_size=256"),
        (["device_batch_size=3"], "set device_batch_size=2 or 4"),
        (["model.vocab_size=290"], "the tokenizer has 300 tokens"),
        (["model.window_pattern=SX"], "letters S and L only"),
        (["num_iterations=none", "total_batch_size=2**30"], "one step is more than"),
        (["tokenizer=/nowhere"], "train a tokenizer with"),
        (["train.attention=flex"], "needs compile=true"),
    ],
)
def test_invalid_settings_raise_one_line_with_the_fix(base: Path, settings: list[str], message: str):
    with pytest.raises(UserError) as caught:
        train_tiny(base, "name=mistake", *settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_existing_run_is_not_overwritten(base: Path, uninterrupted: Path):
    with pytest.raises(UserError, match="--resume continues it"):
        train_tiny(base, "name=uninterrupted")
    assert checkpoint.steps(uninterrupted / "checkpoints") == [3, 6]


def test_resume_with_another_model_shape_raises(base: Path, uninterrupted: Path):
    with pytest.raises(UserError) as caught:
        train_tiny(base, "name=uninterrupted", "resume=true", "depth=3", "num_iterations=9")
    assert "this model expects" in str(caught.value)
    assert checkpoint.steps(uninterrupted / "checkpoints") == [3, 6]


def test_nonfinite_loss_saves_the_last_good_state_and_stops(base: Path):
    with pytest.raises(UserError, match="is not finite; the last good checkpoint is step") as caught:
        train_tiny(base, "name=diverged", "optim.embedding_lr=1e30", "optim.warmup_steps=1", "num_iterations=20")
    step = checkpoint.latest_step(train.run_folder("diverged") / "checkpoints")
    assert f"the last good checkpoint is step {step}" in str(caught.value)
    assert "train.skip_nonfinite=true" in str(caught.value) and "\n" not in str(caught.value)
    state, _ = final_state(base, "diverged", step)
    assert int(state.step) == step


def test_suggested_fix_after_nonfinite_loss_works(base: Path):
    diverging = ("optim.embedding_lr=1e30", "optim.warmup_steps=1", "num_iterations=20")
    with pytest.raises(UserError):
        train_tiny(base, "name=advised", *diverging)
    step = checkpoint.latest_step(train.run_folder("advised") / "checkpoints")
    with pytest.raises(UserError, match="is not finite"):  # the same batch, and the same weights
        train_tiny(base, "name=advised", "resume=true", *diverging)
    train_tiny(base, "name=advised", "resume=true", "train.skip_nonfinite=true", *diverging)
    assert step is not None and checkpoint.steps(train.run_folder("advised") / "checkpoints")[-1] == 20
    assert logger.curve(logger.read(train.run_folder("advised")), "train/skipped_steps")[1][-1] > 0


def test_nonfinite_first_step_raises_clear_error(base: Path, monkeypatch: pytest.MonkeyPatch):
    broken = model.init

    def with_nan(*args: Any, **kwargs: Any) -> model.Params:
        params = broken(*args, **kwargs)
        return params if params["lm_head"].is_meta else tree.map(lambda p: p * float("nan"), params)

    monkeypatch.setattr(model, "init", with_nan)
    with pytest.raises(UserError, match="step 0: the loss is not finite, and no checkpoint is saved yet"):
        train_tiny(base, "name=nan")


def test_corrupt_data_during_training_saves_a_checkpoint(base: Path, monkeypatch: pytest.MonkeyPatch):
    real = loader.batches

    def breaking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, item in enumerate(real(*args, **kwargs)):
            if i == 2 and kwargs["split"] == "train":
                raise UserError("shard 7: cut off")
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(loader, "batches", breaking)
        with pytest.raises(UserError, match="shard 7"):
            train_tiny(base, "name=bad_data", "eval.every_steps=none", "checkpoint.every_steps=none")
    assert checkpoint.steps(train.run_folder("bad_data") / "checkpoints") == [2]


def test_progress_from_checkpoint_without_token_count():
    now = train.Progress(step=7, tokens=700, timed_tokens=300, timed_seconds=1.5)
    assert train.progress_from({"progress": now._asdict(), "tokens": 700}) == now
    old = {"step": 7, "skipped_steps": 1, "timed_steps": 3, "timed_seconds": 1.5}
    assert train.progress_from({"progress": old, "tokens": 700}) == train.Progress(7, skipped_steps=1, tokens=700)


def test_evaluation_reads_eval_tokens(base: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    real = evals.bits_per_byte

    def counting(params: Any, batches: Any, *rest: Any) -> float:
        batches = list(batches)
        read.append(sum(batch["inputs"].numel() for batch in batches))
        return real(params, batches, *rest)

    monkeypatch.setattr(evals, "bits_per_byte", counting)
    train_tiny(base, "name=counted", "eval.tokens=1024", "data.buffer_docs=1000")
    assert read == [1024, 1024]


def test_signal_interrupts_evaluation(base: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch):
    real = evals.bits_per_byte

    def interrupted(*args: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(evals, "bits_per_byte", interrupted)
        train_tiny(base, "name=stopped_in_evaluation")
    folder = train.run_folder("stopped_in_evaluation")
    assert checkpoint.steps(folder / "checkpoints") == [3] and logger.curve(logger.read(folder), "val/bpb")[0] == []
    train_tiny(base, "name=stopped_in_evaluation", "resume=true")
    assert_same_run(base, "uninterrupted", "stopped_in_evaluation")


def test_resumed_run_keeps_its_tokenizer(base: Path, tmp_path: Path, capsys):
    tokenizer.save(tokenizer.load(base / "tokenizer"), tmp_path)
    stop_tiny(base, 2, "name=own", f"tokenizer={tmp_path}")
    tokenizer.save(tokenizer.train(["something else altogether " * 50], 270), tmp_path)
    train_tiny(base, "name=own", f"tokenizer={tmp_path}", "resume=true")
    assert checkpoint.latest_step(train.run_folder("own") / "checkpoints") == 6
    assert "the run's own tokenizer" in capsys.readouterr().out


def test_overwrite_keeps_old_checkpoints(base: Path):
    folder = train_tiny(base, "name=replaced")
    with pytest.raises(UserError, match="needs compile=true"):
        train_tiny(base, "name=replaced", "overwrite=true", "train.attention=flex")
    assert checkpoint.steps(folder / "checkpoints") == [3, 6]
    train_tiny(base, "name=replaced", "overwrite=true", "num_iterations=3")
    assert checkpoint.steps(folder / "checkpoints") == [3] and checkpoint.steps(folder / "checkpoints.old") == [3, 6]


def test_measuring_peak_flops_keeps_rng_state():
    before = torch.get_rng_state()
    runtime.measure_matmul(8, torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_compile_without_cpp_compiler_raises(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="install no-such-compiler, or set compile=false"):
        train_tiny(base, "name=uncompiled", "compile=true")


def test_missing_data_raises_before_old_run_is_deleted(base: Path, uninterrupted: Path):
    with pytest.raises(UserError, match="/nowhere"):
        train_tiny(base, "name=uninterrupted", "overwrite=true", "data.source=/nowhere")
    assert checkpoint.steps(uninterrupted / "checkpoints") == [3, 6]


def test_resume_with_buffer_of_one_document(base: Path):
    train_tiny(base, "name=one", "data.buffer_docs=1")
    stop_tiny(base, 2, "name=one_stopped", "data.buffer_docs=1")
    train_tiny(base, "name=one_stopped", "data.buffer_docs=1", "resume=true")
    assert losses(train.run_folder("one_stopped")) == losses(train.run_folder("one"))


@pytest.mark.slow
def test_compiled_gradients_are_deterministic():
    """Compiled code accumulates embedding gradients in any thread order unless torch is deterministic."""
    here, threads = runtime.init("cpu"), torch.get_num_threads()
    shape = model.ModelConfig(256, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=128, window_pattern="L")
    params = model.init(shape, 0)
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(30, (16, 256), generator=generator) for name in ("inputs", "targets")}
    loss_fn = functools.partial(
        loss.next_token, config=shape, compute=model.Compute(here.compute_dtype), chunk_tokens=512
    )
    torch.set_num_threads(2)
    try:
        value_and_grad = train.gradient(loss_fn, compile=small_model.COMPILE)
        first, *others = (tree.flatten(value_and_grad(params, batch, torch.tensor(1.0))[0]) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


def test_bench_train_reports_measurements(capsys):
    small = ["depth=1", "width=64", "head_dim=32", "vocab_size=128", "sequence_len=32", "rounds=1", "compile=false"]
    bench_train.run(override(bench_train.config(), small), runtime.init("cpu"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and 0 < result["share_of_matmul_2048"] < 1


def test_convert_writes_a_checkpoint_that_loads(base: Path, tmp_path: Path, capsys):
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
    tok = tokenizer.load(base / "tokenizer")
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


@pytest.mark.parametrize("depth", [12, 20, 24, 26])
def test_pretrain_depth_experiments(depth: int):
    module = importlib.import_module(f"experiments.pretrain_d{depth}")
    assert module.config() == dataclasses.replace(pretrain.config(), depth=depth) and module.run is pretrain.run


def test_quickstart_without_sft(base: Path):
    config = override(
        quickstart.config(),
        [
            *TINY[2:],
            "name=quick",
            f"data.source={base / 'text'}",
            f"tokenizer={base / 'tokenizer'}",
            "num_iterations=2",
            "sft_steps=0",
        ],
    )
    quickstart.run(config, runtime.init("cpu"))
    assert checkpoint.steps(train.run_folder("quick") / "checkpoints") == [2]


def test_auto_device_batch_size_fits_estimate_and_trial(base: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    config = tiny(base, "device_batch_size=auto", "num_iterations=1", "name=auto")
    pretrain.run(config, runtime.init("cpu"))
    assert re.search(r"step +256 tokens = 1 x 8 rows x 32 tokens", capsys.readouterr().out)
    monkeypatch.setattr(distributed, "free_bytes", lambda *_: 2**20)
    with pytest.raises(UserError, match="device_batch_size=auto: not even one row of 32 tokens fits"):
        pretrain.run(config, runtime.init("cpu"))


def test_auto_device_batch_size_skips_sizes_that_run_out_of_memory(base: Path, capsys: pytest.CaptureFixture[str]):
    config = dataclasses.replace(tiny(base), device_batch_size=8)
    shape, plan = pretrain.resolve(config, tokenizer.load(base / "tokenizer"))
    here = dataclasses.replace(runtime.init("cpu"), device=torch.device("meta"))

    def step_fn(state: Any, batches: Any, hparams: Any) -> None:
        assert batches[0]["inputs"].device.type == "meta" and state.params["wte"].device.type == "meta"
        if len(batches[0]["inputs"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    limit, arguments = 3, (config, shape, 8, here, None, step_fn, optim.hparams(config.optim, plan, 0))
    assert train.try_batch_size(*arguments) == 2
    assert capsys.readouterr().out.count("runs out of memory; trying less") == 2
    limit = 0
    with pytest.raises(UserError, match="not even one row fits"):
        train.try_batch_size(*arguments)


def test_out_of_memory_is_one_line_error(base: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")

    monkeypatch.setattr(steps, "fit", full)
    with pytest.raises(UserError, match=r"=4 runs out of memory \(CUDA out of memory\); set a smaller"):
        pretrain.run(tiny(base, "name=full"), runtime.init("cpu"))


def test_core_is_evaluated_if_bundle_exists(base: Path, capsys: pytest.CaptureFixture[str]):
    bundle = Path(__file__).parents[1] / "data" / "core_bundle"
    folder = train_tiny(base, "name=cored", "num_iterations=2", f"core.bundle={bundle}")
    [score] = logger.curve(logger.read(folder), "core/CORE")[1]
    assert f"step 2: CORE {score:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"core.yaml"):
        train_tiny(base, "name=uncored", f"core.bundle={base}")
    train_tiny(base, "name=bare", "num_iterations=1")
    assert "CORE is skipped: no evaluation bundle in" in capsys.readouterr().out
