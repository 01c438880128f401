"""One training stage from its settings to its last checkpoint: open or resume, loop, log, save, evaluate, finish.

Pretraining, mid-training, fine-tuning and RL share this path; what differs is a value of type `Stage`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint, distributed, eval, infer, model
from nanochat import config as configs
from nanochat.data import Tokenizer, mixture, tokenizer
from nanochat.distributed import Runtime, ShardingPlan, hardware, mark_restart, peak_flops, sharding
from nanochat.metrics import logger, noise_scale, plots, progress, run_lock
from nanochat.model import ModelConfig
from nanochat.text import format_count, format_duration
from nanochat.train import build, init_from
from nanochat.train import step as train
from nanochat.train.config import StageConfig, run_folder
from nanochat.train.step import NonFiniteLossError, Progress, StepFn, StopFlag, TrainState

NOT_COMPARED = ("name", "init_from", "resume", "resume_step", "overwrite", "dry_run")
UNTIMED_STEPS = 10  # of every start: they compile and warm up


class Result(NamedTuple):
    """What an evaluation returns: metrics to log, and lines to print."""

    metrics: Mapping[str, float] = {}
    lines: Sequence[str] = ()


class Evaluation(NamedTuple):
    """An evaluation that runs every so many steps (None: never) and after the last one."""

    key: str | None  # a metric that it logs, by which a resumed run sees whether it is done; None: it only prints
    every_steps: int | None
    run: Callable[["RunContext", TrainState], Result]  # a collective call


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is particular to one stage.

    Attributes:
        name: base, mid, sft or rl.
        num_steps: length of the run; None: until the batches end.
        step_tokens: tokens of a step, over all ranks. flops_per_token: forward and backward.
        make_step: (train step, rows of a micro-batch) -> the loop's step, see `train.scheduled`.
        batches: (loader state or None, rows of a micro-batch) -> the batches for `train.fit`. Sentences on what is not
            trained on are "skipped" in the position of their state.
        evaluations: in the order in which they run.
        origin: run, step and stage of the checkpoint that this stage starts from, or None.
        initial_state: (sharding_plan) -> the state before the first step; None: random parameters, or new adapters.
        branch: folder and step of another run that a new run continues from there; None: it starts at step 0.
        lora: what to train adapters of; None: the model's parameters are trained. objective: the loss, see `build`.
    """

    name: str
    num_steps: int | None
    step_tokens: int
    flops_per_token: int
    make_step: Callable[[Callable[..., Any], int], StepFn]
    batches: Callable[[Any, int], Generator[tuple[dict[str, Any], Any, dict[str, float]], None, None]]
    evaluations: Sequence[Evaluation]
    origin: Mapping[str, Any] | None = None
    initial_state: Callable[[ShardingPlan | None], TrainState] | None = None
    branch: tuple[Path, int] | None = None
    lora: build.Lora | None = None
    objective: Callable[..., Any] = model.loss.next_token


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the phases of a run share."""

    config: StageConfig
    stage: Stage
    shape: ModelConfig
    tok: Tokenizer
    runtime: Runtime
    sharding_plan: ShardingPlan | None  # None for a single process
    loss_fn: Callable  # for evaluation
    peak_flops: float  # of a device
    folder: Path
    check_lock: Callable[[], None]  # raises if another job has taken the folder
    manager: checkpoint.Manager
    log: logger.Log
    bar: progress.Bar
    stop: StopFlag
    first_step: int  # steps done before this process started


def run_stage(
    config: StageConfig, stage: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, *, try_rows: bool = False
) -> None:
    """Train to the end of the stage, or to the first signal, which exits with its code after saving.

    Args:
        config: resolved: with a name and a device_batch_size.
        try_rows: device_batch_size is an estimate: try a step before anything is written.
    """
    folder = run_folder(str(config.name))
    with contextlib.ExitStack() as stack:
        stack.enter_context(build.out_of_memory_as_user_error(config))
        # Everything that can be refused comes before the run's folder is touched.
        lora, spec = stage.lora, stage.lora.spec if stage.lora else model.spec(shape)
        sharding_plan = sharding.make_plan(config.sharding, runtime, spec)
        train_step, loss_fn, kernels = build.build_step_functions(
            config, shape, runtime, sharding_plan, lora, stage.objective
        )
        if try_rows:
            rows = stage.step_tokens // (shape.sequence_len * runtime.world_size)
            make_step = functools.partial(stage.make_step, train_step)
            rows = build.try_batch_size(config, shape, rows, runtime, sharding_plan, make_step, lora)
            config = dataclasses.replace(config, device_batch_size=rows)
        micro_batches = stage.step_tokens // (config.rows * shape.sequence_len * runtime.world_size)
        noise_scale.check(config.metrics.noise_scale_every, stage.name, micro_batches, sharding_plan)
        build.advise_all_gpus(runtime)
        flops = stage.flops_per_token * stage.step_tokens / runtime.world_size
        build.advise_accumulation(stage.name, spec, micro_batches, flops)
        limit, limit_from = peak_flops(runtime.device, runtime.compute_dtype)
        print(f"{kernels}; MFU is of {limit / 1e12:.4g} TFLOP/s ({limit_from}); run folder: {folder}")

        check_lock = stack.enter_context(run_lock.held(folder))
        stop = stack.enter_context(train.stop_on_signals())  # left after the manager: the last save is protected too
        manager = init_from.open_checkpoints(folder, config, runtime)
        stack.callback(checkpoint.close, manager)  # waits for the last save, after an error as well
        mark_restart(f"opened {config.name}")  # a restart of the job by torchrun resumes this run
        is_new = checkpoint.latest_step(manager) is None
        start = stage.branch if is_new else (folder, None)
        state, at = init_or_restore(config, stage, shape, start, runtime, sharding_plan)
        batches = stack.enter_context(contextlib.closing(stage.batches(at.loader, config.rows)))
        if is_new and runtime.is_main:
            tokenizer.save(tok, folder / "tokenizer")  # the run's own copy: the original may be trained again
        log = logger.open_log(
            folder,
            resume_step=at.step if config.resume or start else None,
            rows_from=start[0] if start and (is_new or config.resume_step is not None) else None,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=config,
            enabled=runtime.is_main,
        )
        stack.callback(logger.close, log)
        bar = stack.enter_context(progress.Bar(stage.num_steps, initial=at.step, label=str(config.name)))
        ctx = RunContext(
            config, stage, shape, tok, runtime, sharding_plan, loss_fn, limit, folder, check_lock, manager, log, bar,
            stop, at.step,
        )  # fmt: skip
        if not evals_done(ctx, at):  # a stop prevented them
            run_evals(ctx, state, at)
        try:
            state, at = train.fit(
                state,
                at,
                batches,
                num_steps=stage.num_steps,
                step_fn=build.make_step_fn(config, train_step, stage.make_step, sharding_plan),
                after_step=functools.partial(log_step, ctx),
                save=functools.partial(save_checkpoint, ctx),
                stop=stop,
                # float16 overflows now and then; its loss scale shrinks until it does not.
                skip_nonfinite=config.train.skip_nonfinite or runtime.compute_dtype == torch.float16,
                needs_state=functools.partial(needs_state, ctx),
            )
        except NonFiniteLossError as error:
            raise with_advice(error, manager) from None
        stopped = stop.agreed() and not (at.done and evals_done(ctx, at))
    finalize(ctx, at)
    if stopped and stop.signal:
        saved = f"step {at.step} is saved; --resume continues from it" if at.step else "no step was done"
        print(f"stopped by {stop.signal.name}; {saved}")
        raise SystemExit(128 + stop.signal)  # the shell's exit code of a signal, so that `&&` does not continue


def init_or_restore(
    config: StageConfig,
    stage: Stage,
    shape: ModelConfig,
    start: tuple[Path, int | None] | None,
    runtime: Runtime,
    sharding_plan: ShardingPlan | None,
) -> tuple[TrainState, Progress]:
    """Return the state and progress at a step of a run (None: its last), or without `start` before the first step."""
    if start is None:
        init = functools.partial(build.init_state, config, shape, runtime, lora=stage.lora)
        state = (init if stage.lora else stage.initial_state or init)(sharding_plan)
        return build.as_configured(config, state, sharding_plan), Progress()
    folder, step = start
    abstract = build.init_state(config, shape, runtime, sharding_plan, device="meta", lora=stage.lora)
    abstract = build.like_saved(abstract, checkpoint.inspect(folder, step).state)
    state, meta, arrays = checkpoint.restore(folder / "checkpoints", abstract, step, device=runtime.device)
    state = build.as_configured(config, state, sharding_plan)
    now = json.loads(json.dumps(dict(configs.flatten(config))))
    for name, value in now.items():
        before = meta["config"].get(name, value)
        if before != value and name not in NOT_COMPARED:
            print(f"changed since the checkpoint: {name} = {value} (was {before})")
    print(f"resumed from step {int(state.step)} in {folder / 'checkpoints'}")
    if meta["config"]["dtype"] != now["dtype"]:  # a loss scale is for one dtype
        state = state._replace(scaler=train.init_scaler(runtime.compute_dtype, runtime.device))
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
    noise, critical_batch = noise_scale.averaged(at.noise, numbers)
    seconds, tokens = numbers["perf/step_seconds"], int(numbers.pop("tokens", stage.step_tokens))
    timed = step - ctx.first_step > UNTIMED_STEPS
    at = at._replace(
        ema=ema,
        noise=noise,
        tokens=at.tokens + tokens,
        done=last,
        timed_tokens=at.timed_tokens + timed * tokens,
        timed_seconds=at.timed_seconds + timed * seconds,
    )
    if step == ctx.first_step + 1:
        hardware.freeze_garbage()
        ctx.bar.write(f"first step: {format_duration(seconds)}" + ", most of it to compile" * config.compile)
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        ctx.bar.write(f"step {step}: non-finite loss or gradient, step skipped ({at.skipped_steps} so far)")
    speed = tokens / seconds
    mfu = speed * stage.flops_per_token / (ctx.peak_flops * ctx.runtime.world_size)
    shown = {"loss": f"loss {smooth:.4f}", "speed": f"{format_count(speed)} tok/s", "mfu": f"mfu {mfu:.0%}"}
    if "share" in numbers:
        shown["share"] = f"{numbers['share']:.0%} of the data"
    ctx.bar.update(1, **shown)
    if step % config.metrics.every_steps == 0 or step == 1 or last:
        row = {name if "/" in name else f"train/{name}": x for name, x in numbers.items()} | {
            "train/loss_ema": smooth,
            "train/tokens": at.tokens,
            "train/skipped_steps": at.skipped_steps,
            "perf/wall_seconds": at.wall_seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/peak_memory_bytes": distributed.peak_memory_bytes(ctx.runtime.device),
        }
        logger.write(ctx.log, step, row | critical_batch)
    evaluated = any(is_due(step, evaluation.every_steps) for evaluation in stage.evaluations if evaluation.key)
    if last or is_due(step, config.checkpoint.every_steps) or evaluated:
        save_checkpoint(ctx, state, at)  # before an evaluation too, which may take long, or fail
    run_evals(ctx, state, at)
    return at


def needs_state(ctx: RunContext, step: int, stats: Mapping[str, float]) -> bool:
    """Return whether the state after a step is saved or evaluated, or the step should be logged at once."""
    every = [ctx.config.checkpoint.every_steps, *(evaluation.every_steps for evaluation in ctx.stage.evaluations)]
    return step in (ctx.first_step + 1, ctx.stage.num_steps) or "last" in stats or any(is_due(step, n) for n in every)


def is_due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps (None: never) happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save_checkpoint(ctx: RunContext, state: TrainState, at: Progress) -> None:
    """Save the state, and what resuming or using the model needs beside it."""
    if at.loader is None:  # before the first step, the seed gives the same state again
        return
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
    } | ({"lora": ctx.stage.lora.meta} if ctx.stage.lora else {})
    ctx.check_lock()
    # No random state: every random draw has its own generator, seeded by the run's seed and a name or step.
    arrays = {f"loader_{name}": array for name, array in at.loader.items() if name != "position"}
    files = {name: ctx.folder / "tokenizer" / name for name in tokenizer.FILES}
    checkpoint.save(ctx.manager, state, meta, arrays=arrays, files=files)


def pending_evals(ctx: RunContext, at: Progress) -> list[Evaluation]:
    """Return the evaluations that are due after a step and not in metrics.jsonl yet, as rank 0 sees it."""
    due = [evaluation for evaluation in ctx.stage.evaluations if at.done or is_due(at.step, evaluation.every_steps)]
    if not due:
        return []
    rows = logger.read(ctx.folder) if ctx.runtime.is_main else []
    logged = {name for row in rows if row["step"] == at.step for name in row}
    missing = distributed.broadcast_object([evaluation.key not in logged for evaluation in due])
    return list(itertools.compress(due, missing))


def evals_done(ctx: RunContext, at: Progress) -> bool:
    """Return whether all evaluations that are due after a step are logged."""
    return not any(evaluation.key for evaluation in pending_evals(ctx, at))


def run_evals(ctx: RunContext, state: TrainState, at: Progress) -> None:
    """Run the evaluations that are due and not logged yet; a signal ends them, and a resumed run makes up for it."""
    for evaluation in pending_evals(ctx, at):
        metrics, lines = evaluation.run(ctx, state)
        if evaluation.key and ctx.stop.agreed():  # it may have been cut short
            return
        if metrics:
            if "val/bpb" in metrics:
                checkpoint.add_metrics(ctx.manager, at.step, {"val/bpb": metrics["val/bpb"]})
            logger.write(ctx.log, at.step, metrics)
        if lines:
            ctx.bar.write("\n".join(lines))


def evaluate_bpb(
    ctx: RunContext, state: TrainState, *, batches: Callable[[int], Generator], key: str = "val/bpb", share: float = 1.0
) -> Result:
    """Return bits per byte on a share of `eval.tokens` of the validation data; nothing after a signal.

    Args:
        batches: (rows of a micro-batch) -> (batch, …) each, from the beginning of the data.
    """
    number = ctx.config.eval.tokens * share // (ctx.config.rows * ctx.shape.sequence_len * ctx.runtime.world_size)
    metrics = {}
    for name in (key, *[f"{key}_ema"] * (ctx.config.train.ema > 0)):
        with contextlib.closing(batches(ctx.config.rows)) as stream:
            waits = (ctx.stop.wait(stream) for _ in range(max(1, int(number))))
            items = itertools.takewhile(lambda item: not ctx.stop.agreed() and item is not None, waits)
            if (first := next(items, None)) is None:
                return Result()
            params = build.ema_params(state) if metrics else state.params
            if ctx.stage.lora:
                params = build.full_params(params, ctx.stage.lora)
            else:
                params = sharding.gather(ctx.sharding_plan, params, ctx.runtime.compute_dtype)
            inputs = (batch for batch, *_ in itertools.chain([first], items))
            metrics[name] = eval.bits_per_byte(params, inputs, ctx.tok, ctx.loss_fn)
    source = key.removeprefix("val/bpb").replace("/", " of ")
    text = f"step {int(state.step)}: validation{source} {metrics[key]:.4f} bits per byte"
    return Result(
        metrics, [text + "".join(f", {x:.4f} with the average of the weights" for x in [*metrics.values()][1:])]
    )


def print_samples(
    ctx: RunContext, state: TrainState, *, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> Result:
    """Return each of `eval.prompts` with the model's continuation of `encode(prompt)`, a line each."""
    config = ctx.config.eval
    if not config.prompts:
        return Result()
    params = build.full_params(state.params, ctx.stage.lora)
    with distributed.raise_on_any_failure():
        if not ctx.runtime.is_main:
            return Result()
        requests = [
            infer.Request(tuple(encode(prompt)), config.sample_tokens, config.temperature, config.top_k, seed)
            for seed, prompt in enumerate(config.prompts)
        ]
        needed = max(len(request.prompt) for request in requests) + config.sample_tokens
        engine = infer.start(
            params,
            ctx.shape,
            ctx.tok,
            slots=len(requests),
            context=min(needed, model.CONTEXT_LIMIT * ctx.shape.sequence_len),
            dtype=ctx.runtime.compute_dtype,
            compile=False,
        )
        texts = (decode(completion.content) for completion in infer.complete(engine, requests))
        return Result(lines=[f"  {prompt!r} → {text!r}" for prompt, text in zip(config.prompts, texts)])


