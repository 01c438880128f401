"""What happens around the steps of a run: it is logged, saved, evaluated, sampled from, and drawn at its end."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import (
    allocator,
    checkpoint,
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
from nanochat.optim import MATRIX, SMEAR_LR, Hparams
from nanochat.runtime import Runtime
from nanochat.sharding import Layout
from nanochat.stage import StageConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteLossError, Progress, StopFlag, TrainState
from nanochat.units import duration, human

UNTIMED_STEPS = 10  # of every start: they compile and warm up


class Result(NamedTuple):
    """What an evaluation finds: numbers for the record, lines for a person."""

    metrics: Mapping[str, float]
    lines: Sequence[str]


class Evaluation(NamedTuple):
    """Something that looks at the state now and then, and after the last step.

    Attributes:
        key: a metric that it gives, by which a resumed run sees whether it was done; None: it gives lines only.
        every_steps: between two; None: after the last step only.
        run: (job, state) -> its result; None where a signal stopped it. All ranks run it together.
    """

    key: str | None
    every_steps: int | None
    run: Callable[["Job", TrainState], Result | None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    Attributes:
        config: resolved. stage: base, mid, sft or rl. parent: run, step and stage that it began with, or None.
        shape, tok, runtime: the model's, the tokenizer, the process's place.
        layout: where the state lies on several ranks, or None. loss_fn: the loss for evaluation.
        num_steps, step_tokens, flops_per_token: length of the run (None: what the batches give), tokens of a step
            (all ranks), cost of a token.
        hparams_at: (step, statistics of its batch) -> hyperparameters.
        evaluations: in the order in which they are done.
        peak_flops: matmul limit of a device, for the MFU.
        folder, manager, log: where the run's files are (a copy of the tokenizer among them), its open checkpoints,
            its open metrics.
        stop: set by a signal. seconds: of the steps that this process has done; the one thing in here that grows.
    """

    config: StageConfig
    stage: str
    parent: Mapping[str, Any] | None
    shape: ModelConfig
    tok: Tokenizer
    runtime: Runtime
    layout: Layout | None
    loss_fn: Callable
    num_steps: int | None
    step_tokens: int
    flops_per_token: int
    hparams_at: Callable[[int, Mapping[str, float]], Hparams]
    evaluations: Sequence[Evaluation]
    peak_flops: float
    folder: Path
    manager: checkpoint.Manager
    log: metrics.Log
    stop: StopFlag
    seconds: list[float]


def after_step(job: Job, show: progress.Bar, state: TrainState, at: Progress, numbers: dict[str, float]) -> Progress:
    """Log a step; then save, evaluate and sample as is due, in that order. Return the progress, updated.

    Args:
        numbers: of the step and of its batch. "last" tells that no batch follows; "tokens" is said where it is not
            step_tokens; "share" is how much of the run was done before, where the steps do not tell.
    """
    config, step = job.config, at.step
    last = bool(numbers.pop("last", 0)) or step == job.num_steps
    ema, smooth = metrics.ema(at.ema, numbers["loss"])
    seconds = numbers.pop("step_seconds")
    job.seconds.append(seconds)
    if len(job.seconds) == 1:
        allocator.settle()
        show.write(f"first step: {duration(seconds)}" + ", most of it to compile" * config.compile)
    tokens, timed = int(numbers.pop("tokens", job.step_tokens)), len(job.seconds) > UNTIMED_STEPS
    at = at._replace(ema=ema, tokens=at.tokens + tokens, done=last)
    at = at._replace(timed_tokens=at.timed_tokens + timed * tokens, timed_seconds=at.timed_seconds + timed * seconds)
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        show.write(f"step {step}: loss or gradient not finite, left out ({at.skipped_steps} so far)")
    speed = tokens / seconds
    mfu = speed * job.flops_per_token / (job.peak_flops * job.runtime.world_size)
    shown = {"loss": f"loss {smooth:.4f}", "speed": f"{human(speed)} tok/s", "mfu": f"mfu {mfu:.0%}"}
    if "share" in numbers:
        shown["share"] = f"{numbers['share']:.0%} of the data"
    show.update(1, **shown)
    if step % config.metrics.every_steps == 0 or step == 1 or last:
        h = job.hparams_at(step - 1, numbers)
        row = {
            "train/loss": numbers.pop("loss"),
            "train/loss_ema": smooth,
            "train/grad_norm": numbers.pop("grad_norm"),
            "train/tokens": at.tokens,
            "train/lr_factor": float(h["smear"]["lr"]) / SMEAR_LR,  # the one rate that no setting changes
            "train/muon_momentum": float(h[MATRIX]["momentum"]),
            "train/skipped_steps": at.skipped_steps,
            "train/loss_scale": float(state.scaler["scale"]),
            "perf/step_seconds": seconds,
            "perf/wall_seconds": at.wall_seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/data_wait_seconds": numbers.pop("data_wait_seconds"),
            "perf/peak_memory_bytes": metrics.peak_memory_bytes(job.runtime.device),
        }
        metrics.write(job.log, step, row | {n if "/" in n else f"train/{n}": x for n, x in numbers.items()})
    evaluated = any(due(step, one.every_steps) for one in job.evaluations if one.key)
    if last or due(step, config.checkpoint.every_steps) or evaluated:
        save(job, state, at)  # before an evaluation too, which may take long, or fail
    examine(job, show, state, at)
    return at


