r"""Find the best model for a budget of FLOPs: several depths at each of several budgets, and the laws that follow.

    torchrun --nproc_per_node=8 launch.py --experiment=scaling_laws         # 4 budgets x depths 10, 12, … 20
    torchrun --nproc_per_node=8 launch.py --experiment=scaling_laws --set name=small --set budgets=1e17,3e17 \
        --set depths=4,6,8,10

Every budget has a run at every depth, as long as the budget lasts. Over the logarithm of the parameters, the bits per
byte of a budget lie near a parabola, whose lowest point is the best model for it; how the best number of parameters N
and of tokens D grow with the budget C gives the exponents of N ~ C^a and D ~ C^b. A lowest point outside of the depths
tried is none: it is shown and left out. Parameters are the scaling ones, matrices and unembedding.

Runs, resuming, settings in `base` are as for --experiment=miniseries. Writes scaling_laws/<name>/results.csv under the
base folder after each run, isoflop.svg and optima.svg. The 24 runs take about 8 hours on 8 H100, at half of their
FLOP/s.
Source: the second approach of Hoffmann et al., arXiv 2203.15556.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import miniseries, pretrain
from nanochat import distributed
from nanochat.config import Device, Dtype, UserError, base_dir
from nanochat.metrics import plots

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

COLUMNS = ("flops_budget", *miniseries.COLUMNS)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        name: of the sweep, and the beginning of its runs' names. budgets: FLOPs. depths: one run each at each budget.
        base: what the runs share; its depth, target_flops, name, device and dtype are set here.
        device, dtype: auto, or as in `runtime.create`.
    """

    name: str = "scaling_laws"
    budgets: tuple[float, ...] = (1e18, 2.15e18, 4.64e18, 1e19)
    depths: tuple[int, ...] = tuple(range(10, 21, 2))
    base: pretrain.Config = pretrain.Config()
    device: Device = "auto"
    dtype: Dtype = "auto"


class Optimum(NamedTuple):
    """The best model of a budget, by a parabola over ln(parameters).

    Attributes:
        budget: FLOPs. params, tokens, bpb: of the lowest point. inside: whether it lies between the depths tried.
        curve: of the parabola, as it was fitted: highest power first.
    """

    budget: float
    params: float
    tokens: float
    bpb: float
    inside: bool
    curve: tuple[float, float, float]


def config() -> Config:
    """Return the reference's sweep."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Train what is missing, then fit and draw; after each run the table and pictures are those of what there is."""
    for name in ("budgets", "depths"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values) or min(values) <= 0:
            raise UserError(f"{name}={','.join(f'{x:g}' for x in values)}: expected one or more above 0, each once")
    if config.base.num_iterations is not None:
        raise UserError("base.num_iterations: the budgets decide how long a run is; set it to none")
    folder, line = base_dir() / "scaling_laws" / config.name, distributed.control_group()
    shared = dataclasses.replace(config.base, device=config.device, dtype=config.dtype)
    cells = [(budget, depth) for budget in config.budgets for depth in config.depths]
    rows: list[dict[str, Any]] = []
    for number, (budget, depth) in enumerate(cells, start=1):
        print(f"\n[{number}/{len(cells)}] {short(budget)} FLOPs, depth {depth}", flush=True)
        name = f"{config.name}_{short(budget)}_d{depth}"
        one = dataclasses.replace(shared, depth=depth, target_flops=budget, name=name)
        rows.append({"flops_budget": budget, "depth": depth, **miniseries.trained(one, folder, runtime, line)})
        with distributed.raise_on_any_failure(line):
            if runtime.is_main:
                miniseries.write(folder, COLUMNS, rows)
                draw(folder, config.name, rows, optima(rows))
    shown = ("flops_budget", "depth", "params_scaling", "tokens", "tokens_per_param", "val_bpb", "train_seconds")
    print(f"\n{miniseries.summary(rows, shown)}\n\n{laws(optima(rows))}\n\nresults and pictures: {folder}")


def short(number: float) -> str:
    """Return a large number for names and legends: 2.15e18."""
    return f"{number:.4g}".replace("e+0", "e").replace("e+", "e")


# Fits


