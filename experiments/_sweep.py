"""What a sweep varies, and what came of it: the grammar of `vary`, the ranking of settings, the figure."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import pretrain
from nanochat import eval
from nanochat.config import UserError, flatten, nearest, override
from nanochat.metrics import logger, plots

SEEDS = ("seed", "data.seed")  # repeats of a setting
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "lr_fraction", "weight_decay", "warmup_steps")
# Numbers and seeds: members of one step may differ in them. The others change shapes or batches.
IN_STEP = (*SEEDS, *(f"optim.{name}" for name in (*RATES, "warmdown_ratio", "final_lr_fraction")))
IN_ROUNDS = ("depth", "model.aspect_ratio", "model.head_dim", "model.window_pattern", "total_batch_size")
IN_ROUNDS += ("num_iterations", "target_param_data_ratio")
MAX_MEMBERS = 4096
LEGEND_ROWS, CURVE_POINTS = 8, 120  # of the figure


class Member(NamedTuple):
    """One model of a sweep."""

    name: str  # 01, 02, …
    values: Mapping[str, Any]  # of the settings that vary
    config: pretrain.Config  # of the run of its own that it stands for

    def __str__(self) -> str:
        values = " ".join(f"{name.removeprefix('optim.')}={value}" for name, value in self.values.items())
        return f"{self.name} ({values})"


class Result(NamedTuple):
    """What came of a member."""

    member: Member
    bpb: float  # of the last evaluation; NaN if it diverged
    loss: float  # the last, smoothed
    diverged: int | None  # the step at which it did


# What to vary


def make_members(vary: str, config: pretrain.Config) -> list[Member]:
    """Return the members of the sweep `config.name` with these base settings."""
    words = vary.split()
    drawn = re.fullmatch(r"random:(\d+)", words[0]) if words else None
    axes: dict[str, Any] = {}
    for word in words[1:] if drawn else words:
        name, _, text = word.partition("=")
        if name not in (*IN_STEP, *IN_ROUNDS) or not text or name in axes:
            problem = "is there twice" if name in axes else f"cannot vary{nearest(name, (*IN_STEP, *IN_ROUNDS))}"
            problem = problem.partition("; there are")[0] if text else "expected setting=value,value"
            raise UserError(
                f"vary={word}: {problem}. These can: within a step {', '.join(IN_STEP)}; in rounds, one after the "
                f"other, {', '.join(IN_ROUNDS)}"
            )
        axes[name] = _values(config, name, text, bool(drawn))
    count = int(drawn[1]) if drawn else math.prod(map(len, axes.values()))
    if not axes or not 1 <= count <= MAX_MEMBERS:
        raise UserError(f"vary={vary}: expected 1 to {MAX_MEMBERS} members, as in optim.matrix_lr=0.01,0.02 seed=1..4")
    products = itertools.product(*axes.values())
    combinations = _draw(vary, axes, count) if drawn else [dict(zip(axes, values)) for values in products]
    members, digits = [], max(2, len(str(count)))
    for number, values in enumerate(combinations, 1):
        own = override(config, [f"{name}={value}" for name, value in values.items()])
        label = f"{number:0{digits}d}"
        members.append(Member(label, values, dataclasses.replace(own, name=f"{config.name}_{label}")))
    return members


def _values(config: pretrain.Config, name: str, text: str, drawn: bool) -> list[Any] | tuple[Any, Any]:
    """Return the values of a list, or of a range to draw from its two ends, as a tuple."""

    def parse(text: str) -> Any:
        return dict(flatten(override(config, [f"{name}={text}"])))[name]

    values: list[Any] = []
    for item in text.split(","):
        first, dots, last = item.partition("..")
        low, high = parse(first), parse(last if dots else first)
        if not dots:
            values.append(low)
        elif not isinstance(low, int | float) or not isinstance(high, int | float) or low > high:
            raise UserError(f"vary={name}={item}: expected low..high")
        elif drawn and item == text:
            if name not in SEEDS and low <= 0:
                raise UserError(f"vary={name}={item}: a range is drawn from in log space, so it starts above 0")
            return low, high
        elif not isinstance(low, int) or not isinstance(high, int) or high - low >= MAX_MEMBERS:
            raise UserError(f"vary={name}={item}: a grid needs a list, {name}=a,b,c; random:16 draws from ranges")
        else:
            values += range(low, high + 1)
    return list(dict.fromkeys(values))


def _draw(vary: str, axes: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return so many different members, the same ones for the same text."""
    rng, members = random.Random(vary), {}

    def draw(name: str, axis: Any) -> Any:
        if isinstance(axis, list):
            return rng.choice(axis)
        low, high = axis
        if name in SEEDS:
            return rng.randint(low, high)
        x = float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
        return min(max(round(x) if isinstance(low, int) else x, low), high)

    for _ in range(100 * count):
        values = {name: draw(name, axis) for name, axis in axes.items()}
        members.setdefault(tuple(values.values()), values)
        if len(members) == count:
            return list(members.values())
    raise UserError(f"vary={vary}: there are only {len(members)} different members; ask for so many")


