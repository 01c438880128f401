"""A training stage from its settings to its last checkpoint: one path that all stages take, each with its own parts.

A stage brings what `Stage` holds: batches, a state to begin with, rates, evaluations. Here it gets a folder, goes on
from its last checkpoint where it is asked to, and is stopped by a signal without losing anything.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, events, metrics, model, parent, progress, sharding, stage, tokenizer, train
from nanochat.config import UserError
from nanochat.events import Evaluation, Job
from nanochat.model import ModelConfig
from nanochat.optim import Hparams
from nanochat.parent import Parent
from nanochat.runtime import Runtime, note, peak_flops, recall
from nanochat.sharding import Layout
from nanochat.stage import StageConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteLossError, TrainState

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


def restarted(config: stage.Settings, name: str, runtime: Runtime) -> stage.Settings:
    """Return the settings, with resume on where torchrun has started anew a job that had opened the run `name`."""
    if runtime.restarts and not config.resume and recall(f"opened {name}"):
        print(f"restart {runtime.restarts} by torchrun: going on from the last checkpoint")
        return dataclasses.replace(config, resume=True)
    return config


def child(
    config: stage.Settings,
    name: str,
    runtime: Runtime,
    *,
    run: str | None,
    step: int | None,
    parents: Collection[str],
) -> tuple[stage.Settings, Parent, Mapping[str, Any] | None]:
    """Return a child's settings with its name filled in, the checkpoint to begin with, and the record of its parent.

    A child that is resumed begins with its own checkpoint; its parent may be gone by then.

    Args:
        name: of the stage. run, step: the parent; none: the run of one of the stages `parents` that was saved last.

    Raises:
        UserError: there is no such run or step, or none at all.
    """
    start: str | Path | None = run
    if config.name is None:
        start = start or parent.newest(parents)
        config = dataclasses.replace(config, name=f"{Path(start).expanduser().absolute().name}_{name}")
    config = restarted(config, str(config.name), runtime)
    own = stage.run_folder(str(config.name))
    if config.resume and parent.has_checkpoint(own):
        origin = parent.load(own)
        return config, origin, origin.parent
    origin = parent.load(start or parent.newest(parents), step)
    return config, origin, origin.record


def run(
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
        _run(config, it, shape, tok, runtime, try_rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device_batch_size={config.device_batch_size} runs out of memory ({str(error).split('. ')[0]}); "
            "set a lower one, or auto; --experiment=plan shows what fits"
        ) from None


def _run(config: StageConfig, it: Stage, shape: ModelConfig, tok: Tokenizer, runtime: Runtime, try_rows: bool) -> None:
    folder = stage.run_folder(str(config.name))
    # What may be refused comes before the run's folder is touched.
    layout = sharding.layout(config.sharding, runtime, model.spec(shape))
    step_fn, loss_fn, kernels = stage.functions(config, shape, runtime, layout)
    if try_rows:
        rows = it.step_tokens // (shape.sequence_len * runtime.world_size)
        rows = stage.tried_rows(config, shape, rows, runtime, layout, step_fn, it.hparams_at(0, {}))
        config = dataclasses.replace(config, device_batch_size=rows)
    limit, limit_from = peak_flops(runtime.device, runtime.compute_dtype)
    print(f"{kernels}; MFU is of {limit / 1e12:.4g} TFLOP/s ({limit_from}); run folder: {folder}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(train.stop_on_signals())  # first in, last out: it guards the last save too
        manager = stage.open_checkpoints(folder, config, runtime)
        stack.callback(checkpoint.close, manager)  # waits for the last save, after an error as well
        note(f"opened {config.name}")  # if torchrun has to restart the job, it goes on with this run
        state, at = stage.start(config, shape, manager, runtime, layout, it.initial)
        if it.num_steps is not None:
            at = at._replace(done=at.step >= it.num_steps)  # a finished run may have been given more steps
        stream = stack.enter_context(contextlib.closing(it.batches(at.loader, config.rows)))
        if at.step == 0 and runtime.is_main:
            tokenizer.save(tok, folder / "tokenizer")  # the run's own copy, should the original be trained anew
        log = metrics.open(
            folder,
            resume_step=at.step if config.resume else None,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=config,
            enabled=runtime.is_main,
        )
        stack.callback(metrics.close, log)
        job = Job(
            config, it.name, it.parent, shape, tok, runtime, layout, loss_fn, it.num_steps, it.step_tokens,
            it.flops_per_token, it.hparams_at, it.evaluations(config.rows), limit, folder, manager, log,
            stop, [],
        )  # fmt: skip
        show = stack.enter_context(progress.bar(it.num_steps, initial=at.step, label=str(config.name)))
        if not events.examined(job, at):
            events.examine(job, show, state, at)
        try:
            state, at = train.fit(
                state,
                at,
                stream,
                num_steps=it.num_steps,
                rows=None if it.step else config.rows,
                step_fn=it.step(step_fn, layout) if it.step else step_fn,
                hparams_at=it.hparams_at,
                after_step=functools.partial(events.after_step, job, show),
                save=functools.partial(events.save, job),
                stop=stop,
                # float16 overflows now and then; its loss scale shrinks until it does not.
                skip_nonfinite=config.train.skip_nonfinite or runtime.compute_dtype == torch.float16,
            )
        except NonFiniteLossError as error:
            raise events.with_advice(error, manager) from None
        stopped = stop.agreed() and not (at.done and events.examined(job, at))
    events.finish(job, at)
    if stopped and stop.signal:
        saved = (
            f"step {at.step} is saved: the same command with --resume goes on" if at.step else "nothing was done yet"
        )
        print(f"stopped by {stop.signal.name}; {saved}")
        raise SystemExit(128 + stop.signal)  # as the shell counts it: what follows `&&` must not take it for done
