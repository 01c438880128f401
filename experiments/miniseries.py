"""Train a series of models of rising depth, each to its own end, and see how the loss falls with compute.

    torchrun --nproc_per_node=8 launch.py --experiment=miniseries                  # depths 12, 14, … 26
    python launch.py --experiment=miniseries --set depths=2,3,4 --set name=tiny --set base.data.source=embedded

One pretraining run after the other, each on all ranks, each with what the scaling rules give for its depth; `base` has
the settings that they share, those of --experiment=pretrain. The same command goes on after a stop: a finished run is
skipped, a broken one resumed, one whose settings have changed is done again. Writes miniseries/<name>/results.csv
under the base folder after each run, and pictures: the last bits per byte over FLOPs, and all curves. The runs
themselves are <name>_d<depth>. Depths 12 to 26 take about 12 hours on 8 H100, at half of their FLOP/s.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import pretrain
from nanochat import distributed, metrics, model, train
from nanochat.config import Device, Dtype, UserError, base_dir
from nanochat.distributed import hardware
from nanochat.metrics import plots
from nanochat.text import format_count, format_duration, table

if TYPE_CHECKING:
    from nanochat.distributed import ControlGroup, Runtime
    from nanochat.metrics import RunInfo

COLUMNS = (
    *("run", "depth", "width", "params_total", "params_scaling", "batch_tokens", "steps", "tokens", "tokens_per_param"),
    *("flops", "val_bpb", "core", "train_seconds"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        name: of the series, and the beginning of its runs' names. depths: one run each.
        base: what the runs share; its depth, name, device and dtype are set here.
        device, dtype: auto, or as in `runtime.create`.
    """

    name: str = "miniseries"
    depths: tuple[int, ...] = tuple(range(12, 27, 2))
    base: pretrain.Config = pretrain.Config()
    device: Device = "auto"
    dtype: Dtype = "auto"


def config() -> Config:
    """Return the reference's series."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Train what is missing, and draw what there is after each run."""
    if not config.depths or len(set(config.depths)) < len(config.depths):
        raise UserError(f"depths={','.join(map(str, config.depths))}: expected one depth or more, each once")
    shared = dataclasses.replace(config.base, device=config.device, dtype=config.dtype)
    wanted = [dataclasses.replace(shared, depth=d, name=f"{config.name}_d{d}") for d in config.depths]
    folder = base_dir() / "miniseries" / config.name
    line = distributed.control_group()
    finished: list[dict[str, Any]] = []
    for number, one in enumerate(wanted, start=1):
        print(f"\n[{number}/{len(wanted)}] depth {one.depth}", flush=True)
        finished.append({"depth": one.depth, **trained(one, folder, runtime, line)})
        with distributed.raise_on_any_failure(line):
            if runtime.is_main:
                write(folder, COLUMNS, finished)
                draw(folder, config.name, finished)
    print(f"\n{summary(finished, ('depth', 'params_scaling', 'tokens', 'flops', 'val_bpb', 'core', 'train_seconds'))}")
    print(f"\nresults and pictures: {folder}")


def trained(config: pretrain.Config, folder: Path, runtime: Runtime, line: ControlGroup) -> dict[str, Any]:
    """Train one run of a series unless it is done, and return what there is to say of it, by column.

    Args:
        config: of the run, with its name. folder: of the series, for the note that the run is done.
    """
    name = str(config.name)
    path, settings = folder / "runs" / f"{name}.json", train.pipeline.settings(config)
    standing = train.pipeline.describe_status(path, settings, line)
    says = {
        "new": f"{name}: to be trained",
        "begun": f"{name}: begun already",
        "changed": f"{name}: again, for {train.pipeline.reasons(standing)}",
        "done": f"{name}: done already, in {format_duration(standing.seconds)}",
    }
    print(says[standing.state], flush=True)

    def pretrain_one(opening: dict[str, bool]) -> None:
        pretrain.run(dataclasses.replace(config, **opening), runtime)
        hardware.release_memory()

    run_folder = train.run_folder(name)
    train.pipeline.run_if_needed(
        path, settings, line, pretrain_one, run=run_folder, intact=(run_folder / metrics.logger.FILE).exists
    )
    with distributed.raise_on_any_failure(line):
        return facts(metrics.run_folder.read_run(run_folder))


def facts(one: RunInfo) -> dict[str, Any]:
    """Return the columns of a finished run.

    Raises:
        UserError: its checkpoint is gone, or it has no evaluation.
    """
    scores, shape = metrics.run_folder.scores(one), one.shape
    tokens, flops = metrics.run_folder.step_tokens(one), metrics.run_folder.step_flops(one)
    if shape is None or tokens is None or flops is None or "val/bpb" not in scores:
        raise UserError(
            f"run {one.name}: its checkpoint or its metrics.jsonl is gone; delete {one.folder} to train it anew"
        )
    counts, core = model.count(shape), scores.get("core/CORE")
    return {
        "run": one.name,
        "width": shape.n_embd,
        "params_total": counts["total"],
        "params_scaling": counts["scaling"],
        "batch_tokens": round(tokens),
        "steps": one.step,
        "tokens": round(tokens * one.step),
        "tokens_per_param": round(tokens * one.step / counts["scaling"], 4),
        "flops": flops * one.step,
        "val_bpb": scores["val/bpb"].value,
        "core": core.value if core else None,
        "train_seconds": round(metrics.run_folder.train_seconds(one) or 0.0, 1),
    }


def write(folder: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write results.csv; what is not known is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "results.csv"
    part = path.with_suffix(".part")
    part.write_text(text.getvalue(), "utf-8")
    part.replace(path)


def summary(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return columns of the results as text."""

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if name == "train_seconds":
            return format_duration(value)
        if isinstance(value, float):
            return f"{value:.3g}" if value >= 1e4 else f"{value:.4f}"
        return format_count(value) if value >= 1e4 else str(value)

    return table([columns, *([cell(name, row[name]) for name in columns] for row in rows)])


def draw(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the runs' ends over FLOPs, bits per byte and CORE, and all of their curves."""
    ends = {"val_bpb": ("bits per byte", "bpb.svg"), "core": ("CORE", "core.svg")}
    for column, (label, file) in ends.items():
        known = [row for row in rows if row[column] is not None]
        points = ([row["flops"] for row in known], [row[column] for row in known])
        if known:
            drawn = {f"depth {known[0]['depth']} to {known[-1]['depth']}": points}
            how = {"title": f"{name}: {label}", "x_label": "training FLOPs", "y_label": label, "log_x": True}
            plots.line_chart(folder / file, drawn, marks=drawn, **how)
    curves = {}
    for row in rows:
        one = metrics.run_folder.read_run(train.run_folder(row["run"]))
        steps, values = metrics.logger.curve(one.rows, "val/bpb")
        curves[f"d{row['depth']}"] = ([row["flops"] / row["steps"] * step for step in steps], values)
    plots.line_chart(
        folder / "curves.svg", curves, title=f"{name}: validation along each run", x_label="training FLOPs",
        y_label="bits per byte", log_x=True,
    )  # fmt: skip
