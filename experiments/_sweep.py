"""What a sweep varies, and what came of it: the grammar of `vary`, the ranking of settings, the table and the figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import pretrain
from nanochat import eval, jsonl
from nanochat.config import UserError, flatten, nearest, override
from nanochat.metrics import plots
from nanochat.text import table

if TYPE_CHECKING:
    from nanochat.eval import Interval

SEEDS = ("seed", "data.seed")  # repeats of a setting
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "lr_fraction", "weight_decay", "warmup_steps")
RATES += ("warmdown_ratio", "final_lr_fraction")
IN_STEP = (*SEEDS, *(f"optim.{name}" for name in RATES))  # numbers and seeds: members of one step may differ in them
IN_ROUNDS = ("depth", "model.aspect_ratio", "model.head_dim", "model.window_pattern", "total_batch_size")
IN_ROUNDS += ("num_iterations", "target_param_data_ratio")
MAX_MEMBERS = 4096
TABLE_ROWS = 24
LEGEND_ROWS = 10
CURVE_POINTS = 120


class Member(NamedTuple):
    """One model of a sweep."""

    name: str  # 01, 02, …
    values: Mapping[str, Any]  # of the settings that vary
    config: pretrain.Config  # of the run of its own that it stands for

    @property
    def label(self) -> str:
        return " ".join(f"{name.removeprefix('optim.')}={value}" for name, value in self.values.items())

    @property
    def setting(self) -> str:
        """The values but for the seeds."""
        return " ".join(f"{name}={value}" for name, value in self.values.items() if name not in SEEDS)


class Result(NamedTuple):
    """What came of a member."""

    member: Member
    bpb: float  # of the last evaluation; NaN if it diverged
    loss: float  # the last, smoothed
    diverged: int | None  # the step at which it did


# What to vary


def make_members(vary: str, config: pretrain.Config, name: str) -> list[Member]:
    """Return the members of a sweep `name` with the base settings `config`."""
    first, *words = vary.split() or [""]
    count = re.fullmatch(r"random:(\d+)", first)
    axes: dict[str, Any] = {}
    for word in words if count else [first, *words]:
        setting, _, text = word.partition("=")
        if setting not in (*IN_STEP, *IN_ROUNDS):
            near = nearest(setting, (*IN_STEP, *IN_ROUNDS))
            raise UserError(
                f"vary={word}: {f'{setting} cannot vary' if setting and text else 'expected setting=value,value'}"
                f"{near if 'mean' in near else ''}; these can: within a step {', '.join(IN_STEP)}; in rounds, one after "
                f"the other, {', '.join(IN_ROUNDS)}"
            )
        if setting in axes:
            raise UserError(f"vary={vary}: {setting} is there twice; list all its values once")
        axes[setting] = _values(config, setting, text, bool(count))
    combinations = _draw(vary, axes, int(count[1])) if count else _grid(vary, axes)
    if not 1 <= len(combinations) <= MAX_MEMBERS:
        raise UserError(f"vary={vary}: makes {len(combinations)} members; expected 1 to {MAX_MEMBERS}")
    digits = max(2, len(str(len(combinations))))
    members = []
    for number, values in enumerate(combinations, 1):
        label = f"{number:0{digits}d}"
        own = override(config, [f"{setting}={value}" for setting, value in values.items()])
        members.append(Member(label, values, dataclasses.replace(own, name=f"{name}_{label}")))
    return members


def _values(config: pretrain.Config, setting: str, text: str, drawn: bool) -> list[Any] | tuple[Any, Any]:
    """Return the values of a list, or for a range that is drawn from, its two ends as a tuple."""

    def parse(text: str) -> Any:
        return dict(flatten(override(config, [f"{setting}={text}"])))[setting]

    values: list[Any] = []
    for item in text.split(","):
        low, dots, high = item.partition("..")
        if not dots:
            values.append(parse(item))
            continue
        ends = parse(low), parse(high)
        whole = all(isinstance(end, int) for end in ends)
        if not all(isinstance(end, int | float) for end in ends) or ends[0] > ends[1]:
            raise UserError(f"vary={setting}={item}: expected low..high")
        if drawn and text == item:
            if setting not in SEEDS and ends[0] <= 0:
                raise UserError(f"vary={setting}={item}: is drawn in log space, so both ends have to be above 0")
            return ends
        if not whole:
            raise UserError(f"vary={setting}={item}: a grid needs a list, {setting}=a,b,c; random:16 draws from ranges")
        if ends[1] - ends[0] >= MAX_MEMBERS:
            raise UserError(f"vary={setting}={item}: more than {MAX_MEMBERS} values")
        values += range(ends[0], ends[1] + 1)
    return list(dict.fromkeys(values))


def _grid(vary: str, axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    if (count := math.prod(map(len, axes.values()))) > MAX_MEMBERS:
        raise UserError(f"vary={vary}: makes {count} members; expected at most {MAX_MEMBERS}")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _draw(vary: str, axes: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return so many different members, the same ones for the same text."""
    rng, members = random.Random(vary), {}

    def draw(setting: str, axis: Any) -> Any:
        if isinstance(axis, list):
            return rng.choice(axis)
        if setting in SEEDS:
            return rng.randint(*axis)
        low, high = axis
        x = float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
        return min(max(round(x) if isinstance(low, int) else x, low), high)

    for _ in range(100 * count):
        values = {setting: draw(setting, axis) for setting, axis in axes.items()}
        members.setdefault(tuple(values.values()), values)
        if len(members) == count:
            return list(members.values())
    raise UserError(f"vary={vary}: has only {len(members)} different members; ask for as many, or list them as a grid")


