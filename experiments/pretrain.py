"""Pretrain a base model of a given depth; the scaling rules give all other numbers.

    torchrun launch.py --experiment=pretrain --set depth=16
    python launch.py --experiment=pretrain --set fit=auto               # the largest model that fits into this GPU
    torchrun launch.py --experiment=pretrain_d20 --set dry_run=true     # print the plan, allocate nothing
    torchrun launch.py --experiment=pretrain_d20 --resume               # continue a stopped run
    torchrun launch.py --experiment=pretrain_d20 --set init_from=d20@4000 --set name=d20_cooldown \
        --set num_iterations=4400 --set optim.warmdown_ratio=0.09       # branch off: another end from step 4000 on
    torchrun launch.py --experiment=pretrain --set init_from=d20 --set name=d20_more --set num_iterations=25000 \
        --set data.source=0.8*climbmix,0.2*/my/texts    # continue with other data, here a mixture by tokens

Needs data (--experiment=data) and a tokenizer (--experiment=tokenizer). Writes checkpoints, metrics.jsonl, the resolved
configuration and curves to runs/<name> under the base folder. Depth 20 on 8 H100 is the reference's run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

from experiments import _fit
from nanochat import checkpoint, data, distributed, eval, model, optim, train
from nanochat.config import PositiveFloat, PositiveInt, Settings, UserError, flatten, override
from nanochat.data import DataConfig, mixture, sources, tokenizer
from nanochat.eval import core_bundle
from nanochat.optim import OptimConfig, scaling
from nanochat.train import StageConfig

DEPTH = 20
INHERITED = ("depth", "model.", "total_batch_size", "device_batch_size")  # by a run that branches from another


@dataclasses.dataclass(frozen=True)
class ShapeConfig(Settings):
    """The parts of the model's shape that do not follow from its depth.

    Attributes:
        sequence_len: context length in tokens.
        aspect_ratio: model width divided by depth, before rounding up to whole heads.
        head_dim: width of an attention head.
        window_pattern: attention windows tiled over the layers: S a quarter of the context, L all of it.
        vocab_size: size of the vocabulary; none: the tokenizer's.
    """

    sequence_len: PositiveInt = 2048
    aspect_ratio: PositiveInt = 64
    head_dim: PositiveInt = 128
    window_pattern: str = "SSSL"
    vocab_size: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class CoreConfig(Settings):
    """Evaluation of CORE during the run; skipped with a message if there is no evaluation bundle.

    Attributes:
        every_steps: steps between evaluations, and once after the last step; none: never.
        max_per_task: examples of each task.
        bundle: folder of the evaluation bundle; none: the one that --experiment=data downloads.
    """

    every_steps: PositiveInt | None = 2000
    max_per_task: PositiveInt = 500
    bundle: str | None = None


@dataclasses.dataclass(frozen=True)
class Config(StageConfig):
    """A pretraining run.

    Attributes:
        depth: number of layers, from which everything else follows; none: 20, or by fit.
        fit: GPU memory to fill, such as 8gb, or auto: this device's. The planner chooses the largest depth that fits,
            the batch, train.memory_budget and train.embedding_moments, where these have their defaults.
        dry_run: print the plan and stop, without allocating anything.
        init_from: a run, or run@step, that this new run branches from: it continues with the weights, the optimizer
            state, the step count, the place in the data and the tokenizer of that checkpoint, and its own settings; by
            default with its shape and batch sizes. Other data, or another order of it, is read from its beginning.
        tokenizer: folder of the tokenizer; none: the default one.
        total_batch_size: tokens of an optimizer step; none: by the scaling rules.
        num_iterations: optimizer steps; none: by target_flops.
        target_flops: FLOPs of the whole run; none: by target_param_data_ratio.
        target_param_data_ratio: tokens per scaling parameter (matrices and unembedding).
    """

    depth: PositiveInt | None = None
    fit: _fit.Fit | None = None
    dry_run: bool = False
    init_from: str | None = None
    tokenizer: str | None = None
    data: DataConfig = DataConfig()
    total_batch_size: PositiveInt | None = None
    num_iterations: PositiveInt | None = None
    target_flops: PositiveFloat | None = None
    target_param_data_ratio: PositiveFloat = 12.0
    model: ShapeConfig = ShapeConfig()
    optim: OptimConfig = OptimConfig()
    core: CoreConfig = CoreConfig()


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Resolve the configuration, print the plan, and pretrain."""
    by_fit = config.fit and not config.depth
    config = dataclasses.replace(
        config, name=config.name or (f"fit_{config.fit}" if by_fit else f"d{config.depth or DEPTH}")
    )
    config = train.resume_after_restart(config, str(config.name), runtime)
    if config.fit:
        _fit.capacity_bytes(config, runtime)  # refuses a device without such a limit
    if not config.dry_run:
        sources.shards_of(config.data, "train")  # report missing data first
    config, start = load_start(config)
    tok = load_tokenizer(config, start, required=not config.dry_run)
    config = fitted(config, tok, runtime, start)
    shape, plan = resolve(config, tok)
    if start and branches_at(config, start) and start.step >= plan.num_steps:
        raise UserError(
            f"num_iterations={plan.num_steps}: set more, as the branch counts on from step {start.step} of its base"
        )
    config = dataclasses.replace(
        config,
        total_batch_size=plan.total_batch_size,
        num_iterations=plan.num_steps,
        model=dataclasses.replace(config.model, vocab_size=shape.vocab_size),
    )
    auto = config.device_batch_size == "auto"
    if auto:
        rows = plan.total_batch_size // (shape.sequence_len * runtime.world_size)
        config = dataclasses.replace(config, device_batch_size=train.estimate_batch_size(config, shape, rows, runtime))
    print(describe(config, shape, plan, runtime), flush=True)
    if tok and not config.dry_run:
        train.run_stage(
            config, base_stage(config, shape, plan, tok, runtime, start), shape, tok, runtime, try_rows=auto
        )


