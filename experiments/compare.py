"""Compare two pretraining runs: bits per byte at equal FLOPs and at equal time, each with a confidence interval.

    python launch.py --experiment=compare d12 d12_muon
    torchrun --nproc_per_node=8 launch.py --experiment=compare a1,a2,a3 'b*'       # several seeds on each side

Both are evaluated on the same pieces of validation text: the packed rows of their own evaluations if tokenizer, context
and data are equal, else documents, truncated to fit every context. The interval is that of the paired differences, so
it covers the choice of validation text. It covers the seeds as well if a side has two or more runs (same settings,
different seeds), and only then.

FLOPs and time are those of the shortest run. A longer run is read off its curve there, in the middle of its
learning-rate schedule; a note says so. Time is the median step time of each run on the machine it ran on.
Prints a table and a conclusion; plots the curves and their difference into compare/<a>_<b> in the base folder. Takes as
long as an evaluation of each run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanochat import checkpoint, data, distributed, eval, metrics, model
from nanochat.config import Device, Dtype, UsageError, UserError, base_dir
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.metrics import plots
from nanochat.text import format_duration, table

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime
    from nanochat.eval import Interval
    from nanochat.metrics import Curve, RunInfo

    Batches = Generator[dict[str, Tensor], None, None]

BATCH_TOKENS = 2**14
AXES = {"FLOPs": "training FLOPs", "time": "training time in minutes"}
SCHEDULE_END = 0.97  # before this fraction of a run, its learning rate is still well above the last one


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    Attributes:
        args: the two sides as positional arguments: a run, several separated by commas, or a pattern with *.
        tokens: number of validation tokens; none: as many as the runs' own evaluations.
        source: text source of the documents, if the runs' rows differ; none: the first run's.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
    """

    args: tuple[str, ...] = ()
    tokens: int | None = None
    source: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"


class Side(NamedTuple):
    """One side of the comparison.

    Attributes:
        runs: one for each seed. steps: the checkpoint of each run that is measured.
        nats: (pieces,) summed loss of each run on each piece of text, once measured.
    """

    name: str
    runs: list[RunInfo]
    steps: list[int]
    nats: list[np.ndarray]


class Comparison(NamedTuple):
    """The comparison at `limit` of an axis: bits per byte of each run of both sides, and their difference."""

    limit: float
    values: tuple[list[float], list[float]]
    interval: Interval


config = Config


def run(config: Config, runtime: Runtime) -> None:
    """Find the runs, measure them on the same text, and report how they differ."""
    if len(config.args) != 2:
        raise UsageError("compare takes two arguments, the runs: python launch.py --experiment=compare <a> <b>")
    with distributed.raise_on_any_failure():
        sides = [find_side(text) for text in config.args]
        limits = {axis: min(curve(info, axis)[0][-1] for side in sides for info in side.runs) for axis in AXES}
        sides = [s._replace(steps=[nearest_checkpoint(info, limits["FLOPs"]) for info in s.runs]) for s in sides]
    print("\n".join(describe(sides)), flush=True)
    unit, sizes, sides = measure(config, runtime, sides)
    results = {axis: compare(sides, sizes, axis, limit) for axis, limit in limits.items()}
    print(f"\n{format_table(sides, results)}\n")
    print("\n".join(f"note: {note}" for note in notes(sides, limits["FLOPs"])))
    print(f"{conclusion(sides, results)}\n{coverage(sides, unit, len(sizes))}")
    if runtime.is_main:
        folder = base_dir() / "compare" / re.sub(r"[^\w.,-]+", "-", f"{sides[0].name}_{sides[1].name}")
        plot(folder, sides, results)
        print(f"curves and their difference: {folder}")


# Runs


def find_side(text: str) -> Side:
    """Return the runs of one side.

    Raises:
        UserError: there are none, or one is not a pretraining run with evaluations and a checkpoint.
    """
    folders = []
    for name in text.split(","):
        if "*" in name:
            matching = sorted(p for p in checkpoint.runs_folder().glob(name) if (p / metrics.logger.FILE).exists())
            if not matching:
                raise UserError(f"{name}: matches no run in {checkpoint.runs_folder()}")
            folders += matching
        elif name:
            folders.append(metrics.run_folder.find_run(name))
    runs = [metrics.run_folder.read_run(folder) for folder in folders]
    if not runs:
        raise UsageError(f"{text!r}: names no run")
    for info in runs:
        if info.stage != "base":
            raise UserError(f"run {info.name} is of stage {info.stage}: compare is for pretraining runs")
        if not info.steps:
            raise UserError(f"run {info.name} has no checkpoint yet")
        if not metrics.logger.curve(info.rows, "val/bpb")[0]:
            raise UserError(f"run {info.name} has no evaluation in its metrics.jsonl, so there is no curve to compare")
    return Side(text, runs, [], [])


