"""Which checkpoints stay: the policy that orbax goes by after each save, and what it may do for want of room."""

import dataclasses
import json
import math
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat import manifest, store
from nanochat.config import UserError

BEST_METRIC = "val/bpb"  # the lower the better


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones stay.

    Attributes:
        every_steps: for the training loop: save whenever that many steps are done; None: at the end and on signals.
        keep_last: this many of the newest steps stay; None: all.
        keep_best: the step with the lowest `val/bpb` stays beside them.
        keep_every_steps: steps divisible by this number stay for good.
        asynchronous: write in the background; `save` returns as soon as it holds a copy of the state.
    """

    every_steps: int | None = None
    keep_last: int | None = 2
    keep_best: bool = True
    keep_every_steps: int | None = None
    asynchronous: bool = True


def policy(config: CheckpointConfig) -> Any:
    """Return orbax's PreservationPolicy of these settings."""
    policies = store.orbax().checkpoint_managers
    stays = [policies.LatestN(config.keep_last)]
    if config.keep_best:
        best = policies.BestN(get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        stays.append(best)
    if config.keep_every_steps is not None:
        stays.append(policies.EveryNSteps(config.keep_every_steps))
    return policies.AnyPreservationPolicy(stays)


def score(metrics: Mapping[str, float]) -> float:
    """Return what a step with these metrics is compared by; infinite where they say nothing."""
    value = metrics.get(BEST_METRIC, math.inf)
    return value if math.isfinite(value) else math.inf


def metrics_path(folder: Path, step: int) -> Path:
    """Return where the metrics of a step are, which is where CheckpointManager keeps them."""
    return folder / str(step) / "metrics" / "metrics"


def describe(folder: Path) -> dict[int, dict[str, float]]:
    """Return {step: metrics} of the complete steps in `folder`; a step that was saved without has none.

    Raises:
        DamagedCheckpoint: a metrics file cannot be read.
    """
    found = {}
    for step in store.steps(folder):
        path = metrics_path(folder, step)
        try:
            found[step] = dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise manifest.damaged(folder / str(step), f"{path} cannot be read ({manifest.reason(error)})") from error
    return found


def make_room(
    orbax: Any,
    folder: Path,
    config: CheckpointConfig,
    step: int,
    needed_bytes: int,
    metrics: Mapping[str, float] | None,
) -> None:
    """Fail before writing where the disk is too full, unless steps that are due to go anyway make enough room.

    Args:
        orbax: the CheckpointManager of `folder`, to delete by.
        step, needed_bytes, metrics: of the checkpoint to be written.

    Raises:
        UserError: says how much is missing.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= needed_bytes:
        return
    infos = [types.SimpleNamespace(step=s, metrics=m or None) for s, m in {**describe(folder), step: metrics}.items()]
    stays = policy(config).should_preserve(infos, context=None)
    latest = max(store.steps(folder), default=None)
    doomed = [info.step for info, stay in zip(infos, stays) if not (stay or info.step in (step, latest))]
    freed_bytes = sum(p.stat().st_size for s in doomed for p in (folder / str(s)).rglob("*") if p.is_file())
    if free_bytes + freed_bytes < needed_bytes:
        raise UserError(
            f"checkpoint of step {step} needs {needed_bytes / 1e6:.1f} MB, {folder} has {free_bytes / 1e6:.1f} MB "
            f"free: make room or save to another folder; {last_good(folder)}"
        )
    for old in doomed:
        orbax.delete(old)
    store.clear(folder)


def last_good(folder: Path) -> str:
    """Return the part of a message that says what is left when a save failed."""
    steps = store.steps(folder)
    return f"step {steps[-1]} is still good" if steps else "no earlier step is there"