def fitted(
    config: Config, tok: data.Tokenizer | None, runtime: distributed.Runtime, start: train.InitCheckpoint | None = None
) -> Config:
    """Return the settings with the depth, and with `fit` with what the planner chooses, which is printed."""
    if not config.fit:
        return dataclasses.replace(config, depth=config.depth or DEPTH)
    if start and start.resumed:
        config = dataclasses.replace(config, depth=config.depth or start.shape.n_layer)

    def at_depth(depth: int) -> tuple[model.ModelConfig, optim.Plan]:
        return resolve(dataclasses.replace(config, depth=depth), tok)

    capacity = _fit.capacity_bytes(config, runtime)
    chosen = _fit.largest(config, train.planner_setup(config, runtime), capacity, at_depth)
    print(_fit.describe(chosen, str(config.fit), _fit.device_name(runtime.device), at_depth), flush=True)
    return override(config, [f"{name}={value}" for name, value in chosen.settings().items()])


def tokenizer_folder(config: Config) -> Path:
    return Path(config.tokenizer) if config.tokenizer else tokenizer.default_dir()


def load_start(config: Config) -> tuple[Config, train.InitCheckpoint | None]:
    """Return the settings, and the checkpoint to resume or to branch from; None: the run starts at step 0."""
    if start := train.load_own(config):
        config = dataclasses.replace(config, init_from=config.init_from or start.settings.get("init_from"))
        return (inherit(config, start) if config.init_from else config), start
    if config.init_from is None:
        return config, None
    start = train.init_from.load(config.init_from)
    if start.folder == train.run_folder(str(config.name)):
        raise UserError(f"init_from={config.init_from}: is run {config.name} itself; set another name, or resume_step")
    if not start.moments or (start.origin or {})["stage"] != "base":
        raise UserError(f"init_from={config.init_from}: not a pretraining run with its optimizer state")
    run, _ = checkpoint.split_step(config.init_from)
    return inherit(dataclasses.replace(config, init_from=f"{run}@{start.step}"), start), start


def inherit(config: Config, start: train.InitCheckpoint) -> Config:
    """Return the settings with shape and batch sizes of the run to branch from, where they have their defaults."""
    default, now = dict(flatten(Config())), dict(flatten(config))
    saved = {n: x for n, x in start.settings.items() if n.startswith(INHERITED) and n in now}
    changes = [f"{n}={x}" for n, x in saved.items() if now[n] == default[n] != x]
    if changes:
        print(f"as in {start.folder.name}: {', '.join(changes)}")
    return override(config, changes)


def branches_at(config: Config, start: train.InitCheckpoint) -> bool:
    """Return whether the run starts where it branches from another, rather than at a later step of its own."""
    return str(config.init_from).endswith(f"@{start.step}")


def load_tokenizer(
    config: Config, start: train.InitCheckpoint | None, *, required: bool = True
) -> data.Tokenizer | None:
    """Return the tokenizer: of a checkpoint to start from its own; None if there is none and it is not required."""
    folder = tokenizer_folder(config)
    if start is None:
        return tokenizer.load(folder) if required or folder.exists() else None
    if folder.exists() and tokenizer.load(folder).fingerprint != start.tokenizer.fingerprint:
        print(f"using the run's own tokenizer, of {start.folder}; {folder} holds another one now")
    return start.tokenizer