def curve(info: RunInfo, axis: str) -> Curve:
    """Return (FLOPs or minutes, bits per byte) of a run's evaluations."""
    steps, values = metrics.logger.curve(info.rows, "val/bpb")
    flops, seconds = metrics.run_folder.step_flops(info), metrics.run_folder.step_seconds(info)
    per_step = flops if axis == "FLOPs" else (seconds or 0.0) / 60
    if not per_step:
        raise UserError(f"run {info.name}: its metrics.jsonl lacks the {axis} of a step")
    return [per_step * step for step in steps], values


def nearest_checkpoint(info: RunInfo, flops: float) -> int:
    """Return the step of the checkpoint nearest to `flops`, of those that lie on the run's curve."""
    xs, _ = curve(info, "FLOPs")
    per_step = metrics.run_folder.step_flops(info) or 1.0
    steps = [step for step in info.steps if xs[0] <= per_step * step <= xs[-1]]
    if not steps:
        raise UserError(f"run {info.name} has no checkpoint after its first evaluation")
    return min(steps, key=lambda step: abs(per_step * step - flops))


def describe(sides: Sequence[Side]) -> Iterator[str]:
    """Yield lines with the checkpoints that are compared and the settings that differ."""
    for side in sides:
        for info, step in zip(side.runs, side.steps):
            flops = metrics.run_folder.step_flops(info) or math.nan
            yield f"{info.name}: checkpoint of step {step:,} of {info.last_step:,}, {flops:.3g} FLOPs a step"
    a, b = (settings(side.runs[0]) for side in sides)
    changed = [name for name in a if name in b and a[name] != b[name] and name not in ("name", "seed", "resume")]
    yield "settings that differ: " + (", ".join(f"{n} {a[n]} → {b[n]}" for n in changed) or "none but name and seed")


def settings(info: RunInfo) -> dict[str, Any]:
    """Return a run's settings by dotted name."""
    return dict(info.meta.get("config", {}))


# Measurement


def measure(config: Config, runtime: Runtime, sides: Sequence[Side]) -> tuple[str, np.ndarray, list[Side]]:
    """Return ("rows" or "documents", the bytes of each piece of text, the sides with their nats)."""
    checkpoints = [(info, step) for side in sides for info, step in zip(side.runs, side.steps)]
    with distributed.raise_on_any_failure():
        tokenizers = [checkpoint.load_tokenizer(checkpoint.inspect(info.folder, step)) for info, step in checkpoints]
        identities = [rows_identity(info, tok) for (info, _), tok in zip(checkpoints, tokenizers)]
        tokens = config.tokens or checkpoints[0][0].settings.get("eval", {}).get("tokens") or 2**20
        same_rows = config.source is None and all(identity == identities[0] for identity in identities)
        texts = [] if same_rows else documents(config, checkpoints, tokenizers, tokens)
    sizes, nats = np.zeros(0), []
    for (info, step), tok in zip(checkpoints, tokenizers):
        with distributed.raise_on_any_failure():
            loaded = checkpoint.load(info.folder, step=step, device=runtime.device, dtype=runtime.compute_dtype)
        context = loaded.config.sequence_len
        batches = (
            packed_rows(info, tok, tokens, context, runtime) if same_rows else padded(texts, tok, context, runtime)
        )
        compute = model.Compute(dtype=runtime.compute_dtype)
        with contextlib.closing(batches):
            # Every rank reads all batches, so the rows do not depend on the number of ranks.
            own = itertools.islice(batches, runtime.rank, None, runtime.world_size)
            by_batch = list(eval.bpb.nats_by_row(loaded.params, own, tok, loaded.config, compute))
        turns = itertools.zip_longest(*distributed.all_gather_object(by_batch), fillvalue=[])
        run_nats, run_sizes = np.array([row for turn in turns for rows in turn for row in rows], np.float64).T
        if len(sizes) and not np.array_equal(run_sizes, sizes):
            raise UserError(f"run {info.name} was measured on different text: did the validation data change?")
        sizes = run_sizes
        nats.append(run_nats)
        print(f"{info.name}: {run_nats.sum() / math.log(2) / sizes.sum():.4f} bits per byte", flush=True)
    rest = iter(nats)
    measured_sides = [side._replace(nats=[next(rest) for _ in side.runs]) for side in sides]
    return "rows" if same_rows else "documents", sizes, measured_sides


