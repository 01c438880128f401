"""What a stage takes from its base run: parameters, model config, tokenizer, optimizer moments and settings."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, distributed, model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import Runtime, ShardingPlan, sharding
from nanochat.model import ModelConfig
from nanochat.train import step as train
from nanochat.train.step import TrainState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class InitCheckpoint:
    """A checkpoint to start from.

    Attributes:
        folder: of its run. stage: base, mid, sft or rl.
        shape, tokenizer: of its model. settings: of its run, by dotted name; {} for a converted model.
        moments: whether it has the optimizer's state. origin: run, step and stage of its own base run, or None.
    """

    folder: Path
    step: int
    stage: str
    shape: ModelConfig
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    moments: bool
    origin: Mapping[str, Any] | None

    @property
    def record(self) -> dict[str, Any]:
        """The `origin` of a run that starts from it."""
        return {"run": self.folder.name, "step": self.step, "stage": self.stage}

    def setting(self, value: Any, name: str, default: Any) -> Any:
        """Return `value`, or if it is None the setting `name` of its run, or if that has none `default`."""
        value = value if value is not None else self.settings.get(name)
        return default if value is None else value


def load(run: str | Path | None, step: int | None = None) -> InitCheckpoint:
    """Describe a checkpoint, by default the newest one of the run that was saved last."""
    info = checkpoint.inspect(run, step)
    return InitCheckpoint(
        info.folder,
        info.step,
        info.stage,
        checkpoint.infer_config(info),
        checkpoint.load_tokenizer(info),
        info.meta.get("config", {}),
        any(name.startswith("opt_state.") for name in info.state),
        info.meta.get("parent"),
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


def init_state_from(
    base: InitCheckpoint, runtime: Runtime, sharding_plan: ShardingPlan | None, *, moments: bool = True
) -> TrainState:
    """Return the state before the first step: the base run's parameters and, with `moments`, its optimizer state.

    The optimizer keeps its own step count; the run's starts at 0. Parameters are cast to this run's storage dtypes.
    """
    checkpoints, spec, dtype = base.folder / "checkpoints", model.spec(base.shape), runtime.compute_dtype
    if moments and base.moments:
        stored = DTYPES[checkpoint.inspect(base.folder, base.step).state["params.wte"]["dtype"]]
        params = model.init(base.shape, 0, device="meta", dtype=stored, sharding_plan=sharding_plan)
        abstract = train.init(params, spec, stored, sharding_plan)
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


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run's folder has a checkpoint; rank 0's answer on all ranks."""
    return bool(distributed.all_reduce_max(bool(checkpoint.steps(folder / "checkpoints"))))
