"""Tiny runs: settings and a corpus to train one in seconds, stopping and comparing runs, saving one untrained."""

import contextlib
import dataclasses
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import random_params

from experiments import convert, pretrain
from nanochat import checkpoint, distributed, model, train, tree
from nanochat.config import base_dir, override
from nanochat.data import Tokenizer, tokenizer
from nanochat.metrics import logger
from nanochat.model import ModelConfig
from nanochat.train import TrainState, stage

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "it", "quick", "lazy", "over")
SHAPE = ("depth=2", "model.sequence_len=32", "model.aspect_ratio=32", "model.head_dim=32", "model.window_pattern=L")
# Of pretraining; settings that follow these replace them.
SETTINGS = (
    *SHAPE,
    *("name=tiny", "device=cpu", "compile=false", "train.chunk_tokens=50", "data.buffer_docs=20"),
    *("device_batch_size=4", "total_batch_size=256", "num_iterations=6", "checkpoint.every_steps=3"),
    *("eval.every_steps=3", "eval.tokens=256", "eval.sample_tokens=4", "eval.prompts=the cat"),
    "metrics.every_steps=1",
)


@contextlib.contextmanager
def base_folder(folder: Path) -> Iterator[Path]:
    """Within, `folder` is the base folder: with 300 short documents, the last 50 for validation, and a tokenizer."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + "." for _ in range(300)]
    (folder / "text").mkdir()
    for name, part in {"a": texts[:120], "b": texts[120:250], "val": texts[250:]}.items():
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tokenizer.save(tokenizer.train(texts, 300), folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        yield folder


def settings(*more: str) -> list[str]:
    """Return SETTINGS for the corpus of the base folder, and `more`."""
    return [*SETTINGS, f"data.source={base_dir() / 'text'}", *more]


def pretrain_config(*more: str) -> pretrain.Config:
    return override(pretrain.Config(), settings(*more))


def pretrain_run(*more: str) -> Path:
    """Pretrain in this process; return the run's folder."""
    config = pretrain_config(*more)
    pretrain.run(config, distributed.init("cpu", config.dtype))
    return train.run_folder(str(config.name))


@contextlib.contextmanager
def stop_after(step: int, run: str | None = None) -> Iterator[None]:
    """Send SIGTERM to this process after a step of the run (None: of any), and expect it to exit."""
    log_step, needs_state = stage.log_step, stage.needs_state

    def and_stop(ctx: Any, state: Any, at: train.Progress, numbers: Any) -> train.Progress:
        at = log_step(ctx, state, at, numbers)
        if at.step == step and run in (None, ctx.folder.name):
            os.kill(os.getpid(), signal.SIGTERM)
        return at

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(stage, "log_step", and_stop)
        patch.setattr(stage, "needs_state", lambda ctx, n, stats: n == step or needs_state(ctx, n, stats))  # at once
        yield
    assert stopped.value.code == 128 + signal.SIGTERM


def losses(folder: Path) -> list[float]:
    return logger.curve(logger.read(folder), "train/loss")[1]


def saved_steps(folder: Path) -> list[int]:
    return checkpoint.steps(folder / "checkpoints")


def saved_state(folder: Path, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
    """Return the state and the metadata of a run's checkpoint."""
    info = checkpoint.inspect(folder, step)
    config, lora = ModelConfig(**info.meta["model"]), info.meta.get("lora")
    rows = model.lora.spec(config, lora["rank"], lora["targets"]) if lora else model.spec(config)
    abstract = train.build.like_saved(train.init(model.params.init_rows(rows, 0, device="meta"), rows), info.state)
    state, meta, _ = checkpoint.restore(folder / "checkpoints", abstract, step=step)
    return state, meta


def assert_same_run(first: Path, second: Path) -> None:
    """Fail unless losses, parameters, optimizer state, loader and metrics of two runs are equal, bit for bit."""
    (a, meta_a), (b, meta_b) = saved_state(first), saved_state(second)
    for name, value in tree.flatten(a._asdict()).items():
        assert torch.equal(value, tree.flatten(b._asdict())[name]), name
    assert meta_a["loader"] == meta_b["loader"] and meta_a["parent"] == meta_b["parent"]
    assert meta_a["progress"]["ema"] == meta_b["progress"]["ema"]
    for row_a, row_b in zip(logger.read(first), logger.read(second), strict=True):
        names = [name for name in row_a if name == "step" or not name.startswith("perf/")]
        assert {name: row_a[name] for name in names} == {name: row_b.get(name) for name in names}


# A run that was never trained.

TOK = Tokenizer((*(bytes([i]) for i in range(256)), b" the", b" a"))  # no vocabulary is smaller but by these two
CONFIG = ModelConfig(sequence_len=64, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
TEXT = torch.tensor([[TOK.bos, *TOK.encode("the text of a test")]])


def save_run(
    base: Path, name="bot", *, steps=(1,), config=CONFIG, params=None, tok: Any = TOK, settings=None, **meta: Any
) -> Path:
    """Write a run as training does, with random parameters (the step is their seed); return its folder."""
    folder = base / "runs" / name
    files = {}
    if tok is not None:
        tokenizer.save(tok, folder / "tokenizer")
        files = {file: folder / "tokenizer" / file for file in tokenizer.FILES}
    meta = {"model": dataclasses.asdict(config), **({"config": settings} if settings else {}), **meta}
    manager = checkpoint.open_manager(folder / "checkpoints", checkpoint.CheckpointConfig(asynchronous=False))
    for step in steps:
        state = convert.Weights(torch.tensor(step), random_params(config, step) if params is None else params)
        checkpoint.save(manager, state, meta, files=files)
    checkpoint.close(manager)
    return folder


def set_time(folder: Path, step: int, seconds: float) -> None:
    os.utime(folder / "checkpoints" / str(step) / "meta" / "metadata", (seconds, seconds))