def rows_identity(info: RunInfo, tok: Tokenizer) -> list[Any]:
    """Return everything that a run's packed validation rows depend on."""
    config = data_config(info)
    assert info.shape is not None
    return [tok.fingerprint, info.shape.sequence_len, config.source, config.text_column, config.buffer_docs]


def data_config(info: RunInfo) -> DataConfig:
    """Return the data settings of a run."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: x for name, x in info.settings.get("data", {}).items() if name in known})


def packed_rows(info: RunInfo, tok: Tokenizer, tokens: int, context: int, runtime: Runtime) -> Batches:
    """Yield the packed rows of the validation data, as in the run's own evaluations."""
    total = max(tokens // context, 2)
    size = next(n for n in range(max(min(BATCH_TOKENS // context, total), 1), 0, -1) if total % n == 0)
    stream = data.loader.batches(
        data_config(info), tok, split="val", rows_per_step=size, sequence_len=context, seed=0, device=runtime.device
    )
    with contextlib.closing(stream):
        yield from (batch for batch, *_ in itertools.islice(stream, total // size))


def documents(
    config: Config, checkpoints: Sequence[tuple[RunInfo, int]], tokenizers: Sequence[Tokenizer], tokens: int
) -> list[str]:
    """Return documents of the validation data, each truncated to fit into every run's context."""
    source = data_config(checkpoints[0][0])
    source = dataclasses.replace(source, source=config.source) if config.source else source
    contexts = [info.shape.sequence_len for info, _ in checkpoints if info.shape]
    sizes = [tokenizer.token_bytes(tok) for tok in tokenizers]
    texts, read = [], 0
    for text in sources.texts(source, "val"):
        encoded = text.encode()
        ids = [tok.encode(text)[:context] for tok, context in zip(tokenizers, contexts)]
        end = min(int(size[i].sum()) for size, i in zip(sizes, ids))
        while (prefix := encoded[:end].decode(errors="ignore")) and any(
            len(tok.encode(prefix)) > context for tok, context in zip(tokenizers, contexts)
        ):
            end -= 8  # the last bytes may take more tokens at the end of a text than within it
        if prefix:
            texts.append(prefix)
            read += len(ids[0])
        if read >= tokens:
            break
    if len(texts) < 2:
        raise UserError(f"data.source={source.source}: has fewer than two validation documents")
    return texts


def padded(texts: Sequence[str], tok: Tokenizer, context: int, runtime: Runtime) -> Batches:
    """Yield documents as rows of their own, after <|bos|>, padded to the context."""
    import torch

    size = max(BATCH_TOKENS // context, 1)
    for start in range(0, len(texts), size):
        rows = [[tok.bos, *tok.encode(text)] for text in texts[start : start + size]]
        inputs, targets = torch.full((len(rows), context), tok.bos), torch.full((len(rows), context), -1)
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1], targets[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        yield {"inputs": inputs.to(runtime.device), "targets": targets.to(runtime.device)}


# Results


def compare(sides: Sequence[Side], sizes: np.ndarray, axis: str, limit: float) -> Comparison | None:
    """Return the comparison at `limit` of an axis, or None if a run's first evaluation comes after it.

    A run's value is the one measured at its checkpoint, shifted along the run's own curve from there to the limit.
    """
    values: tuple[list[float], list[float]] = ([], [])
    for side, side_values in zip(sides, values):
        for info, step, nats in zip(side.runs, side.steps, side.nats):
            xs, ys = curve(info, axis)
            steps = metrics.logger.curve(info.rows, "val/bpb")[0]
            at_limit = eval.significance.interpolate_log(xs, ys, limit)
            at_step = eval.significance.interpolate_log(steps, ys, step)
            if at_limit is None or at_step is None:
                return None
            side_values.append(float(nats.sum() / math.log(2) / sizes.sum()) + at_limit - at_step)
    means = [np.mean(side.nats, axis=0) for side in sides]
    _, error = eval.significance.paired_difference(means[0], means[1], sizes)
    return Comparison(limit, values, eval.significance.interval(*values, error, len(sizes)))


def format_table(sides: Sequence[Side], results: dict[str, Comparison | None]) -> str:
    """Return the comparisons as a table."""
    rows = [["at equal", *(side.name for side in sides), "difference", "95% interval"]]
    for axis, result in results.items():
        if result is None:
            rows.append([axis, "-", "-", "-", "the curves do not overlap"])
            continue
        limit = f"{result.limit:.3g}" if axis == "FLOPs" else format_duration(60 * result.limit)
        means, i = [f"{np.mean(values):.4f}" for values in result.values], result.interval
        rows.append([f"{axis}: {limit}", *means, f"{i.difference:+.4f}", f"{i.low:+.4f} to {i.high:+.4f}"])
    return table(rows)


def notes(sides: Sequence[Side], limit: float) -> Iterator[str]:
    """Yield caveats about these runs."""
    for side in sides:
        all_settings = [{n: x for n, x in settings(info).items() if n not in ("name", "seed")} for info in side.runs]
        first = all_settings[0]
        names = sorted({n for other in all_settings for n in other if other[n] != first.get(n)})
        if names:
            yield f"the runs of {side.name} differ in more than their seed ({', '.join(names)})"
        for info in side.runs:
            fraction = limit / ((metrics.run_folder.step_flops(info) or 1.0) * info.last_step)
            if not info.done:
                yield f"{info.name} is not finished: its learning rate has not decayed yet"
            elif fraction < SCHEDULE_END:
                yield (
                    f"at equal FLOPs {info.name} is read at {fraction:.0%} of its run, before its learning rate has "
                    "decayed, which makes it look worse than a run of that length"
                )


def conclusion(sides: Sequence[Side], results: dict[str, Comparison | None]) -> str:
    """Return how the sides differ, in one sentence."""
    a, b = (side.name for side in sides)
    parts = []
    for axis, result in results.items():
        if result is None:
            continue
        i = result.interval
        better, size, ends = (b, -i.difference, (-i.high, -i.low)) if i.difference < 0 else (a, i.difference, i[1:3])
        if i.is_significant:
            parts.append(f"at equal {axis} {better} is better by {size:.4f} ({ends[0]:.4f} to {ends[1]:.4f})")
        else:
            numbers = f"{i.difference:+.4f}, {i.low:+.4f} to {i.high:+.4f}"
            parts.append(f"at equal {axis} there is no significant difference ({numbers})")
    if not parts:
        return f"{a} and {b} cannot be compared: their curves do not overlap."
    return f"In bits per byte, {'; '.join(parts)}."


def coverage(sides: Sequence[Side], unit: str, count: int) -> str:
    """Return what the interval covers, in one sentence."""
    runs = [len(side.runs) for side in sides]
    text = f"the choice of validation text ({count:,} {unit}, paired)"
    if max(runs) == 1:
        return f"The interval covers {text}, not what another seed would change: for that, name several runs a side."
    assumption = "" if min(runs) > 1 else ", the single run assumed to vary as the others do"
    return f"The interval covers {text} and the seeds ({runs[0]} and {runs[1]} runs{assumption})."


def plot(folder: Path, sides: Sequence[Side], results: dict[str, Comparison | None]) -> None:
    """Plot the curves over FLOPs and over time, and their difference."""
    names = [side.name for side in sides]
    differences: dict[str, Curve] = {}
    for axis, result in results.items():
        curves = {info.name: curve(info, axis) for side in sides for info in side.runs}
        title = f"{names[0]} and {names[1]}: validation over {axis}"
        file = folder / f"bpb_{axis.lower()}.svg"
        plots.line_chart(file, curves, title=title, x_label=AXES[axis], y_label="bits per byte", log_x=axis == "FLOPs")
        if result is not None:
            xs, ys = difference_curve(sides, axis, result.limit)
            differences[f"at equal {axis}"] = ([100 * x / result.limit for x in xs], ys)
    if differences:
        start = min([100.0, *(x for xs, _ in differences.values() for x in xs)])
        differences["none"] = ([start, 100.0], [0.0, 0.0])
        title = f"{names[1]} minus {names[0]}, below zero where {names[1]} is better"
        x_label = "percent of the FLOPs, or the time, of the shorter run"
        plots.line_chart(folder / "difference.svg", differences, title=title, x_label=x_label, y_label="bits per byte")


def difference_curve(sides: Sequence[Side], axis: str, limit: float) -> Curve:
    """Return the difference between the sides' mean curves from where both start up to the limit."""
    curves = [[curve(info, axis) for info in side.runs] for side in sides]
    start = max(xs[0] for side_curves in curves for xs, _ in side_curves)
    points = np.geomspace(start, limit, 60).tolist() if start < limit else []
    interpolate = eval.significance.interpolate_log
    values = [[[interpolate(xs, ys, x) or math.nan for xs, ys in group] for x in points] for group in curves]
    return points, [float(np.mean(b) - np.mean(a)) for a, b in zip(*values)]
