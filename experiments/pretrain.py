"""Pretrain a base model of a given depth; every other number follows from the scaling rules.

    torchrun launch.py --experiment=pretrain --set depth=16
    torchrun launch.py --experiment=pretrain_d20 --set dry_run=true     # print the plan, allocate nothing
    torchrun launch.py --experiment=pretrain_d20 --resume               # go on after a stop

Needs data (--experiment=data) and a tokenizer (--experiment=tokenizer). Writes checkpoints, metrics.jsonl, the resolved
configuration and curves to runs/<name> under the base folder. Depth 20 on 8 H100 is the reference's run.
"""

import contextlib
import dataclasses
import functools

import torch

from nanochat import (
    checkpoint,
    dataloader,
    dataset,
    events,
    metrics,
    model,
    optim,
    progress,
    scaling,
    schedule,
    sharding,
    stage,
    tokenizer,
    train,
)
from nanochat import config as configs
from nanochat.config import UserError
from nanochat.events import Job
from nanochat.model import ModelConfig
from nanochat.optim import OptimConfig
from nanochat.runtime import Runtime, note, peak_flops, recall
from nanochat.scaling import Plan
from nanochat.stage import StageConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteLossError


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """What of the model's shape does not follow from depth.

    Attributes:
        sequence_len: tokens of context. aspect_ratio: width per layer. head_dim: width of a head.
        window_pattern: S and L, tiled over the layers. vocab_size: none takes the tokenizer's.
    """

    sequence_len: int = 2048
    aspect_ratio: int = 64
    head_dim: int = 128
    window_pattern: str = "SSSL"
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Config(StageConfig):
    """A pretraining run; what is none is filled by the scaling rules, or stays off.

    Attributes:
        depth: the dial. dry_run: print the plan and stop, without allocating anything.
        total_batch_size: tokens of a step.
        num_iterations, target_flops, target_param_data_ratio: length of the run; the first that is given counts.
    """

    depth: int = 20
    dry_run: bool = False
    total_batch_size: int | None = None
    num_iterations: int | None = None
    target_flops: float | None = None
    target_param_data_ratio: float = 12.0
    model: ShapeConfig = ShapeConfig()
    optim: OptimConfig = OptimConfig()


def config() -> Config:
    """Return the reference's settings at depth 20."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Resolve the configuration, print the plan, and pretrain."""
    name = config.name or f"d{config.depth}"
    if runtime.restarts and not config.resume and recall(f"opened {name}"):
        print(f"restart {runtime.restarts} by torchrun: going on from the last checkpoint")
        config = dataclasses.replace(config, resume=True)
    if not config.dry_run:
        dataset.resolve(config.data, "train")  # missing data is said before anything else
    tok = stage.load_tokenizer(config, name, required=not config.dry_run)
    shape, plan = resolve(config, tok)
    config = dataclasses.replace(
        config,
        name=name,
        total_batch_size=plan.total_batch_size,
        num_iterations=plan.num_steps,
        model=dataclasses.replace(config.model, vocab_size=shape.vocab_size),
    )
    auto = config.device_batch_size == "auto"
    if auto:
        rows = plan.total_batch_size // (shape.sequence_len * runtime.world_size)
        config = dataclasses.replace(config, device_batch_size=stage.estimated_rows(config, shape, rows, runtime))
    print(describe(config, shape, plan, runtime), flush=True)
    if tok and not config.dry_run:
        try:
            pretrain(config, shape, plan, tok, runtime, try_rows=auto)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"device_batch_size={config.device_batch_size} runs out of memory ({str(error).split('. ')[0]}); "
                "set a lower one, or auto; --experiment=plan shows what fits"
            ) from None


def pretrain(
    config: Config, shape: ModelConfig, plan: Plan, tok: Tokenizer, runtime: Runtime, *, try_rows: bool = False
) -> None:
    """Train from a resolved configuration, to the end or to the first signal.

    Args:
        try_rows: whether the micro-batch is an estimate, to be tried before anything is written.
    """
    folder = stage.run_folder(str(config.name))
    # What may be refused comes before the run's folder is touched.
    layout = sharding.layout(config.sharding, runtime, model.spec(shape))
    step_fn, loss_fn, kernels = stage.functions(config, shape, runtime, layout)
    schedules = functools.partial(hparams_at, config.optim, shape, plan)
    if try_rows:
        rows = plan.total_batch_size // (shape.sequence_len * runtime.world_size)
        rows = stage.tried_rows(config, shape, rows, runtime, layout, step_fn, schedules(0))
        config = dataclasses.replace(config, device_batch_size=rows)
    limit, limit_from = peak_flops(runtime.device, runtime.compute_dtype)
    print(f"{kernels}; MFU is of {limit / 1e12:.4g} TFLOP/s ({limit_from}); run folder: {folder}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(train.stop_on_signals())  # first in, last out: it guards the last save too
        manager = stage.open_checkpoints(folder, config, runtime)
        stack.callback(checkpoint.close, manager)  # waits for the last save, after an error as well
        note(f"opened {config.name}")  # if torchrun has to restart the job, it goes on with this run
        state, at = stage.start(config, shape, manager, runtime, layout)
        stream = dataloader.batches(
            config.data,
            tok,
            split="train",
            rows_per_step=plan.total_batch_size // shape.sequence_len,
            sequence_len=shape.sequence_len,
            seed=config.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            state=at.loader,
            device=runtime.device,
        )
        stack.enter_context(contextlib.closing(stream))
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
            config, shape, tok, runtime, layout, plan.num_steps, plan.total_batch_size, plan.flops_per_token, schedules,
            config.optim.matrix_lr * plan.batch_scale, limit, folder, manager, log, stop, [],
        )  # fmt: skip
        show = stack.enter_context(progress.bar(plan.num_steps, initial=at.step, label=str(config.name)))
        if not events.examined(job, at.step):
            events.examine(job, loss_fn, show, state, at.step)
        try:
            state, at = train.fit(
                state,
                at,
                stream,
                num_steps=plan.num_steps,
                rows=config.rows,
                step_fn=step_fn,
                hparams_at=schedules,
                after_step=functools.partial(events.after_step, job, loss_fn, show),
                save=functools.partial(events.save, job),
                stop=stop,
                # float16 overflows now and then; its loss scale shrinks until it does not.
                skip_nonfinite=config.train.skip_nonfinite or runtime.compute_dtype == torch.float16,
            )
        except NonFiniteLossError as error:
            raise events.with_advice(error, manager) from None
        stopped = stop.agreed() and not (at.step == plan.num_steps and events.examined(job, at.step))
    events.finish(job, at)
    if stopped and stop.signal:
        saved = (
            f"step {at.step} is saved: the same command with --resume goes on" if at.step else "nothing was done yet"
        )
        print(f"stopped by {stop.signal.name}; {saved}")
        raise SystemExit(128 + stop.signal)  # as the shell counts it: what follows `&&` must not take it for done