def optima(rows: Sequence[dict[str, Any]]) -> list[Optimum]:
    """Return the best model of each budget that has three depths or more and a parabola that is open upwards."""
    found = []
    for budget in dict.fromkeys(row["flops_budget"] for row in rows):
        chosen = sorted((row for row in rows if row["flops_budget"] == budget), key=lambda row: row["params_scaling"])
        if len(chosen) >= 3:
            params, tokens, bpb = (
                np.array([row[name] for row in chosen], float) for name in ("params_scaling", "tokens", "val_bpb")
            )
            best = optimum(budget, params, tokens, bpb)
            found += [best] if best else []
    return found


def optimum(budget: float, params: np.ndarray, tokens: np.ndarray, bpb: np.ndarray) -> Optimum | None:
    """Return the lowest point of bpb = a x² + b x + c over x = ln(params), or None where there is none (a ≤ 0).

    Args:
        params: (n,) rising. tokens, bpb: (n,) of the same runs; tokens are read off between them, over logarithms.
    """
    x = np.log(params)
    a, b, c = (float(value) for value in np.polyfit(x - x.mean(), bpb, 2))
    if a <= 0:
        return None
    lowest = -b / (2 * a)
    place = lowest + float(x.mean())
    slope, offset = np.polyfit(x, np.log(tokens), 1)
    inside = bool(x[0] <= place <= x[-1])
    ln_tokens = float(np.interp(place, x, np.log(tokens))) if inside else float(slope * place + offset)
    middle = float(x.mean())
    curve = (a, b - 2 * a * middle, c - b * middle + a * middle**2)
    return Optimum(budget, math.exp(place), math.exp(ln_tokens), c - b * b / (4 * a), inside, curve)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return (k, factor) of y = factor · x^k, by least squares over logarithms."""
    slope, offset = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(slope), math.exp(offset)


def laws(found: Sequence[Optimum]) -> str:
    """Return the optima and the exponents, as text."""
    if not found:
        return "no optimum: a budget needs three depths, and bits per byte that rise on both sides"
    lines = [f"  {'budget':>10}{'best N':>12}{'best D':>12}{'D / N':>9}{'bits per byte':>16}"]
    for one in found:
        note = "" if one.inside else "   outside of the depths tried: left out"
        lines.append(
            f"  {short(one.budget):>10}{one.params:>12.3g}{one.tokens:>12.3g}{one.tokens / one.params:>9.2f}"
            f"{one.bpb:>16.4f}{note}"
        )
    inner = [one for one in found if one.inside]
    if len(inner) < 2:
        return "\n".join([*lines, "no exponents: they need two budgets with an optimum among the depths tried"])
    budgets = [one.budget for one in inner]
    a, _ = exponent(budgets, [one.params for one in inner])
    b, _ = exponent(budgets, [one.tokens for one in inner])
    return "\n".join([*lines, f"N ~ C^{a:.3f}, D ~ C^{b:.3f}, from {len(inner)} budgets"])


# Pictures


def draw(folder: Path, name: str, rows: Sequence[dict[str, Any]], found: Sequence[Optimum]) -> None:
    """Draw the budgets' curves with their fits, and the optima over the budgets."""
    fits = {one.budget: one for one in found}
    curves, marks = {}, {}
    for budget in dict.fromkeys(row["flops_budget"] for row in rows):
        chosen = [row for row in rows if row["flops_budget"] == budget]
        xs, ys = [row["params_scaling"] for row in chosen], [row["val_bpb"] for row in chosen]
        label = f"{short(budget)} FLOPs"
        curves[label], marks[label] = (xs, ys), (xs, ys)
        if budget in fits:
            xs = np.geomspace(min(xs), max(xs), 80)
            curves[label] = (xs.tolist(), np.polyval(fits[budget].curve, np.log(xs)).tolist())
    plots.line_chart(
        folder / "isoflop.svg", curves, title=f"{name}: bits per byte at equal FLOPs", x_label="scaling parameters",
        y_label="bits per byte", log_x=True, marks=marks,
    )  # fmt: skip
    inner = [one for one in found if one.inside]
    if len(inner) < 2:
        return
    budgets, lines, marks = [one.budget for one in inner], {}, {}
    for letter, values in {"N": [one.params for one in inner], "D": [one.tokens for one in inner]}.items():
        power, factor = exponent(budgets, values)
        label = f"{'parameters' if letter == 'N' else 'tokens'}, C^{power:.2f}"
        lines[label], marks[label] = (budgets, [factor * budget**power for budget in budgets]), (budgets, values)
    plots.line_chart(
        folder / "optima.svg", lines, title=f"{name}: the best model of a budget", x_label="training FLOPs",
        y_label="number", log_x=True, log_y=True, marks=marks,
    )  # fmt: skip