def group_by_shape(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members in groups of one shape and batch."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.values.get(name) for name in IN_ROUNDS), []).append(member)
    return list(groups.values())


# What came of it


def result(member: Member, rows: Sequence[logger.Row]) -> Result:
    """Return what came of a member, by its metrics."""
    (_, losses), (_, bpb) = (logger.curve(rows, name) for name in ("train/loss_ema", "val/bpb"))
    diverged = next((row["step"] for row in rows if row.get("train/diverged")), None)
    return Result(member, math.nan if diverged or not bpb else bpb[-1], losses[-1] if losses else math.nan, diverged)


def by_rank(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: (math.isnan(r.bpb), r.bpb))


def members_table(results: Sequence[Result]) -> list[list[str]]:
    """Return a header and a row for each member, the best first."""
    names = list(results[0].member.values)
    rows = [["member", *names, "val bits per byte", "train loss", "diverged at step"]]
    for member, bpb, loss, diverged in by_rank(results):
        values = [str(member.values[name]) for name in names]
        rows.append(
            [member.name, *values, "-" if math.isnan(bpb) else f"{bpb:.4f}", f"{loss:.4f}", str(diverged or "")]
        )
    return rows


def rank_settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the members of each setting, which differ in their seeds, the best first; those that diverged last."""
    groups: dict[str, list[Result]] = {}
    for r in by_rank(results):
        setting = " ".join(f"{name}={value}" for name, value in r.member.values.items() if name not in SEEDS)
        groups.setdefault(setting or "the base settings", []).append(r)
    mean = {setting: statistics.fmean(r.bpb for r in group) for setting, group in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: (math.isnan(mean[item[0]]), mean[item[0]])))


def conclusion(results: Sequence[Result], nats: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield the best setting, its difference to the second, and how sure that is.

    Args:
        nats: of each member, the (rows, 2) nats and bytes of the rows of the validation text.
    """
    (best, first), *others = rank_settings(results).items()
    if math.isnan(mean := statistics.fmean(r.bpb for r in first)):
        yield "every setting has a member that diverged: lower the learning rates"
        return
    yield f"best: {best}: {mean:.4f} bits per byte" + f", mean of {len(first)} seeds" * (len(first) > 1)
    if not others:
        return
    (second, group), count = others[0], min(len(rows) for rows in nats.values())
    a, b = (np.mean([nats[r.member.name][:count] for r in side], axis=0) for side in (first, group))
    _, error = eval.significance.paired_difference(a[:, 0], b[:, 0], a[:, 1])
    i = eval.significance.interval([r.bpb for r in first], [r.bpb for r in group], error, count)
    covers = "text and seeds" if max(len(first), len(group)) > 1 else "the choice of text, not another seed"
    sure = "significant" if i.is_significant else "not significant: add seeds or steps"
    yield f"second: {second}: {i.difference:+.4f} (95% interval {i.low:+.4f} to {i.high:+.4f}, {covers}; {sure})"


def draw(path: Path, results: Sequence[Result], rows: Mapping[str, Sequence[logger.Row]], title: str) -> None:
    """Draw the curves of all members beside a map of the results over the first two settings that vary."""
    series = {}
    for place, r in enumerate(by_rank(results)):
        steps, losses = logger.curve(rows[r.member.name], "train/loss_ema")
        every = max(len(steps) // CURVE_POINTS, 1)
        hidden = "_" * (place >= LEGEND_ROWS)  # from the legend
        series[f"{hidden}{r.member}"] = steps[::-every][::-1], losses[::-every][::-1]
    x, y = [*sorted(results[0].member.values, key=lambda name: name in SEEDS), ""][:2]
    points = [(r.member.values[x], r.member.values.get(y, ""), r.bpb) for r in results]
    heat = plots.HeatMap(x, y, points, "validation bits per byte")
    plots.line_chart(path, series, title=title, x_label="step", y_label="training loss, nats per token", heat=heat)