def resolve(config: Config, tok: Tokenizer | None) -> tuple[ModelConfig, Plan]:
    """Return the model's shape and the plan that the scaling rules give for `config`.

    Raises:
        UserError: the vocabulary of the tokenizer is larger than the model's, or the shape is impossible.
    """
    vocab_size = config.model.vocab_size or (tok.vocab_size if tok else 32768)
    if tok and tok.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tok.vocab_size} tokens; set model.vocab_size=none"
        )
    from_depth = functools.partial(
        model.from_depth,
        vocab_size=vocab_size,
        sequence_len=config.model.sequence_len,
        aspect_ratio=config.model.aspect_ratio,
        head_dim=config.model.head_dim,
        window_pattern=config.model.window_pattern,
    )
    try:
        shape, reference = from_depth(config.depth), from_depth(scaling.REFERENCE_DEPTH)
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = scaling.plan(
        model.count(shape)["scaling"],
        model.count(reference)["scaling"],
        model.flops_per_token(shape),
        target_param_data_ratio=config.target_param_data_ratio,
        target_flops=config.target_flops,
        num_iterations=config.num_iterations,
        total_batch_size=config.total_batch_size,
        weight_decay=config.optim.weight_decay,
    )
    return shape, plan


def describe(config: Config, shape: ModelConfig, plan: Plan, runtime: Runtime) -> str:
    """Return the resolved configuration and what follows from it, as text."""
    rows = config.rows
    micro_batches = scaling.accumulation_steps(plan.total_batch_size, rows, shape.sequence_len, runtime.world_size)
    counts = model.count(shape)
    groups = optim.rates(config.optim, shape.n_embd, batch_scale=plan.batch_scale, weight_decay=plan.weight_decay)
    facts = {
        "width": f"{shape.n_embd} = {shape.n_head} heads of {shape.head_dim}; {shape.n_layer} layers",
        "parameters": f"{counts['total']:,} ({counts['scaling']:,} scaling)",
        "step": f"{plan.total_batch_size:,} tokens = {micro_batches} x {rows} rows x {shape.sequence_len} tokens x "
        f"{runtime.world_size} ranks",
        "steps": f"{plan.num_steps:,}",
        "tokens": f"{plan.total_tokens:,} ({plan.total_tokens / counts['scaling']:.2f} per scaling parameter)",
        "FLOPs": f"{plan.total_flops:.4g} ({plan.flops_per_token:,} per token)",
        "learning rates": ", ".join(f"{name} {h['lr']:.4g}" for name, h in groups.items()),
        "weight decay": f"{plan.weight_decay:.4g} (matrices)",
        "sharding": sharding.describe(config.sharding, runtime),
        "device": f"{runtime.device}, {str(runtime.compute_dtype).removeprefix('torch.')}",
    }
    lines = [f"  {name:<16}{text}" for name, text in facts.items()]
    return "\n".join(["configuration", configs.describe(config), "plan", *lines])


def hparams_at(config: OptimConfig, shape: ModelConfig, plan: Plan, step: int) -> optim.Hparams:
    """Return the hyperparameters of one step: the groups' rates under their schedules."""
    rates = optim.rates(config, shape.n_embd, batch_scale=plan.batch_scale, weight_decay=plan.weight_decay)
    factor = schedule.learning_rate(
        step,
        plan.num_steps,
        warmup_steps=config.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final=config.final_lr_fraction,
    )
    for group in rates.values():
        group["lr"] *= factor
    matrix = rates[optim.MATRIX]
    matrix["momentum"] = schedule.muon_momentum(step, plan.num_steps, warmdown_ratio=config.warmdown_ratio)
    matrix["weight_decay"] *= schedule.weight_decay(step, plan.num_steps)
    return optim.as_hparams(rates)
