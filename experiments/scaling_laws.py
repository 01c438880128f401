r"""Train a series of models: rising depths, each to its own end, or several depths at each of several FLOP budgets.

    torchrun --nproc_per_node=8 launch.py --experiment=scaling_laws         # 4 budgets x depths 10, 12, … 20
    torchrun --nproc_per_node=8 launch.py --experiment=scaling_laws --set series=depths           # depths 12, 14, … 26
    torchrun --nproc_per_node=8 launch.py --experiment=scaling_laws --set name=small --set budgets=1e17,3e17 \
        --set depths=4,6,8,10
    python launch.py --experiment=scaling_laws --set series=depths --set depths=2,3,4 --set name=tiny \
        --set base.data.source=embedded

One pretraining run after the other, each on all ranks; `base` has the settings that they share, those of
--experiment=pretrain. The same command resumes after a stop: finished runs are skipped, a stopped one is resumed, one
whose settings changed is trained again. results.csv and the plots are written after each run.

series=depths: each model is as long as the scaling rules say. Writes miniseries/<name> under the base folder: bits per
byte over FLOPs, and all curves. Depths 12 to 26 take about 12 hours on 8 H100, at half of their FLOP/s.

series=budgets: over the logarithm of the parameters, the bits per byte of a budget lie near a parabola, whose minimum
is the best model for that budget. How the best number of parameters N and of tokens D grow with the budget C gives the
exponents of N ~ C^a and D ~ C^b. A minimum outside the depths tried is printed but not used. Parameters are the scaling
ones: matrices and unembedding. Writes scaling_laws/<name>: isoflop.svg and optima.svg. The 24 runs take about 8 hours
on 8 H100. Source: the second approach of Hoffmann et al., arXiv 2203.15556.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from experiments import _pipeline, pretrain
from nanochat import distributed, jsonl, metrics, model, train
from nanochat.config import Device, Dtype, PositiveFloat, PositiveInt, Settings, UserError, base_dir
from nanochat.metrics import plots
from nanochat.text import format_count, format_duration, table

FOLDERS = {"depths": "miniseries", "budgets": "scaling_laws"}
DEPTHS = {"depths": tuple(range(12, 27, 2)), "budgets": tuple(range(10, 21, 2))}
COLUMNS = (
    *("run", "depth", "width", "params_total", "params_scaling", "batch_tokens", "steps", "tokens", "tokens_per_param"),
    *("flops", "val_bpb", "core", "train_seconds"),
)
SUMMARY = {
    "depths": ("depth", "params_scaling", "tokens", "flops", "val_bpb", "core", "train_seconds"),
    "budgets": ("flops_budget", "depth", "params_scaling", "tokens", "tokens_per_param", "val_bpb", "train_seconds"),
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """A series of pretraining runs.

    Attributes:
        series: depths: a run for each depth, as long as the scaling rules say; budgets: one for each depth and budget.
        name: name of the series, and the start of its runs' names; none: miniseries or scaling_laws.
        depths: depths to train; none: 12, 14, … 26 for series=depths and 10, 12, … 20 for series=budgets.
        budgets: FLOPs of a run, for series=budgets.
        base: settings that the runs share; its depth, target_flops, name, device and dtype are set here.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 where a GPU has it, else float16; float32 on CPUs.
    """

    series: Literal["depths", "budgets"] = "budgets"
    name: train.RunName | None = None
    depths: tuple[PositiveInt, ...] | None = None
    budgets: tuple[PositiveFloat, ...] = (1e18, 2.15e18, 4.64e18, 1e19)
    base: pretrain.Config = pretrain.Config()
    device: Device = "auto"
    dtype: Dtype = "auto"


class Optimum(NamedTuple):
    """The best model of a budget, by a parabola over ln(parameters)."""

    budget: float  # FLOPs
    params: float
    tokens: float
    bpb: float
    inside: bool  # whether it lies between the depths tried
    curve: Polynomial  # bits per byte over ln(parameters)


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Train the runs that are missing; write the results and plots after each."""
    name, depths = config.name or FOLDERS[config.series], config.depths or DEPTHS[config.series]
    budgets = config.budgets if config.series == "budgets" else (None,)
    for field, values in (("depths", depths), ("budgets", config.budgets)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{field}={','.join(f'{x:g}' for x in values)}: expected one or more, each once")
    if config.series == "budgets" and config.base.num_iterations is not None:
        raise UserError("base.num_iterations: the budgets set the length of a run; set it to none")
    folder = base_dir() / FOLDERS[config.series] / name
    shared = dataclasses.replace(config.base, device=config.device, dtype=config.dtype)
    cells = [(budget, depth) for budget in budgets for depth in depths]
    rows: list[dict[str, Any]] = []
    for number, (budget, depth) in enumerate(cells, start=1):
        settings = dataclasses.replace(shared, depth=depth, name=f"{name}_d{depth}")
        label, key = f"depth {depth}", {}
        if budget is not None:
            settings = dataclasses.replace(settings, target_flops=budget, name=f"{name}_{short(budget)}_d{depth}")
            label, key = f"{short(budget)} FLOPs, depth {depth}", {"flops_budget": budget}
        print(f"\n[{number}/{len(cells)}] {label}", flush=True)
        rows.append({**key, "depth": depth, **trained(settings, folder, runtime)})
        with distributed.raise_on_any_failure():
            if runtime.is_main:
                write(folder, (*key, *COLUMNS), rows)
                draw_series(folder, name, rows) if budget is None else draw_budgets(folder, name, rows, optima(rows))
    print(f"\n{summary(rows, SUMMARY[config.series])}")
    if config.series == "budgets":
        print(f"\n{laws(optima(rows))}")
    print(f"\nresults and plots: {folder}")


def trained(config: pretrain.Config, folder: Path, runtime: distributed.Runtime) -> dict[str, Any]:
    """Train one run of the series unless it is done, and return its results by column."""
    run_folder = train.run_folder(str(config.name))
    _pipeline.run_if_needed(
        folder / "runs" / f"{config.name}.json",
        config,
        functools.partial(pretrain.run, runtime=runtime),
        folder=run_folder,
        has_output=(run_folder / metrics.logger.FILE).exists,
    )
    with distributed.raise_on_any_failure():
        info = metrics.run_folder.read_run(run_folder)
        scores, shape = metrics.run_folder.scores(info), info.shape
        tokens, flops = metrics.run_folder.step_tokens(info), metrics.run_folder.step_flops(info)
        if shape is None or tokens is None or flops is None or "val/bpb" not in scores:
            raise UserError(
                f"run {info.name}: its checkpoint or its metrics.jsonl is gone; delete {info.folder} to train it again"
            )
    counts, core = model.count(shape), scores.get("core/CORE")
    return {
        "run": info.name,
        "width": shape.n_embd,
        "params_total": counts["total"],
        "params_scaling": counts["scaling"],
        "batch_tokens": round(tokens),
        "steps": info.step,
        "tokens": round(tokens * info.step),
        "tokens_per_param": round(tokens * info.step / counts["scaling"], 4),
        "flops": flops * info.step,
        "val_bpb": scores["val/bpb"].value,
        "core": core.value if core else None,
        "train_seconds": round(metrics.run_folder.train_seconds(info) or 0.0, 1),
    }


def write(folder: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    jsonl.write_atomic(folder / "results.csv", text.getvalue())


def summary(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if name == "train_seconds":
            return format_duration(value)
        if isinstance(value, float):
            return f"{value:.3g}" if value >= 1e4 else f"{value:.4f}"
        return format_count(value) if value >= 1e4 else str(value)

    return table([columns, *([cell(name, row[name]) for name in columns] for row in rows)])


def short(number: float) -> str:
    """Return a large number for names and legends: 2.15e18."""
    return f"{number:.4g}".replace("e+0", "e").replace("e+", "e")


# Fits


def optima(rows: Sequence[dict[str, Any]]) -> list[Optimum]:
    """Return the lowest point of each budget's parabola, bpb = a x² + b x + c over x = ln(parameters).

    A budget needs three depths or more, and a > 0. Tokens are read off between the runs, over logarithms.
    """
    optima = []
    for budget, chosen in by_budget(rows).items():
        if len(chosen) < 3:
            continue
        chosen = sorted(chosen, key=lambda row: row["params_scaling"])
        x, ln_tokens = (np.log([float(row[name]) for row in chosen]) for name in ("params_scaling", "tokens"))
        curve = Polynomial.fit(x, [row["val_bpb"] for row in chosen], 2)
        if curve.coef[2] <= 0:
            continue
        best = float(curve.deriv().roots()[0])
        inside = bool(x[0] <= best <= x[-1])
        best_ln_tokens = float(np.interp(best, x, ln_tokens) if inside else Polynomial.fit(x, ln_tokens, 1)(best))
        optima.append(Optimum(budget, math.exp(best), math.exp(best_ln_tokens), float(curve(best)), inside, curve))
    return optima


def by_budget(rows: Sequence[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    budgets = dict.fromkeys(row["flops_budget"] for row in rows)
    return {budget: [row for row in rows if row["flops_budget"] == budget] for budget in budgets}


def power_law(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return (k, factor) of y = factor · x^k, by least squares over logarithms."""
    offset, slope = Polynomial.fit(np.log(xs), np.log(ys), 1).convert().coef
    return float(slope), math.exp(offset)


def laws(optima: Sequence[Optimum]) -> str:
    """Return the optima and the exponents, as text."""
    if not optima:
        return "no optimum: a budget needs three depths, and bits per byte that rise on both sides"
    rows = [["budget", "best N", "best D", "D / N", "bits per byte", ""]]
    for budget, params, tokens, bpb, inside, _ in optima:
        note = "" if inside else "outside of the depths tried: not used"
        rows.append([short(budget), f"{params:.3g}", f"{tokens:.3g}", f"{tokens / params:.2f}", f"{bpb:.4f}", note])
    inner = [best for best in optima if best.inside]
    text = "no exponents: they need two budgets with an optimum among the depths tried"
    if len(inner) > 1:
        budgets, params, tokens, *_ = zip(*inner)
        (a, _), (b, _) = power_law(budgets, params), power_law(budgets, tokens)
        text = f"N ~ C^{a:.3f}, D ~ C^{b:.3f}, from {len(inner)} budgets"
    return f"{table(rows)}\n{text}"


# Plots

draw = functools.partial(plots.line_chart, log_x=True)


def draw_series(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the final bits per byte and CORE over FLOPs, and the validation curves of all runs."""
    flops = "training FLOPs"
    for column, label, file in (("val_bpb", "bits per byte", "bpb.svg"), ("core", "CORE", "core.svg")):
        known = [row for row in rows if row[column] is not None]
        if known:
            points = ([row["flops"] for row in known], [row[column] for row in known])
            curves = {f"depth {known[0]['depth']} to {known[-1]['depth']}": points}
            draw(folder / file, curves, marks=curves, title=f"{name}: {label}", x_label=flops, y_label=label)
    curves = {}
    for row in rows:
        steps, bpb = metrics.logger.curve(metrics.logger.read(train.run_folder(row["run"])), "val/bpb")
        curves[f"d{row['depth']}"] = ([row["flops"] / row["steps"] * step for step in steps], bpb)
    title = f"{name}: validation along each run"
    draw(folder / "curves.svg", curves, title=title, x_label=flops, y_label="bits per byte")


def draw_budgets(folder: Path, name: str, rows: Sequence[dict[str, Any]], optima: Sequence[Optimum]) -> None:
    """Draw the curve of each budget with its fit, and the optima over the budgets."""
    fits = {best.budget: best.curve for best in optima}
    curves, marks = {}, {}
    for budget, chosen in by_budget(rows).items():
        label, params = f"{short(budget)} FLOPs", [row["params_scaling"] for row in chosen]
        curves[label] = marks[label] = (params, [row["val_bpb"] for row in chosen])
        if budget in fits:
            xs = np.geomspace(min(params), max(params), 80)
            curves[label] = (xs.tolist(), fits[budget](np.log(xs)).tolist())
    title, x_label = f"{name}: bits per byte at equal FLOPs", "scaling parameters"
    draw(folder / "isoflop.svg", curves, marks=marks, title=title, x_label=x_label, y_label="bits per byte")
    inner = [best for best in optima if best.inside]
    if len(inner) < 2:
        return
    (budgets, params, tokens, *_), curves, marks = zip(*inner), {}, {}
    for label, values in (("parameters", params), ("tokens", tokens)):
        power, factor = power_law(budgets, values)
        label = f"{label}, C^{power:.2f}"
        curves[label], marks[label] = (budgets, [factor * budget**power for budget in budgets]), (budgets, values)
    title, x_label = f"{name}: the best model of a budget", "training FLOPs"
    draw(folder / "optima.svg", curves, marks=marks, title=title, x_label=x_label, y_label="number", log_y=True)