def base_stage(
    config: Config,
    shape: model.ModelConfig,
    plan: optim.Plan,
    tok: data.Tokenizer,
    runtime: distributed.Runtime,
    start: train.InitCheckpoint | None,
) -> train.Stage:
    """Return the stage: packed documents, the plan's hyperparameters, bits per byte, CORE and samples."""
    stream = functools.partial(
        data.loader.batches,
        tok=tok,
        sequence_len=shape.sequence_len,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )

    def bits_per_byte(source: DataConfig, key: str, share: float = 1.0) -> train.Evaluation:
        def batches(rows: int) -> Generator[data.loader.Batch, None, None]:
            return stream(source, split="val", rows_per_step=rows * runtime.world_size)

        eval.bpb.check(batches(1), tok)
        run = functools.partial(train.stage.evaluate_bpb, batches=batches, key=key, share=share)
        return train.Evaluation(key, config.eval.every_steps, run)

    parts, evaluations = sources.parts_of(config.data), [bits_per_byte(config.data, "val/bpb")]
    for share, part in parts if len(parts) > 1 else []:
        evaluations.append(bits_per_byte(part, f"val/bpb/{mixture.label(part.source)}", share))
    if bundle := find_bundle(config.core):
        score = functools.partial(core_score, bundle, config.core.max_per_task)
        evaluations.append(train.Evaluation("core/CORE", config.core.every_steps, score))
    samples = functools.partial(
        train.stage.print_samples, encode=lambda prompt: [tok.bos, *tok.encode(prompt)], decode=tok.decode
    )
    evaluations.append(train.Evaluation(None, config.eval.sample_every_steps, samples))
    rows_per_step = plan.total_batch_size // shape.sequence_len

    def train_batches(state: Any, _: int) -> Generator[data.loader.Batch, None, None]:
        try:
            return stream(config.data, split="train", rows_per_step=rows_per_step, state=state)
        except data.loader.OtherDataError:
            if not start or not branches_at(config, start):
                raise
            print(f"the data, or its order, is not that of {start.folder.name}: it is read from its beginning")
            return stream(config.data, split="train", rows_per_step=rows_per_step)

    return train.Stage(
        name="base",
        num_steps=plan.num_steps,
        step_tokens=plan.total_batch_size,
        flops_per_token=plan.flops_per_token,
        make_step=functools.partial(train.scheduled, schedule=lambda step, _: optim.hparams(config.optim, plan, step)),
        batches=train_batches,
        evaluations=evaluations,
        branch=(start.folder, start.step) if start else None,
    )


def find_bundle(config: CoreConfig) -> eval.Bundle | None:
    """Return the evaluation bundle; None if CORE is switched off or no bundle is downloaded."""
    folder = core_bundle.default_dir()
    if config.every_steps is None:
        return None
    if config.bundle is None and not folder.exists():
        print(f"CORE is skipped: no evaluation bundle in {folder}; --experiment=data downloads it")
        return None
    return core_bundle.read(Path(config.bundle or folder))


def core_score(bundle: eval.Bundle, max_per_task: int, ctx: train.RunContext, state: train.TrainState) -> train.Result:
    """Return CORE and the centered accuracy of each task."""
    params = distributed.sharding.full_params(state.params)
    compute = model.Compute(dtype=ctx.runtime.compute_dtype)
    results = eval.core.evaluate(params, ctx.shape, ctx.tok, bundle, max_per_task=max_per_task, compute=compute)
    scores = {f"core/{label}": task.centered for label, task in results.tasks.items()}
    lines = [f"step {int(state.step)}: {label}: {reason}" for label, reason in results.failed.items()]
    if results.core is not None:
        lines.append(f"step {int(state.step)}: CORE {results.core:.4f}")
    scores["core/CORE"] = math.nan if results.core is None else results.core
    return train.Result(scores, lines)


def resolve(config: Config, tok: data.Tokenizer | None) -> tuple[model.ModelConfig, optim.Plan]:
    """Return the model's shape and the plan of the scaling rules."""
    vocab_size = config.model.vocab_size or (tok.vocab_size if tok else 32768)
    if tok and tok.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tok.vocab_size} tokens; set model.vocab_size=none"
        )
    fields = {**dataclasses.asdict(config.model), "vocab_size": vocab_size}
    try:
        shape, reference = (
            model.from_depth(depth, **fields) for depth in (config.depth or DEPTH, scaling.REFERENCE_DEPTH)
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = scaling.plan(
        model.count(shape)["scaling"],
        model.count(reference)["scaling"],
        model.flops_per_token(shape),
        n_embd=shape.n_embd,
        target_param_data_ratio=config.target_param_data_ratio,
        target_flops=config.target_flops,
        num_iterations=config.num_iterations,
        total_batch_size=config.total_batch_size,
        weight_decay=config.optim.weight_decay,
    )
    return shape, plan


def describe(config: Config, shape: model.ModelConfig, plan: optim.Plan, runtime: distributed.Runtime) -> str:
    """Return the resolved configuration and what follows from it, as text."""
    rows = config.rows
    micro_batches = scaling.accumulation_steps(plan.total_batch_size, rows, shape.sequence_len, runtime.world_size)
    counts = model.count(shape)
    groups = optim.param_group_settings(
        config.optim, shape.n_embd, batch_scale=plan.batch_scale, weight_decay=plan.weight_decay
    )
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
        "sharding": distributed.sharding.describe(config.sharding, runtime),
        "device": f"{runtime.device}, {str(runtime.compute_dtype).removeprefix('torch.')}",
    }
    if len(parts := sources.parts_of(config.data)) > 1:
        facts["data"] = ", ".join(f"{share:.1%} of the tokens from {part.source}" for share, part in parts)
    return train.describe(config, facts)