def examine(job: Job, show: progress.Bar, state: TrainState, at: Progress) -> None:
    """Evaluate after a step what is due and not in the record: also first thing in a run stopped before it could."""
    pending = [one for one in job.evaluations if at.done or due(at.step, one.every_steps)]
    recorded = _recorded(job, at.step) if pending else set()
    for key, _, run in pending:
        if key in recorded:
            continue
        result = run(job, state)
        if result is None:
            return  # a resumed run makes up for it
        if result.metrics:
            if "val/bpb" in result.metrics:
                checkpoint.add_metrics(job.manager, at.step, {"val/bpb": result.metrics["val/bpb"]})
            metrics.write(job.log, at.step, result.metrics)
        if result.lines:
            show.write("\n".join(result.lines))


def examined(job: Job, at: Progress) -> bool:
    """Return whether the record has all the evaluations that are due after a step."""
    wanted = {key for key, every_steps, _ in job.evaluations if key and (at.done or due(at.step, every_steps))}
    return at.step == 0 or wanted <= _recorded(job, at.step)


def _recorded(job: Job, step: int) -> set[str]:
    """Return the keys of the evaluations that the record has of a step; rank 0, which writes it, tells the others."""
    keys = [one.key for one in job.evaluations if one.key]
    rows = metrics.read(job.folder) if job.runtime.is_main else []
    there = {name for row in rows if row["step"] == step for name in row}
    found = runtimes.agree(sum(1 << i for i, key in enumerate(keys) if key in there))
    return {key for i, key in enumerate(keys) if found >> i & 1}


def due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps, or never, happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save(job: Job, state: TrainState, at: Progress) -> None:
    """Checkpoint the state with all that a resumed run, a chat or a person needs beside it."""
    loader = at.loader
    meta = {
        "stage": job.stage,
        "parent": job.parent,
        "config": dict(configs.flatten(job.config)),
        "model": dataclasses.asdict(job.shape),
        "loader": loader["position"],
        "progress": at._replace(loader=None)._asdict(),
        "tokens": at.tokens,
        "num_steps": job.num_steps,
        "torch": torch.__version__,
    }
    # No random state: whatever draws has a generator of its own, made from the seed and a name or a step.
    arrays = {f"loader_{name}": array for name, array in loader.items() if name != "position"}
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


def bits_per_byte(job: Job, state: TrainState, *, batches: Callable[[], Generator], steps: int) -> Result | None:
    """Return bits per byte on the validation data; None: a signal stopped it.

    Args:
        batches: opens the data at its beginning: (batch, …) each. steps: batches that are read at most.
    """
    token_bytes = torch.from_numpy(tokenizer.token_bytes(job.tok)).to(job.runtime.device)
    with contextlib.closing(batches()) as stream:
        first = next(stream)
        rest = itertools.takewhile(lambda _: not job.stop.agreed(), itertools.islice(stream, steps - 1))
        taken = itertools.chain([first], rest)
        params = sharding.enter(job.layout, state.params, job.runtime.compute_dtype)
        bpb = evaluate.bits_per_byte(params, (batch for batch, *_ in taken), token_bytes, job.loss_fn)
    if job.stop.agreed():
        return None
    return Result({"val/bpb": bpb}, [f"step {int(state.step)}: validation {bpb:.4f} bits per byte"])


def samples(job: Job, state: TrainState) -> Result:
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
    return Result({}, lines)


def finish(job: Job, at: Progress) -> None:
    """Draw the curves beside the metrics, and print the validation curve, the totals and where everything is."""
    if not job.runtime.is_main:
        return
    rows = metrics.read(job.folder)
    draw(job.folder, rows)
    steps, bpb = metrics.curve(rows, "val/bpb")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, bpb, title="validation bits per byte, by step"))
    word, of = "done" if at.done else "stopped after", f" of {job.num_steps}" if job.num_steps else ""
    print(f"{word} {at.step}{of} steps, {human(at.tokens)} tokens")
    if at.timed_tokens:
        speed = at.timed_tokens / at.timed_seconds
        print(f"training: {human(speed)} tokens/s, {duration(at.tokens / speed)} without evaluations")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps were left out: loss or gradient not finite")
    pictures = "".join(f", {name}" for name in ("loss.svg", "bpb.svg") if (job.folder / name).exists())
    print(f"run folder: {job.folder} (checkpoints/, metrics.jsonl, config.json{pictures})")


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