def with_advice(error: NonFiniteLossError, manager: checkpoint.Manager) -> NonFiniteLossError:
    """Return the error with the last good checkpoint and what to try."""
    checkpoint.wait(manager)
    saved, lower = checkpoint.steps(manager), "a lower learning rate (--set optim.matrix_lr=…)"
    if not saved:
        return NonFiniteLossError(f"{error}, and no checkpoint is saved yet; try {lower}")
    text = (
        f"{error}; the last good checkpoint is step {saved[-1]}, right before it. --resume with "
        f"--set train.skip_nonfinite=true skips this batch, step={saved[-1] + 1} in --experiment=inspect"
    )
    if len(saved) > 1:
        text += f"; --set resume_step={saved[-2]} goes back to step {saved[-2]}, for {lower}"
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
    if tokens := noise_scale.averaged(at.noise, {})[1].get(noise_scale.TOKENS):
        print(f"critical batch: {noise_scale.describe(tokens, ctx.stage.step_tokens)}")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps skipped: non-finite loss or gradient")
    print("".join(f"{text}\n" for text in mixture.notes(at.loader["position"] if at.loader else {})), end="")
    files = ["checkpoints/", "metrics.jsonl", "config.json", *(path.name for path in charts.values())]
    print(f"run folder: {ctx.folder} ({', '.join(files)})")
