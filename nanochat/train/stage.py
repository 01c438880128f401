"""One training stage from its settings to its last checkpoint: open or resume, loop, log, save, evaluate, finish.

Pretraining, mid-training, fine-tuning and RL share this path; what differs is a value of type `Stage`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from nanochat import checkpoint, distributed, eval, model
from nanochat import config as configs
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.distributed import Runtime, ShardingPlan, hardware, mark_restart, peak_flops, sharding, was_restarted
from nanochat.infer import sampling
from nanochat.metrics import logger, plots, progress
from nanochat.model import Compute, ModelConfig
from nanochat.optim import MATRIX, SMEAR_LR, Hparams
from nanochat.text import format_count, format_duration
from nanochat.train import build, init_from
from nanochat.train import step as train
from nanochat.train.config import StageConfig, run_folder
from nanochat.train.init_from import InitCheckpoint
from nanochat.train.step import NonFiniteLossError, Progress, StopFlag, TrainState

Config = TypeVar("Config", bound=StageConfig)

NOT_COMPARED = ("resume", "overwrite", "dry_run")
UNTIMED_STEPS = 10  # of every start: they compile and warm up


class Result(NamedTuple):
    """What an evaluation returns: metrics to log, and lines to print."""

    metrics: Mapping[str, float]
    lines: Sequence[str]


class Evaluation(NamedTuple):
    """An evaluation that runs every so many steps and after the last one.

    Attributes:
        key: a metric that it logs, by which a resumed run sees whether it is done; None: it only prints.
        every_steps: None: only after the last step.
        run: (context, state) -> result, or None if a signal stopped it; a collective call.
    """

    key: str | None
    every_steps: int | None
    run: Callable[["RunContext", TrainState], Result | None]


Batches = Generator[tuple[dict[str, Any], Any, dict[str, float]], None, None]
StepFn = Callable[..., tuple[TrainState, dict[str, torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is particular to one stage.

    Attributes:
        name: base, mid, sft or rl.
        num_steps: length of the run; None: until the batches end.
        step_tokens: tokens of a step, over all ranks. flops_per_token: forward and backward.
        hparams_at: (step, statistics of its batch) -> hyperparameters.
        batches: (loader state or None, rows of a micro-batch) -> the batches for `train.fit`.
        evaluations: (rows of a micro-batch) -> evaluations, in the order in which they run.
        origin: run, step and stage of the checkpoint that this stage starts from, or None.
        initial_state: (sharding_plan) -> the state before the first step; None: random parameters.
        make_step: (train step, sharding_plan) -> the step function to use; None: the train step, on micro-batches.
    """

    name: str
    num_steps: int | None
    step_tokens: int
    flops_per_token: int
    hparams_at: Callable[[int, Mapping[str, float]], Hparams]
    batches: Callable[[Any, int], Batches]
    evaluations: Callable[[int], Sequence[Evaluation]]
    origin: Mapping[str, Any] | None = None
    initial_state: Callable[[ShardingPlan | None], TrainState] | None = None
    make_step: Callable[[StepFn, ShardingPlan | None], StepFn] | None = None


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the phases of a run share.

    Attributes:
        sharding_plan: where the state lives on several ranks, or None. loss_fn: the loss for evaluation.
        peak_flops: matmul limit of a device, for the MFU.
        folder, manager, log, bar: the run's folder, open checkpoints, open metrics and progress bar.
        step_seconds: of the steps that this process has run: a list that grows.
    """

    config: StageConfig
    stage: Stage
    shape: ModelConfig
    tok: Tokenizer
    runtime: Runtime
    sharding_plan: ShardingPlan | None
    loss_fn: Callable
    evaluations: Sequence[Evaluation]
    peak_flops: float
    folder: Path
    manager: checkpoint.Manager
    log: logger.Log
    bar: progress.Bar
    stop: StopFlag
    step_seconds: list[float] = dataclasses.field(default_factory=list)


def resume_after_restart(config: Config, name: str, runtime: Runtime) -> Config:
    """Return the settings, with `resume` set if torchrun has restarted a job that had opened the run `name`."""
    if runtime.restarts and not config.resume and was_restarted(f"opened {name}"):
        print(f"restart {runtime.restarts} by torchrun: resuming from the last checkpoint")
        return dataclasses.replace(config, resume=True)
    return config


def load_base(
    config: Config, stage: str, runtime: Runtime, *, run: str | None, step: int | None, stages: Collection[str]
) -> tuple[Config, InitCheckpoint, Mapping[str, Any] | None]:
    """Return the settings with the run's name, the checkpoint to start from, and its run, step and stage.

    A resumed run starts from its own checkpoint; its base run may be gone by then.

    Args:
        run, step: the base run; None: the newest run of one of `stages`.

    Raises:
        UserError: there is no such run or step.
    """
    start: str | Path | None = run
    if config.name is None:
        start = start or init_from.newest(stages)
        config = dataclasses.replace(config, name=f"{Path(start).expanduser().absolute().name}_{stage}")
    config = resume_after_restart(config, str(config.name), runtime)
    own = run_folder(str(config.name))
    if config.resume and init_from.has_checkpoint(own):
        base = init_from.load(own)
        return config, base, base.origin
    base = init_from.load(start or init_from.newest(stages), step)
    return config, base, base.record


def run_stage(
    config: StageConfig, stage: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, *, try_rows: bool = False
) -> None:
    """Train to the end of the stage, or to the first signal.

    Args:
        config: resolved: with a name and a device_batch_size.
        try_rows: device_batch_size is an estimate: try a step before anything is written.

    Raises:
        UserError: a setting does not fit, memory is too small, or the run's folder cannot be used.
        SystemExit: stopped by a signal, after saving.
    """
    try:
        _run_stage(config, stage, shape, tok, runtime, try_rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device_batch_size={config.device_batch_size} runs out of memory ({str(error).split('. ')[0]}); "
            "set a smaller one, or auto; --experiment=plan shows what fits"
        ) from None


def _run_stage(
    config: StageConfig, stage: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, try_rows: bool
) -> None:
    # Everything that can be refused comes before the run's folder is touched.
    folder = run_folder(str(config.name))
    sharding_plan = sharding.make_plan(config.sharding, runtime, model.spec(shape))
    step_fn, loss_fn, kernels = build.build_step_functions(config, shape, runtime, sharding_plan)
    if try_rows:
        rows = stage.step_tokens // (shape.sequence_len * runtime.world_size)
        rows = build.try_batch_size(config, shape, rows, runtime, sharding_plan, step_fn, stage.hparams_at(0, {}))
        config = dataclasses.replace(config, device_batch_size=rows)
    limit, limit_from = peak_flops(runtime.device, runtime.compute_dtype)
    print(f"{kernels}; MFU is of {limit / 1e12:.4g} TFLOP/s ({limit_from}); run folder: {folder}")

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(train.stop_on_signals())  # first in, last out: the last save is protected too
        manager = open_checkpoints(folder, config, runtime)
        stack.callback(checkpoint.close, manager)  # waits for the last save, after an error as well
        mark_restart(f"opened {config.name}")  # a restart of the job by torchrun resumes this run
        state, at = init_or_restore(config, stage, shape, manager, runtime, sharding_plan)
        batches = stack.enter_context(contextlib.closing(stage.batches(at.loader, config.rows)))
        if at.step == 0 and runtime.is_main:
            tokenizer.save(tok, folder / "tokenizer")  # the run's own copy: the original may be trained again
        log = logger.open_log(
            folder,
            resume_step=at.step if config.resume else None,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=config,
            enabled=runtime.is_main,
        )
        stack.callback(logger.close, log)
        bar = stack.enter_context(progress.Bar(stage.num_steps, initial=at.step, label=str(config.name)))
        ctx = RunContext(
            config, stage, shape, tok, runtime, sharding_plan, loss_fn, stage.evaluations(config.rows), limit, folder,
            manager, log, bar, stop,
        )  # fmt: skip
        if not evals_done(ctx, at):
            run_evals(ctx, state, at)
        try:
            state, at = train.fit(
                state,
                at,
                batches,
                num_steps=stage.num_steps,
                rows=None if stage.make_step else config.rows,
                step_fn=stage.make_step(step_fn, sharding_plan) if stage.make_step else step_fn,
                hparams_at=stage.hparams_at,
                after_step=functools.partial(log_step, ctx),
                save=functools.partial(save_checkpoint, ctx),
                stop=stop,
                # float16 overflows now and then; its loss scale shrinks until it does not.
                skip_nonfinite=config.train.skip_nonfinite or runtime.compute_dtype == torch.float16,
            )
        except NonFiniteLossError as error:
            raise with_advice(error, manager) from None
        stopped = stop.agreed() and not (at.done and evals_done(ctx, at))
    finalize(ctx, at)
    if stopped and stop.signal:
        saved = f"step {at.step} is saved; --resume continues from it" if at.step else "no step was done"
        print(f"stopped by {stop.signal.name}; {saved}")
        raise SystemExit(128 + stop.signal)  # the shell's exit code of a signal, so that `&&` does not continue


def open_checkpoints(folder: Path, config: StageConfig, runtime: Runtime) -> checkpoint.Manager:
    """Open the checkpoints of a new run, a resumed one, or with `overwrite` one that replaces an old run.

    Raises:
        UserError: the folder holds a run, and neither `resume` nor `overwrite` is set.
    """
    checkpoints = folder / "checkpoints"
    saved = checkpoint.steps(checkpoints) if runtime.is_main else []
    last = distributed.all_reduce_max(saved[-1] if saved else -1)  # a network disk may differ between ranks
    if last >= 0 and not config.resume:
        if not config.overwrite:
            raise UserError(
                f"run {folder} has checkpoints up to step {last}: --resume continues it, --set name=<other> "
                "starts another, --set overwrite=true replaces it"
            )
        old = checkpoints.with_name("checkpoints.old")
        if runtime.is_main:
            shutil.rmtree(old, ignore_errors=True)
            checkpoints.rename(old)
        distributed.barrier()
        print(f"the checkpoints of the replaced run are kept in {old}, until the next replacement")
    if config.resume and last < 0:
        print(f"nothing to resume in {checkpoints}: starting at step 0")
    return checkpoint.open_manager(checkpoints, config.checkpoint)


def init_or_restore(
    config: StageConfig,
    stage: Stage,
    shape: ModelConfig,
    manager: checkpoint.Manager,
    runtime: Runtime,
    sharding_plan: ShardingPlan | None,
) -> tuple[TrainState, Progress]:
    """Return the state and progress of the last checkpoint, or those before the first step."""
    dtype = runtime.compute_dtype
    if checkpoint.latest_step(manager) is None:
        if stage.initial_state:
            return stage.initial_state(sharding_plan), Progress()
        return build.init_state(config, shape, runtime, sharding_plan), Progress()
    params = model.init(shape, config.seed, device="meta", dtype=dtype, sharding_plan=sharding_plan)
    abstract = train.init(params, model.spec(shape), dtype, sharding_plan)
    state, meta, arrays = checkpoint.restore(manager, abstract, device=runtime.device)
    now = json.loads(json.dumps(dict(configs.flatten(config))))
    for name, value in now.items():
        before = meta["config"].get(name, value)
        if before != value and name not in NOT_COMPARED:
            print(f"changed since the checkpoint: {name} = {value} (was {before})")
    print(f"resumed from step {int(state.step)} in {manager.folder}")
    if meta["config"]["dtype"] != now["dtype"]:
        state = state._replace(scaler=train.init_scaler(dtype, runtime.device))  # a loss scale is for one dtype
    loader = {"position": meta["loader"], **{n.removeprefix("loader_"): array for n, array in arrays.items()}}
    at = progress_from(meta)._replace(loader=loader)
    if stage.num_steps is not None:
        at = at._replace(done=at.step >= stage.num_steps)  # a finished run may have been given more steps
    return state, at


def progress_from(meta: Mapping[str, Any]) -> Progress:
    """Return the progress in a checkpoint's metadata, also in those of before tokens were counted."""
    known = {name: x for name, x in meta["progress"].items() if name in Progress._fields}
    if "timed_tokens" not in known:
        known |= {"tokens": meta["tokens"], "timed_seconds": 0.0}
    return Progress(**known)


