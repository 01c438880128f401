"""What happens around the steps of a run: it is logged, saved, evaluated, sampled from, and drawn at its end.

A training stage from its settings to its last checkpoint: one path that all stages take, each with its own parts.

A stage brings what `Stage` holds: batches, a state to begin with, rates, evaluations. Here it gets a folder, goes on
from its last checkpoint where it is asked to, and is stopped by a signal without losing anything.
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

from nanochat import checkpoint, distributed, model
from nanochat import config as configs
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.distributed import Layout, Runtime, hardware, mark_restart, peak_flops, sharding, was_restarted
from nanochat.infer import sampling
from nanochat.metrics import logger, plots, progress
from nanochat.model import Compute, ModelConfig, loss
from nanochat.optim import MATRIX, SMEAR_LR, Hparams
from nanochat.text import format_count, format_duration
from nanochat.train import build, init_from
from nanochat.train import step as train
from nanochat.train.config import StageConfig, run_folder
from nanochat.train.init_from import InitCheckpoint
from nanochat.train.step import NonFiniteLossError, Progress, StopFlag, TrainState

Settings = TypeVar("Settings", bound=StageConfig)

NOT_COMPARED = ("resume", "overwrite", "dry_run")
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
    log: logger.Log
    stop: StopFlag
    seconds: list[float]


def log_step(job: Job, show: progress.Bar, state: TrainState, at: Progress, numbers: dict[str, float]) -> Progress:
    """Log a step; then save, evaluate and sample as is due, in that order. Return the progress, updated.

    Args:
        numbers: of the step and of its batch. "last" tells that no batch follows; "tokens" is said where it is not
            step_tokens; "share" is how much of the run was done before, where the steps do not tell.
    """
    config, step = job.config, at.step
    last = bool(numbers.pop("last", 0)) or step == job.num_steps
    ema, smooth = logger.ema(at.ema, numbers["loss"])
    seconds = numbers.pop("step_seconds")
    job.seconds.append(seconds)
    if len(job.seconds) == 1:
        hardware.freeze_garbage()
        show.write(f"first step: {format_duration(seconds)}" + ", most of it to compile" * config.compile)
    tokens, timed = int(numbers.pop("tokens", job.step_tokens)), len(job.seconds) > UNTIMED_STEPS
    at = at._replace(ema=ema, tokens=at.tokens + tokens, done=last)
    at = at._replace(timed_tokens=at.timed_tokens + timed * tokens, timed_seconds=at.timed_seconds + timed * seconds)
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        show.write(f"step {step}: loss or gradient not finite, left out ({at.skipped_steps} so far)")
    speed = tokens / seconds
    mfu = speed * job.flops_per_token / (job.peak_flops * job.runtime.world_size)
    shown = {"loss": f"loss {smooth:.4f}", "speed": f"{format_count(speed)} tok/s", "mfu": f"mfu {mfu:.0%}"}
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
            "perf/peak_memory_bytes": distributed.peak_memory_bytes(job.runtime.device),
        }
        logger.write(job.log, step, row | {n if "/" in n else f"train/{n}": x for n, x in numbers.items()})
    evaluated = any(is_due(step, one.every_steps) for one in job.evaluations if one.key)
    if last or is_due(step, config.checkpoint.every_steps) or evaluated:
        save_checkpoint(job, state, at)  # before an evaluation too, which may take long, or fail
    run_evals(job, show, state, at)
    return at


def run_evals(job: Job, show: progress.Bar, state: TrainState, at: Progress) -> None:
    """Evaluate after a step what is due and not in the record: also first thing in a run stopped before it could."""
    pending = [one for one in job.evaluations if at.done or is_due(at.step, one.every_steps)]
    recorded = _evals_in_log(job, at.step) if pending else set()
    for key, _, run in pending:
        if key in recorded:
            continue
        result = run(job, state)
        if result is None:
            return  # a resumed run makes up for it
        if result.metrics:
            if "val/bpb" in result.metrics:
                checkpoint.add_metrics(job.manager, at.step, {"val/bpb": result.metrics["val/bpb"]})
            logger.write(job.log, at.step, result.metrics)
        if result.lines:
            show.write("\n".join(result.lines))


def evals_done(job: Job, at: Progress) -> bool:
    """Return whether the record has all the evaluations that are due after a step."""
    wanted = {key for key, every_steps, _ in job.evaluations if key and (at.done or is_due(at.step, every_steps))}
    return at.step == 0 or wanted <= _evals_in_log(job, at.step)


def _evals_in_log(job: Job, step: int) -> set[str]:
    """Return the keys of the evaluations that the record has of a step; rank 0, which writes it, tells the others."""
    keys = [one.key for one in job.evaluations if one.key]
    rows = logger.read(job.folder) if job.runtime.is_main else []
    there = {name for row in rows if row["step"] == step for name in row}
    found = distributed.all_reduce_max(sum(1 << i for i, key in enumerate(keys) if key in there))
    return {key for i, key in enumerate(keys) if found >> i & 1}


def is_due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps, or never, happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save_checkpoint(job: Job, state: TrainState, at: Progress) -> None:
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


def evaluate_bpb(job: Job, state: TrainState, *, batches: Callable[[], Generator], steps: int) -> Result | None:
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
        bpb = loss.bits_per_byte(params, (batch for batch, *_ in taken), token_bytes, job.loss_fn)
    if job.stop.agreed():
        return None
    return Result({"val/bpb": bpb}, [f"step {int(state.step)}: validation {bpb:.4f} bits per byte"])


def print_samples(job: Job, state: TrainState) -> Result:
    """Return one line a prompt: the prompt and what the model makes of it."""
    config = job.config.eval
    dtype = job.runtime.compute_dtype
    compute = Compute(dtype=dtype, all_gather=sharding.gatherer(job.layout, dtype))
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


def finalize(job: Job, at: Progress) -> None:
    """Draw the curves beside the metrics, and print the validation curve, the totals and where everything is."""
    if not job.runtime.is_main:
        return
    rows = logger.read(job.folder)
    draw_curves(job.folder, rows)
    steps, bpb = logger.curve(rows, "val/bpb")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, bpb, title="validation bits per byte, by step"))
    word, of = "done" if at.done else "stopped after", f" of {job.num_steps}" if job.num_steps else ""
    print(f"{word} {at.step}{of} steps, {format_count(at.tokens)} tokens")
    if at.timed_tokens:
        speed = at.timed_tokens / at.timed_seconds
        print(f"training: {format_count(speed)} tokens/s, {format_duration(at.tokens / speed)} without evaluations")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps were left out: loss or gradient not finite")
    pictures = "".join(f", {name}" for name in ("loss.svg", "bpb.svg") if (job.folder / name).exists())
    print(f"run folder: {job.folder} (checkpoints/, metrics.jsonl, config.json{pictures})")


def draw_curves(folder: Path, rows: list[Any]) -> None:
    """Draw loss.svg and, once there is an evaluation, bpb.svg into the run's folder."""
    curves = {"each step": logger.curve(rows, "train/loss"), "smoothed": logger.curve(rows, "train/loss_ema")}
    if curves["each step"][0]:
        title = f"{folder.name}: training loss"
        plots.line_chart(folder / "loss.svg", curves, title=title, x_label="step", y_label="nats per token")
    bpb = logger.curve(rows, "val/bpb")
    if bpb[0]:
        title = f"{folder.name}: validation"
        plots.line_chart(folder / "bpb.svg", {"val": bpb}, title=title, x_label="step", y_label="bits per byte")