def make_rounds(members: Sequence[Member], most: int) -> list[list[Member]]:
    """Return the members in groups of one shape and batch, of at most so many members, and about equally many."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.values.get(name) for name in IN_ROUNDS), []).append(member)
    rounds = []
    for group in groups.values():
        each = -(-len(group) // -(-len(group) // most))
        rounds += [group[i : i + each] for i in range(0, len(group), each)]
    return rounds


# What came of it


def members_table(results: Sequence[Result]) -> list[list[str]]:
    """Return a header and a row for each member, the best first."""
    settings = list(results[0].member.values)
    rows = [["member", *settings, "val bits per byte", "train loss", "diverged at step"]]
    for r in sorted(results, key=lambda r: (math.isnan(r.bpb), r.bpb)):
        values = [str(r.member.values[name]) for name in settings]
        bpb = "-" if math.isnan(r.bpb) else f"{r.bpb:.4f}"
        rows.append([r.member.name, *values, bpb, f"{r.loss:.4f}", str(r.diverged or "")])
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    jsonl.write_atomic(path, text.getvalue())


def by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the members of each setting, which differ in their seeds, the best setting first; of diverged ones last."""
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.member.setting, []).append(r)
    mean = {setting: statistics.fmean(r.bpb for r in group) for setting, group in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: (math.isnan(mean[item[0]]), mean[item[0]])))


def difference(first: Sequence[Result], second: Sequence[Result], nats: Mapping[str, np.ndarray]) -> Interval:
    """Return the second setting's bits per byte minus the first's, over the choice of text and over seeds.

    Args:
        nats: of each member, the (rows, 2) nats and bytes of the validation text.
    """
    rows = min(len(nats[r.member.name]) for r in [*first, *second])
    a, b = (np.mean([nats[r.member.name][:rows, 0] for r in side], axis=0) for side in (first, second))
    sizes = nats[first[0].member.name][:rows, 1]
    _, error = eval.significance.paired_difference(a, b, sizes) if rows > 1 else (0.0, 0.0)
    return eval.significance.interval([r.bpb for r in first], [r.bpb for r in second], error, rows)


def conclusion(results: Sequence[Result], nats: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield the ranking of the settings, and how sure the best one is."""
    groups = {s: g for s, g in by_setting(results).items() if not any(math.isnan(r.bpb) for r in g)}
    if not groups:
        yield "every setting has a member that diverged: lower the learning rates"
        return
    (best, first), *others = groups.items()
    repeats = f", mean of {len(first)} seeds" if len(first) > 1 else ""
    yield f"best: {best or 'the base settings'}: {statistics.fmean(r.bpb for r in first):.4f} bits per byte{repeats}"
    if others:
        second, group = others[0]
        i = difference(first, group, nats)
        covers = "text and seeds" if max(len(first), len(group)) > 1 else "the choice of text, not another seed"
        sure = "significant" if i.is_significant else "not significant: add seeds or steps"
        yield f"second: {second}: {i.difference:+.4f} (95% interval {i.low:+.4f} to {i.high:+.4f}, {covers}; {sure})"
    elif len(first) > 1:
        yield f"standard deviation over seeds {statistics.stdev(r.bpb for r in first):.4f}"


def draw(path: Path, results: Sequence[Result], curves: plots.Series, title: str) -> None:
    """Draw the curves of all members beside a map of the results over the first two settings that vary."""
    order = sorted(results, key=lambda r: (math.isnan(r.bpb), r.bpb))
    series = {}
    for place, r in enumerate(order):
        steps, losses = curves[r.member.name]
        every = max(len(steps) // CURVE_POINTS, 1)
        hidden = "_" * (place >= LEGEND_ROWS)  # from the legend
        series[f"{hidden}{r.member.label}"] = steps[::-every][::-1], losses[::-every][::-1]
    varied = [name for name in results[0].member.values if name not in SEEDS]
    x_name, y_name = [*varied, *(name for name in results[0].member.values if name in SEEDS), "", ""][:2]
    points = [(r.member.values.get(x_name), r.member.values.get(y_name, ""), r.bpb) for r in results]
    heat = plots.HeatMap(x_name, y_name, points, "validation bits per byte")
    plots.line_chart(path, series, title=title, x_label="step", y_label="training loss, nats per token", heat=heat)