def log_step(ctx: RunContext, state: TrainState, at: Progress, numbers: dict[str, float]) -> Progress:
    """Log a step; then save, evaluate and sample if due, in this order. Return the updated progress.

    Args:
        numbers: of the step and of its batch; "last": no batch follows; "tokens": if not step_tokens; "share": of the
            data seen before this batch, if the length of the run is not known in steps.
    """
    config, stage, step = ctx.config, ctx.stage, at.step
    last = bool(numbers.pop("last", 0)) or step == stage.num_steps
    ema, smooth = logger.ema(at.ema, numbers["loss"])
    seconds = numbers.pop("step_seconds")
    ctx.step_seconds.append(seconds)
    if len(ctx.step_seconds) == 1:
        hardware.freeze_garbage()
        ctx.bar.write(f"first step: {format_duration(seconds)}" + ", most of it to compile" * config.compile)
    tokens, timed = int(numbers.pop("tokens", stage.step_tokens)), len(ctx.step_seconds) > UNTIMED_STEPS
    at = at._replace(
        ema=ema,
        tokens=at.tokens + tokens,
        done=last,
        timed_tokens=at.timed_tokens + timed * tokens,
        timed_seconds=at.timed_seconds + timed * seconds,
    )
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        ctx.bar.write(f"step {step}: non-finite loss or gradient, step skipped ({at.skipped_steps} so far)")
    speed = tokens / seconds
    mfu = speed * stage.flops_per_token / (ctx.peak_flops * ctx.runtime.world_size)
    shown = {"loss": f"loss {smooth:.4f}", "speed": f"{format_count(speed)} tok/s", "mfu": f"mfu {mfu:.0%}"}
    if "share" in numbers:
        shown["share"] = f"{numbers['share']:.0%} of the data"
    ctx.bar.update(1, **shown)
    if step % config.metrics.every_steps == 0 or step == 1 or last:
        h = stage.hparams_at(step - 1, numbers)
        row = {
            "train/loss": numbers.pop("loss"),
            "train/loss_ema": smooth,
            "train/grad_norm": numbers.pop("grad_norm"),
            "train/tokens": at.tokens,
            "train/lr_factor": float(h["smear"]["lr"]) / SMEAR_LR,  # the one learning rate that no setting changes
            "train/muon_momentum": float(h[MATRIX]["momentum"]),
            "train/skipped_steps": at.skipped_steps,
            "train/loss_scale": float(state.scaler["scale"]),
            "perf/step_seconds": seconds,
            "perf/wall_seconds": at.wall_seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/data_wait_seconds": numbers.pop("data_wait_seconds"),
            "perf/peak_memory_bytes": distributed.peak_memory_bytes(ctx.runtime.device),
        }
        logger.write(ctx.log, step, row | {n if "/" in n else f"train/{n}": x for n, x in numbers.items()})
    evaluated = any(is_due(step, evaluation.every_steps) for evaluation in ctx.evaluations if evaluation.key)
    if last or is_due(step, config.checkpoint.every_steps) or evaluated:
        save_checkpoint(ctx, state, at)  # before an evaluation too, which may take long, or fail
    run_evals(ctx, state, at)
    return at