Stream = Generator[tuple[dict[str, Any], Any, dict[str, float]], None, None]
Step = Callable[..., tuple[TrainState, dict[str, torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage is, beside the settings that all have.

    Attributes:
        name: base, mid, sft or rl. parent: run, step and stage that it begins with; None: it begins with nothing.
        num_steps: of the run; None: as many as the batches give.
        step_tokens: of a step, all ranks together. flops_per_token: of a token, forward and backward.
        hparams_at: (step, statistics of its batch) -> hyperparameters.
        batches: (loader state, None at the beginning, rows of a micro-batch) -> batches, states and statistics, as
            `train.fit` takes them.
        initial: (layout) -> the state before the first step; None: freshly drawn.
        evaluations: in the order in which they are done; (rows of a micro-batch) -> evaluations.
        step: (train step) -> the step to take; None: as it is, on the batch split into micro-batches.
    """

    name: str
    num_steps: int | None
    step_tokens: int
    flops_per_token: int
    hparams_at: Callable[[int, Mapping[str, float]], Hparams]
    batches: Callable[[Any, int], Stream]
    evaluations: Callable[[int], Sequence[Evaluation]]
    parent: Mapping[str, Any] | None = None
    initial: Callable[[Layout | None], TrainState] | None = None
    step: Callable[[Step, Layout | None], Step] | None = None


def was_restarted_here(config: Settings, name: str, runtime: Runtime) -> Settings:
    """Return the settings, with resume on where torchrun has started anew a job that had opened the run `name`."""
    if runtime.restarts and not config.resume and was_restarted(f"opened {name}"):
        print(f"restart {runtime.restarts} by torchrun: going on from the last checkpoint")
        return dataclasses.replace(config, resume=True)
    return config


def child(
    config: Settings,
    name: str,
    runtime: Runtime,
    *,
    run: str | None,
    step: int | None,
    parents: Collection[str],
) -> tuple[Settings, InitCheckpoint, Mapping[str, Any] | None]:
    """Return a child's settings with its name filled in, the checkpoint to begin with, and the record of its parent.

    A child that is resumed begins with its own checkpoint; its parent may be gone by then.

    Args:
        name: of the stage. run, step: the parent; none: the run of one of the stages `parents` that was saved last.

    Raises:
        UserError: there is no such run or step, or none at all.
    """
    start: str | Path | None = run
    if config.name is None:
        start = start or init_from.newest(parents)
        config = dataclasses.replace(config, name=f"{Path(start).expanduser().absolute().name}_{name}")
    config = was_restarted_here(config, str(config.name), runtime)
    own = run_folder(str(config.name))
    if config.resume and init_from.has_checkpoint(own):
        origin = init_from.load(own)
        return config, origin, origin.parent
    origin = init_from.load(start or init_from.newest(parents), step)
    return config, origin, origin.record


def run_stage(
    config: StageConfig, it: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, *, try_rows: bool = False
) -> None:
    """Train from a resolved configuration, to the end or to the first signal.

    Args:
        config: its name and device_batch_size are set. it: the stage. shape, tok: of the model, its tokenizer.
        try_rows: whether the micro-batch is an estimate, to be tried before anything is written.

    Raises:
        UserError: a setting does not fit, the device's memory is too small, or the run's folder cannot be used.
        SystemExit: stopped by a signal, after saving.
    """
    try:
        _run_stage(config, it, shape, tok, runtime, try_rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device_batch_size={config.device_batch_size} runs out of memory ({str(error).split('. ')[0]}); "
            "set a lower one, or auto; --experiment=plan shows what fits"
        ) from None


def _run_stage(
    config: StageConfig, it: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, try_rows: bool
) -> None:
    folder = run_folder(str(config.name))
    # What may be refused comes before the run's folder is touched.
    layout = sharding.make_layout(config.sharding, runtime, model.spec(shape))
    step_fn, loss_fn, kernels = build.build_step_functions(config, shape, runtime, layout)
    if try_rows:
        rows = it.step_tokens // (shape.sequence_len * runtime.world_size)
        rows = build.try_batch_size(config, shape, rows, runtime, layout, step_fn, it.hparams_at(0, {}))
        config = dataclasses.replace(config, device_batch_size=rows)
    limit, limit_from = peak_flops(runtime.device, runtime.compute_dtype)
    print(f"{kernels}; MFU is of {limit / 1e12:.4g} TFLOP/s ({limit_from}); run folder: {folder}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(train.stop_on_signals())  # first in, last out: it guards the last save too
        manager = open_checkpoints(folder, config, runtime)
        stack.callback(checkpoint.close, manager)  # waits for the last save, after an error as well
        mark_restart(f"opened {config.name}")  # if torchrun has to restart the job, it goes on with this run
        state, at = init_or_restore(config, shape, manager, runtime, layout, it.initial)
        if it.num_steps is not None:
            at = at._replace(done=at.step >= it.num_steps)  # a finished run may have been given more steps
        stream = stack.enter_context(contextlib.closing(it.batches(at.loader, config.rows)))
        if at.step == 0 and runtime.is_main:
            tokenizer.save(tok, folder / "tokenizer")  # the run's own copy, should the original be trained anew
        log = logger.open_log(
            folder,
            resume_step=at.step if config.resume else None,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=config,
            enabled=runtime.is_main,
        )
        stack.callback(logger.close, log)
        job = Job(
            config, it.name, it.parent, shape, tok, runtime, layout, loss_fn, it.num_steps, it.step_tokens,
            it.flops_per_token, it.hparams_at, it.evaluations(config.rows), limit, folder, manager, log,
            stop, [],
        )  # fmt: skip
        show = stack.enter_context(progress.bar(it.num_steps, initial=at.step, label=str(config.name)))
        if not evals_done(job, at):
            run_evals(job, show, state, at)
        try:
            state, at = train.fit(
                state,
                at,
                stream,
                num_steps=it.num_steps,
                rows=None if it.step else config.rows,
                step_fn=it.step(step_fn, layout) if it.step else step_fn,
                hparams_at=it.hparams_at,
                after_step=functools.partial(log_step, job, show),
                save=functools.partial(save_checkpoint, job),
                stop=stop,
                # float16 overflows now and then; its loss scale shrinks until it does not.
                skip_nonfinite=config.train.skip_nonfinite or runtime.compute_dtype == torch.float16,
            )
        except NonFiniteLossError as error:
            raise with_advice(error, manager) from None
        stopped = stop.agreed() and not (at.done and evals_done(job, at))
    finalize(job, at)
    if stopped and stop.signal:
        saved = (
            f"step {at.step} is saved: the same command with --resume goes on" if at.step else "nothing was done yet"
        )
        print(f"stopped by {stop.signal.name}; {saved}")
        raise SystemExit(128 + stop.signal)  # as the shell counts it: what follows `&&` must not take it for done


def open_checkpoints(folder: Path, config: StageConfig, runtime: Runtime) -> checkpoint.Manager:
    """Open the checkpoints of a run: new, resumed, or with `overwrite` in the place of an old run.

    Raises:
        UserError: the folder holds a run, and the command says neither resume nor overwrite.
    """
    checkpoints = folder / "checkpoints"
    done = checkpoint.steps(checkpoints) if runtime.is_main else []
    last = distributed.all_reduce_max(done[-1] if done else -1)  # a network disk may show each rank something else
    if last >= 0 and not config.resume:
        if not config.overwrite:
            raise UserError(
                f"run {folder} has checkpoints up to step {last}: --resume goes on with it, --set name=<other> "
                "starts another, --set overwrite=true replaces it"
            )
        old = checkpoints.with_name("checkpoints.old")
        if runtime.is_main:
            shutil.rmtree(old, ignore_errors=True)
            checkpoints.rename(old)
        distributed.barrier()
        print(f"the run that was here keeps its checkpoints in {old}, until the next one is replaced")
    if config.resume and last < 0:
        print(f"nothing to resume in {checkpoints}: starting at step 0")
    return checkpoint.open_manager(checkpoints, config.checkpoint)


def init_or_restore(
    config: StageConfig,
    shape: ModelConfig,
    manager: checkpoint.Manager,
    runtime: Runtime,
    layout: Layout | None,
    initial: Callable[[Layout | None], TrainState] | None = None,
) -> tuple[TrainState, Progress]:
    """Return the state and progress to begin with: those of the last checkpoint, else `initial`'s or freshly drawn."""
    dtype, spec = runtime.compute_dtype, model.spec(shape)
    if checkpoint.latest_step(manager) is None:
        return initial(layout) if initial else build.init_state(config, shape, runtime, layout), Progress()
    nothing = model.init(shape, config.seed, device="meta", dtype=dtype, layout=layout)
    abstract = train.init(nothing, spec, dtype, layout)
    state, meta, arrays = checkpoint.restore(manager, abstract, device=runtime.device)
    now = json.loads(json.dumps(dict(configs.flatten(config))))
    for name, value in now.items():
        before = meta["config"].get(name, value)
        if before != value and name not in NOT_COMPARED:
            print(f"changed since the checkpoint: {name} = {value} (was {before})")
    kept = {name.removeprefix("loader_"): array for name, array in arrays.items()}
    loader = {"position": meta["loader"], **kept}
    print(f"resumed from step {int(state.step)} in {manager.folder}")
    if meta["config"]["dtype"] != now["dtype"]:
        state = state._replace(scaler=train.init_scaler(dtype, runtime.device))  # a scale is for one dtype
    return state, progress_from(meta)._replace(loader=loader)


def progress_from(meta: Mapping[str, Any]) -> Progress:
    """Return the progress that a checkpoint's metadata tells, also of one made before its tokens were counted."""
    known = {name: x for name, x in meta["progress"].items() if name in Progress._fields}
    if "timed_tokens" not in known:
        known |= {"tokens": meta["tokens"], "timed_seconds": 0.0}
    return Progress(**known)
