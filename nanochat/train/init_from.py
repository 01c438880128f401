"""What a training stage takes over from the run before it: weights, shape, tokenizer, moments and settings."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, distributed, model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import Layout, Runtime, sharding
from nanochat.model import ModelConfig
from nanochat.train import step as train
from nanochat.train.step import TrainState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class InitCheckpoint:
    """A checkpoint to begin with.

    Attributes:
        folder: of its run. step, stage: of it; the stage is base, mid, sft or rl.
        shape, tokenizer: of its model. settings: that it was trained with, by dotted name; {} for a converted one.
        moments: whether it has the optimizer's. parent: what it says of its own parent, None for a base model.
    """

    folder: Path
    step: int
    stage: str
    shape: ModelConfig
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    moments: bool
    parent: Mapping[str, Any] | None

    @property
    def record(self) -> dict[str, Any]:
        """What a child's checkpoint says of it."""
        return {"run": self.folder.name, "step": self.step, "stage": self.stage}

    def setting(self, value: Any, name: str, default: Any) -> Any:
        """Return `value`, or where it is None the parent's setting of that name, or where it has none `default`."""
        found = value if value is not None else self.settings.get(name)
        return default if found is None else found


def load(run: str | Path | None, step: int | None = None) -> InitCheckpoint:
    """Read what a checkpoint is, without its weights.

    Args:
        run: name or folder of a run; None: the run that was saved last. step: None: the newest.

    Raises:
        UserError: as `pretrained.load`.
    """
    folder = checkpoint.find_run(run)
    saved = checkpoint.steps(folder / "checkpoints")
    if step is not None and step not in saved:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are steps {', '.join(map(str, saved))}")
    step = saved[-1] if step is None else step
    path = folder / "checkpoints" / str(step)
    header = checkpoint.read_header(path)
    meta, where = header["meta"], f"checkpoint {path}"
    leaves = {name: torch.empty(leaf["shape"], device="meta") for name, leaf in header["state"].items()}
    weights = {name.removeprefix("params."): leaf for name, leaf in leaves.items() if name.startswith("params.")}
    return InitCheckpoint(
        folder,
        step,
        str(meta.get("stage", "base")),
        checkpoint.infer_config(where, meta, weights),
        checkpoint.load_tokenizer(where, checkpoint.check_files(path, header["files"])),
        meta.get("config", {}),
        any(name.startswith("opt_state.") for name in leaves),
        meta.get("parent"),
    )


def newest(stages: Collection[str]) -> Path:
    """Return the folder of the run of one of these stages that was saved last.

    Raises:
        UserError: there is none.
    """
    for folder in checkpoint.list_runs():
        step = checkpoint.steps(folder / "checkpoints")[-1]
        if checkpoint.read_header(folder / "checkpoints" / str(step))["meta"].get("stage", "base") in stages:
            return folder
    raise UserError(
        f"no {' or '.join(stages)} model in {checkpoint.runs_folder()} to begin with: "
        f"`{checkpoint.TRAIN_COMMAND}` makes one; --set run=… names another"
    )


def init_state_from(
    parent: InitCheckpoint, runtime: Runtime, layout: Layout | None, *, moments: bool = True
) -> TrainState:
    """Return the state before a child's first step: the parent's weights and, with `moments`, its optimizer's.

    The optimizer's own count of steps goes on with its moments; the run's begins anew. Weights are cast where this
    run stores them in another dtype than its parent did.

    Raises:
        UserError: the checkpoint is damaged.
    """
    checkpoints, spec, dtype = parent.folder / "checkpoints", model.spec(parent.shape), runtime.compute_dtype
    place = functools.partial(sharding.place, layout)
    if moments and parent.moments:
        header = checkpoint.read_header(checkpoints / str(parent.step))
        stored = DTYPES[header["state"]["params.wte"]["dtype"]]
        nothing = model.init(parent.shape, 0, device="meta", dtype=stored, layout=layout)
        abstract = train.init(nothing, spec, stored, layout)
        state, _, _ = checkpoint.restore(checkpoints, abstract, parent.step, device=runtime.device)
        flat = {n: x.to(model.storage_dtype(spec[n], dtype)) for n, x in tree.flatten(state.params).items()}
        begun = torch.zeros_like(state.step)
        return TrainState(
            begun, tree.unflatten(flat, state.params), state.opt_state, train.init_scaler(dtype, runtime.device)
        )
    params, _, _ = checkpoint.load_params(checkpoints, step=parent.step, device=runtime.device)
    distributed.barrier()
    flat = {n: place(n, x.to(model.storage_dtype(spec[n], dtype))) for n, x in tree.flatten(params).items()}
    return train.init(tree.unflatten(flat, params), spec, dtype, layout)


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run's folder has a checkpoint; rank 0's answer on all ranks."""
    return bool(distributed.all_reduce_max(bool(checkpoint.steps(folder / "checkpoints"))))