def is_due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps (None: never) happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save_checkpoint(ctx: RunContext, state: TrainState, at: Progress) -> None:
    """Save the state, and what resuming or using the model needs beside it."""
    meta = {
        "stage": ctx.stage.name,
        "parent": ctx.stage.origin,
        "config": dict(configs.flatten(ctx.config)),
        "model": dataclasses.asdict(ctx.shape),
        "loader": at.loader["position"],
        "progress": at._replace(loader=None)._asdict(),
        "tokens": at.tokens,
        "num_steps": ctx.stage.num_steps,
        "torch": torch.__version__,
    }
    # No random state: every random draw has its own generator, seeded by the run's seed and a name or step.
    arrays = {f"loader_{name}": array for name, array in at.loader.items() if name != "position"}
    files = {name: ctx.folder / "tokenizer" / name for name in tokenizer.FILES}
    checkpoint.save(ctx.manager, state, meta, arrays=arrays, files=files)


def run_evals(ctx: RunContext, state: TrainState, at: Progress) -> None:
    """Run the evaluations that are due and not logged yet; a resumed run does those that a stop prevented."""
    pending = [evaluation for evaluation in ctx.evaluations if at.done or is_due(at.step, evaluation.every_steps)]
    logged = _logged_evals(ctx, at.step) if pending else set()
    for key, _, run in pending:
        if key in logged:
            continue
        result = run(ctx, state)
        if result is None:
            return
        if result.metrics:
            if "val/bpb" in result.metrics:
                checkpoint.add_metrics(ctx.manager, at.step, {"val/bpb": result.metrics["val/bpb"]})
            logger.write(ctx.log, at.step, result.metrics)
        if result.lines:
            ctx.bar.write("\n".join(result.lines))


