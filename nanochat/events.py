"""What happens around the steps of a run: it is logged, saved, evaluated, sampled from, and drawn at its end."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import (
    allocator,
    checkpoint,
    dataloader,
    evaluate,
    metrics,
    model,
    plots,
    progress,
    sampling,
    sharding,
    tokenizer,
)
from nanochat import config as configs
from nanochat import runtime as runtimes
from nanochat.model import Compute, ModelConfig
from nanochat.optim import MATRIX, Hparams
from nanochat.runtime import Runtime
from nanochat.sharding import Layout
from nanochat.stage import StageConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteLossError, Progress, StopFlag, TrainState
from nanochat.units import duration, human

UNTIMED_STEPS = 10  # of every start: they compile and warm up


@dataclasses.dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    Attributes:
        config: resolved. shape, tok, runtime: the model's, the tokenizer, the process's place.
        layout: where the state lies on several ranks, or None.
        num_steps, step_tokens, flops_per_token: length of the run, tokens of a step (all ranks), cost of a token.
        hparams_at: step -> hyperparameters. matrix_lr: the matrices' rate at its full.
        peak_flops: matmul limit of a device, for the MFU.
        folder, manager, log: where the run's files are (a copy of the tokenizer among them), its open checkpoints,
            its open metrics.
        stop: set by a signal. seconds: of the steps that this process has done; the one thing in here that grows.
    """

    config: StageConfig
    shape: ModelConfig
    tok: Tokenizer
    runtime: Runtime
    layout: Layout | None
    num_steps: int
    step_tokens: int
    flops_per_token: int
    hparams_at: Callable[[int], Hparams]
    matrix_lr: float
    peak_flops: float
    folder: Path
    manager: checkpoint.Manager
    log: metrics.Log
    stop: StopFlag
    seconds: list[float]


def after_step(
    job: Job, loss_fn: Callable, show: progress.Bar, state: TrainState, at: Progress, numbers: dict[str, float]
) -> Progress:
    """Log a step; then save, evaluate and sample as is due, in that order. Return the progress, updated."""
    config, step, last = job.config, at.step, at.step == job.num_steps
    ema, smooth = metrics.ema(at.ema, numbers["loss"])
    seconds = numbers["step_seconds"]
    job.seconds.append(seconds)
    if len(job.seconds) == 1:
        allocator.settle()
        show.write(f"first step: {duration(seconds)}" + ", most of it to compile" * config.compile)
    timed = len(job.seconds) > UNTIMED_STEPS
    at = at._replace(ema=ema, timed_steps=at.timed_steps + timed, timed_seconds=at.timed_seconds + timed * seconds)
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        show.write(f"step {step}: loss or gradient not finite, left out ({at.skipped_steps} so far)")
    speed = job.step_tokens / seconds
    mfu = speed * job.flops_per_token / (job.peak_flops * job.runtime.world_size)
    show.update(1, loss=f"loss {smooth:.4f}", speed=f"{human(speed)} tok/s", mfu=f"mfu {mfu:.0%}")
    if step % config.metrics.every_steps == 0 or step == 1 or last:
        h = job.hparams_at(step - 1)
        row = {
            "train/loss": numbers["loss"],
            "train/loss_ema": smooth,
            "train/grad_norm": numbers["grad_norm"],
            "train/tokens": step * job.step_tokens,
            "train/epoch": numbers["epoch"],
            "train/tokens_cut_fraction": numbers["tokens_cut_fraction"],
            "train/lr_factor": float(h[MATRIX]["lr"]) / job.matrix_lr,
            "train/muon_momentum": float(h[MATRIX]["momentum"]),
            "train/skipped_steps": at.skipped_steps,
            "train/loss_scale": float(state.scaler["scale"]),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/data_wait_seconds": numbers["data_wait_seconds"],
            "perf/peak_memory_bytes": metrics.peak_memory_bytes(job.runtime.device),
        }
        metrics.write(job.log, step, row)
    if last or due(step, config.checkpoint.every_steps) or due(step, config.eval.every_steps):
        save(job, state, at)  # before an evaluation too, which may take long, or fail
    examine(job, loss_fn, show, state, step)
    return at


def examine(job: Job, loss_fn: Callable, show: progress.Bar, state: TrainState, step: int) -> None:
    """Evaluate and sample after a step if they are due: also first thing in a run that was stopped before it could."""
    config, last = job.config, step == job.num_steps
    if last or due(step, config.eval.every_steps):
        bpb = validate(job, state, loss_fn)
        if bpb is None:
            return  # a resumed run makes up for it
        checkpoint.add_metrics(job.manager, step, {"val/bpb": bpb})
        metrics.write(job.log, step, {"val/bpb": bpb})
        show.write(f"step {step}: validation {bpb:.4f} bits per byte")
    if last or due(step, config.eval.sample_every_steps):
        show.write("\n".join(samples(job, state)))


def examined(job: Job, step: int) -> bool:
    """Return whether the record has the evaluation of a step."""
    rows = metrics.read(job.folder) if job.runtime.is_main else []  # which writes it, meanwhile
    return step == 0 or bool(runtimes.agree(any(row["step"] == step and "val/bpb" in row for row in rows)))


