"""What a run starts from: its own checkpoint, or that of a base run with what the stage inherits from it."""

import dataclasses
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat import checkpoint, distributed, model, optim, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import Runtime, ShardingPlan, sharding, was_restarted
from nanochat.model import ModelConfig
from nanochat.train import build
from nanochat.train import step as train
from nanochat.train.config import StageConfig, run_folder
from nanochat.train.step import TrainState

Config = TypeVar("Config", bound=StageConfig)


@dataclasses.dataclass(frozen=True)
class InitCheckpoint:
    """A checkpoint to start from."""

    folder: Path  # of its run
    step: int
    shape: ModelConfig
    tokenizer: Tokenizer
    settings: Mapping[str, Any]  # of its run, by dotted name; {} for a converted model
    moments: bool  # whether it has the optimizer's state of all parameters
    origin: Mapping[str, Any] | None  # run, step and stage that the run starting from it records as its base
    lora: Mapping[str, Any] | None = None  # of adapters, see `build.Lora.meta`
    resumed: bool = False  # whether it is the run's own

    def setting(self, value: Any, name: str, default: Any) -> Any:
        """Return `value`, or if it is None the setting `name` of its run, or if that has none `default`."""
        value = value if value is not None else self.settings.get(name)
        return default if value is None else value


def load(run: str | Path | None, step: int | None = None, *, resume: bool = False) -> InitCheckpoint:
    """Describe a checkpoint, by default the newest one of the run that was saved last.

    Args:
        resume: whether the run itself resumes from it: then its origin is the one that it recorded.
    """
    info = checkpoint.inspect(run, step)
    lora = info.meta.get("lora")
    return InitCheckpoint(
        info.folder,
        info.step,
        checkpoint.infer_config(info),
        checkpoint.load_tokenizer(info),
        info.meta.get("config", {}),
        not lora and any(name.startswith("opt_state.") for name in info.state),
        info.meta.get("parent") if resume else {"run": info.folder.name, "step": info.step, "stage": info.stage},
        lora,
        resume,
    )


def newest(stages: Collection[str]) -> Path:
    """Return the folder of the last saved run of one of these stages."""
    for folder in checkpoint.list_runs():
        if checkpoint.inspect(folder).stage in stages:
            return folder
    raise UserError(
        f"no {' or '.join(stages)} model in {checkpoint.runs_folder()} to start from: "
        f"train one with `{checkpoint.TRAIN_COMMAND}`, or name one with --set run=…"
    )


def load_base(
    config: Config, stage: str, runtime: Runtime, *, run: str | None, step: int | None, stages: Collection[str]
) -> tuple[Config, InitCheckpoint]:
    """Return the settings with the run's name, and the checkpoint to start from.

    A resumed run starts from its own checkpoint; its base run may be gone by then.

    Args:
        run, step: the base run; None: the newest run of one of `stages`.
    """
    start, step = checkpoint.split_step(run, step)
    if config.name is None:
        start = start or newest(stages)
        config = dataclasses.replace(config, name=f"{Path(start).expanduser().absolute().name}_{stage}")
    config = resume_after_restart(config, str(config.name), runtime)
    if own := load_own(config):
        for setting in ("rank", "alpha", "targets") if own.lora or config.lora.rank else ():
            now, before = getattr(config.lora, setting), own.settings.get(f"lora.{setting}", 0)
            before = tuple(before) if isinstance(before, list) else before
            if before != now:
                old = ",".join(before) if isinstance(before, tuple) else before
                raise UserError(f"run {config.name} was started with lora.{setting}={old}: resume it with the same")
        return config, own
    return config, load(start or newest(stages), step)


def load_lora(config: StageConfig, base: InitCheckpoint, runtime: Runtime) -> build.Lora | None:
    """Return what to train adapters of, if the settings ask for them: the base, or that of the adapters resumed."""
    if not config.lora.rank:
        return None
    settings = {"rank": config.lora.rank, "alpha": config.lora.alpha, "targets": list(config.lora.targets)}
    if base.resumed and base.lora:
        reference = dict(base.lora["base"])
        folder = checkpoint.find_base(base.folder, reference)
        reference["run"] = str(folder)
    else:
        folder, reference = base.folder, checkpoint.base_reference(base.folder, base.step)
    spec = model.lora.spec(base.shape, config.lora.rank, config.lora.targets)
    return build.Lora(load_frozen(folder, reference["step"], runtime), spec, {**settings, "base": reference})


def describe_lora(lora: build.Lora | None, runtime: Runtime) -> dict[str, str]:
    """Return what to print on adapters before a run, by title."""
    if lora is None:
        return {}
    count, copies = sum(row.numel for row in lora.spec.values()), " on every rank" * (runtime.world_size > 1)
    seconds = (optim.second_shape(row.shape) if row.group == optim.MATRIX else row.shape for row in lora.spec.values())
    moments = count + sum(map(math.prod, seconds))
    sizes = f"{4 * count / 1e6:.2f} MB, optimizer {4 * moments / 1e6:.2f} MB"
    base = f"frozen, {tree.nbytes(lora.base) / 1e6:.1f} MB{copies}"
    return {"adapters": f"{count:,} parameters on {len(lora.spec) // 2} matrices: {sizes}", "base": base}