def evals_done(ctx: RunContext, at: Progress) -> bool:
    """Return whether all evaluations that are due after a step are logged."""
    due = {key for key, every_steps, _ in ctx.evaluations if key and (at.done or is_due(at.step, every_steps))}
    return at.step == 0 or due <= _logged_evals(ctx, at.step)


def _logged_evals(ctx: RunContext, step: int) -> set[str]:
    """Return the keys of the evaluations that metrics.jsonl has of a step, as rank 0 sees it."""
    keys = [evaluation.key for evaluation in ctx.evaluations if evaluation.key]
    rows = logger.read(ctx.folder) if ctx.runtime.is_main else []
    names = {name for row in rows if row["step"] == step for name in row}
    bits = distributed.all_reduce_max(sum(1 << i for i, key in enumerate(keys) if key in names))
    return {key for i, key in enumerate(keys) if bits >> i & 1}


def evaluate_bpb(ctx: RunContext, state: TrainState, *, batches: Callable[[], Generator], steps: int) -> Result | None:
    """Return bits per byte on the validation data; None: stopped by a signal.

    Args:
        batches: opens the data at its beginning: (batch, …) each. steps: batches to read at most.
    """
    with contextlib.closing(batches()) as stream:
        first = next(stream)
        rest = itertools.takewhile(lambda _: not ctx.stop.agreed(), itertools.islice(stream, steps - 1))
        params = sharding.gather(ctx.sharding_plan, state.params, ctx.runtime.compute_dtype)
        inputs = (batch for batch, *_ in itertools.chain([first], rest))
        bpb = eval.bits_per_byte(params, inputs, ctx.tok, ctx.loss_fn)
    if ctx.stop.agreed():
        return None
    return Result({"val/bpb": bpb}, [f"step {int(state.step)}: validation {bpb:.4f} bits per byte"])