def due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps, or never, happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save(job: Job, state: TrainState, at: Progress) -> None:
    """Checkpoint the state with all that a resumed run, a chat or a person needs beside it."""
    loader = at.loader
    meta = {
        "stage": "base",
        "config": dict(configs.flatten(job.config)),
        "model": dataclasses.asdict(job.shape),
        "loader": loader["position"],
        "progress": at._replace(loader=None)._asdict(),
        "tokens": at.step * job.step_tokens,
        "num_steps": job.num_steps,
        "torch": torch.__version__,
    }
    # No random state: whatever draws has a generator of its own, made from the seed and a name or a step.
    arrays = {"loader_tokens": loader["tokens"], "loader_lengths": loader["lengths"]}
    files = {name: job.folder / "tokenizer" / name for name in tokenizer.FILES}
    checkpoint.save(job.manager, state, meta, arrays=arrays, files=files)


def with_advice(error: NonFiniteLossError, manager: checkpoint.Manager) -> NonFiniteLossError:
    """Return the error with the last good checkpoint and what to try."""
    checkpoint.wait(manager)
    saved = checkpoint.steps(manager)
    if not saved:
        return NonFiniteLossError(f"{error}, and nothing is saved yet; try a lower rate (--set optim.matrix_lr=…)")
    text = (
        f"{error}; the last good checkpoint is step {saved[-1]}, of right before it. --resume with "
        "--set train.skip_nonfinite=true leaves this batch out"
    )
    if len(saved) > 1:
        text += (
            f"; or delete {manager.folder / str(saved[-1])} and --resume from step {saved[-2]} with a lower rate "
            "(--set optim.matrix_lr=…)"
        )
    return NonFiniteLossError(text)


def validate(job: Job, state: TrainState, loss_fn: Callable) -> float | None:
    """Return bits per byte on the first `eval.tokens` tokens of the validation split; None: a signal stopped it.

    A split that has fewer is read again from its beginning.
    """
    config, shape, runtime = job.config, job.shape, job.runtime
    rows = config.rows * runtime.world_size
    steps = max(config.eval.tokens // (rows * shape.sequence_len), 1)
    stream = dataloader.batches(
        config.data,
        job.tok,
        split="val",
        rows_per_step=rows,
        sequence_len=shape.sequence_len,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    token_bytes = torch.from_numpy(tokenizer.token_bytes(job.tok)).to(runtime.device)
    with contextlib.closing(stream):
        first = next(stream)
        rest = itertools.takewhile(lambda _: not job.stop.agreed(), itertools.islice(stream, steps - 1))
        taken = itertools.chain([first], rest)
        params = sharding.enter(job.layout, state.params, runtime.compute_dtype)
        bpb = evaluate.bits_per_byte(params, (batch for batch, *_ in taken), token_bytes, loss_fn)
    return None if job.stop.agreed() else bpb


def samples(job: Job, state: TrainState) -> list[str]:
    """Return one line a prompt: the prompt and what the model makes of it."""
    config = job.config.eval
    dtype = job.runtime.compute_dtype
    compute = Compute(dtype=dtype, gather=sharding.gatherer(job.layout, dtype))
    params = sharding.enter(job.layout, state.params, dtype)
    logits_fn = functools.partial(model.apply, config=job.shape, compute=compute)
    lines = []
    for i, prompt in enumerate(config.prompts):
        tokens = sampling.sample(
            params,
            [job.tok.bos, *job.tok.encode(prompt)],
            logits_fn,
            max_tokens=config.sample_tokens,
            stop=(),  # every rank takes the same number of steps, whatever it samples
            temperature=config.temperature,
            top_k=config.top_k,
            seed=i,
        )
        said = list(itertools.takewhile(lambda token: token != job.tok.bos, tokens))
        lines.append(f"  {prompt!r} → {job.tok.decode(said)!r}")
    return lines


def finish(job: Job, at: Progress) -> None:
    """Draw the curves beside the metrics, and print the validation curve, the totals and where everything is."""
    if not job.runtime.is_main:
        return
    rows = metrics.read(job.folder)
    draw(job.folder, rows)
    steps, bpb = metrics.curve(rows, "val/bpb")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, bpb, title="validation bits per byte, by step"))
    word = "done" if at.step == job.num_steps else "stopped after"
    print(f"{word} {at.step} of {job.num_steps} steps, {human(at.step * job.step_tokens)} tokens")
    if at.timed_steps:
        speed = at.timed_steps * job.step_tokens / at.timed_seconds
        print(f"training: {human(speed)} tokens/s, {duration(at.step * job.step_tokens / speed)} without evaluations")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps were left out: loss or gradient not finite")
    print(f"run folder: {job.folder} (checkpoints/, metrics.jsonl, config.json, loss.svg, bpb.svg)")


def draw(folder: Path, rows: list[Any]) -> None:
    """Draw loss.svg and, once there is an evaluation, bpb.svg into the run's folder."""
    curves = {"each step": metrics.curve(rows, "train/loss"), "smoothed": metrics.curve(rows, "train/loss_ema")}
    if curves["each step"][0]:
        title = f"{folder.name}: training loss"
        plots.line_chart(folder / "loss.svg", curves, title=title, x_label="step", y_label="nats per token")
    bpb = metrics.curve(rows, "val/bpb")
    if bpb[0]:
        title = f"{folder.name}: validation"
        plots.line_chart(folder / "bpb.svg", {"val": bpb}, title=title, x_label="step", y_label="bits per byte")