def load_frozen(folder: Path, step: int, runtime: Runtime) -> model.Params:
    """Return all parameters of a run to compute with on this rank: matrices and embeddings in the compute dtype."""
    params, _, _ = checkpoint.load_params(folder / "checkpoints", step=step, device=runtime.device)
    return tree.map(lambda x: x.to(runtime.compute_dtype) if x.dim() >= 2 else x, params)


def load_own(config: StageConfig) -> InitCheckpoint | None:
    """Return the checkpoint that a run resumes from; None if it does not, or has none yet."""
    own = run_folder(str(config.name))
    # A network disk may differ between ranks: all of them resume, or none.
    if config.resume_step is None and not (
        config.resume and distributed.all_reduce_max(bool(checkpoint.steps(own / "checkpoints")))
    ):
        return None
    return load(own, config.resume_step, resume=True)


def resume_after_restart(config: Config, name: str, runtime: Runtime) -> Config:
    """Return the settings, with `resume` set if a step is set to resume from, or torchrun restarts the job.

    Then it resumes from the last checkpoint, if the job had opened the run `name`.
    """
    if runtime.restarts and was_restarted(f"opened {name}"):
        print(f"restart {runtime.restarts} by torchrun: resuming from the last checkpoint")
        return dataclasses.replace(config, resume=True, resume_step=None)
    return dataclasses.replace(config, resume=config.resume or config.resume_step is not None)


def open_checkpoints(folder: Path, config: StageConfig, runtime: Runtime) -> checkpoint.Manager:
    """Open the checkpoints of a new run, a resumed one, or with `overwrite` one that replaces an old run."""
    checkpoints, old = folder / "checkpoints", folder / "checkpoints.old"
    saved = checkpoint.steps(checkpoints) if runtime.is_main else []
    last = distributed.all_reduce_max(saved[-1] if saved else -1)  # a network disk may differ between ranks
    if last >= 0 and not config.resume:
        if not config.overwrite:
            raise UserError(
                f"run {folder} has checkpoints up to step {last}: --resume continues it, --set name=<other> "
                "starts another, --set overwrite=true replaces it"
            )
        if runtime.is_main:
            shutil.rmtree(old, ignore_errors=True)
            checkpoints.rename(old)
        print(f"the checkpoints of the replaced run are kept in {old}, until the next replacement")
    later = [step for step in saved if config.resume_step is not None and step > config.resume_step]
    for step in later:
        old.mkdir(exist_ok=True)
        shutil.rmtree(old / str(step), ignore_errors=True)
        (checkpoints / str(step)).rename(old / str(step))
    if later:
        print(f"the checkpoints after step {config.resume_step} ({', '.join(map(str, later))}) are kept in {old}")
    distributed.barrier()
    if config.resume and last < 0:
        print(f"nothing to resume in {checkpoints}: starting at step 0")
    return checkpoint.open_manager(checkpoints, config.checkpoint)


def init_state_from(
    base: InitCheckpoint, runtime: Runtime, sharding_plan: ShardingPlan | None, *, moments: bool = True
) -> TrainState:
    """Return the state before the first step: the base run's parameters and, with `moments`, its optimizer state.

    The optimizer keeps its own step count; the run's starts at 0. Parameters are cast to this run's storage dtypes.
    """
    checkpoints, spec, dtype = base.folder / "checkpoints", model.spec(base.shape), runtime.compute_dtype
    if moments and base.moments:
        saved = checkpoint.inspect(base.folder, base.step).state
        stored = getattr(torch, saved["params.wte"]["dtype"])
        params = model.init(base.shape, 0, device="meta", dtype=stored, sharding_plan=sharding_plan)
        abstract = build.like_saved(train.init(params, spec, stored, sharding_plan), saved)._replace(ema=train.NO_EMA)
        state, _, _ = checkpoint.restore(checkpoints, abstract, base.step, device=runtime.device)
        flat = {n: x.to(model.storage_dtype(spec[n], dtype)) for n, x in tree.flatten(state.params).items()}
        scaler = train.init_scaler(dtype, runtime.device)
        return TrainState(torch.zeros_like(state.step), tree.unflatten(flat, state.params), state.opt_state, scaler)
    params, _, _ = checkpoint.load_params(checkpoints, step=base.step, device=runtime.device)
    distributed.barrier()
    flat = {
        n: sharding.place(sharding_plan, n, x.to(model.storage_dtype(spec[n], dtype)))
        for n, x in tree.flatten(params).items()
    }
    return train.init(tree.unflatten(flat, params), spec, dtype, sharding_plan)