def print_samples(ctx: RunContext, state: TrainState) -> Result:
    """Return each prompt of the settings with the model's continuation, a line each."""
    config, dtype = ctx.config.eval, ctx.runtime.compute_dtype
    compute = Compute(dtype=dtype, all_gather=sharding.gather_layer(ctx.sharding_plan, dtype))
    params = sharding.gather(ctx.sharding_plan, state.params, dtype)
    logits_fn = functools.partial(model.apply, config=ctx.shape, compute=compute)
    lines = []
    for i, prompt in enumerate(config.prompts):
        tokens = sampling.sample(
            params,
            [ctx.tok.bos, *ctx.tok.encode(prompt)],
            logits_fn,
            max_tokens=config.sample_tokens,
            stop=(),  # every rank takes the same number of steps, whatever it samples
            temperature=config.temperature,
            top_k=config.top_k,
            seed=i,
        )
        ids = list(itertools.takewhile(lambda token: token != ctx.tok.bos, tokens))
        lines.append(f"  {prompt!r} → {ctx.tok.decode(ids)!r}")
    return Result({}, lines)


def with_advice(error: NonFiniteLossError, manager: checkpoint.Manager) -> NonFiniteLossError:
    """Return the error with the last good checkpoint and what to try."""
    checkpoint.wait(manager)
    saved = checkpoint.steps(manager)
    if not saved:
        return NonFiniteLossError(
            f"{error}, and no checkpoint is saved yet; try a lower learning rate (--set optim.matrix_lr=…)"
        )
    text = (
        f"{error}; the last good checkpoint is step {saved[-1]}, right before it. --resume with "
        "--set train.skip_nonfinite=true skips this batch"
    )
    if len(saved) > 1:
        text += (
            f"; or delete {manager.folder / str(saved[-1])} and --resume from step {saved[-2]} with a lower learning "
            "rate (--set optim.matrix_lr=…)"
        )
    return NonFiniteLossError(text)


def finalize(ctx: RunContext, at: Progress) -> None:
    """Draw the curves into the run's folder; print the validation curve, the totals and the folder."""
    if not ctx.runtime.is_main:
        return
    rows = logger.read(ctx.folder)
    charts = plots.draw_run(rows, ctx.folder, title=ctx.folder.name)
    steps, bpb = logger.curve(rows, "val/bpb")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, bpb, title="validation bits per byte, by step"))
    of = f" of {ctx.stage.num_steps}" if ctx.stage.num_steps else ""
    print(f"{'done' if at.done else 'stopped after'} {at.step}{of} steps, {format_count(at.tokens)} tokens")
    if at.timed_tokens:
        speed = at.timed_tokens / at.timed_seconds
        print(f"training: {format_count(speed)} tokens/s, {format_duration(at.tokens / speed)} without evaluations")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps skipped: non-finite loss or gradient")
    files = ["checkpoints/", "metrics.jsonl", "config.json", *(path.name for path in charts.values())]
    print(f"run folder: {ctx.folder} ({', '.join(files)})")
