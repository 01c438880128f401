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
from nanochat.config import Device, Dtype, PositiveInt, Settings, UsageError, UserError, base_dir
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.metrics import plots
from nanochat.text import format_duration, table

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime
    from nanochat.eval import Interval
    from nanochat.metrics import RunInfo

    Batches = Generator[dict[str, Tensor], None, None]

BATCH_TOKENS = 2**14
AXES = {"FLOPs": "training FLOPs", "time": "training time in minutes"}
SCHEDULE_END = 0.97  # before this fraction of a run, its learning rate is still well above the last one


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to compare.

    Attributes:
        args: the two sides as positional arguments: a run, several separated by commas, or a pattern with *.
        tokens: number of validation tokens; none: as many as the runs' own evaluations.
        source: text source of the documents, if the runs' rows differ; none: the first run's.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
    """

    args: tuple[str, ...] = ()
    tokens: PositiveInt | None = None
    source: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"


config = Config


class Run(NamedTuple):
    """One run of a side: its validation curve, and the checkpoint to measure."""

    info: RunInfo
    steps: list[float]
    bpb: list[float]
    per_step: dict[str, float]  # axis -> FLOPs or minutes
    step: int  # of the checkpoint
    nats: np.ndarray  # (pieces,) summed loss of each piece of text, once measured

    @property
    def settings(self) -> dict[str, Any]:
        return self.info.meta.get("config", {})

    @property
    def context(self) -> int:
        return self.info.meta["model"]["sequence_len"]

    @property
    def data(self) -> DataConfig:
        known = {field.name for field in dataclasses.fields(DataConfig)}
        return DataConfig(**{name: x for name, x in self.info.settings.get("data", {}).items() if name in known})

    def curve(self, axis: str) -> tuple[list[float], list[float]]:
        return [self.per_step[axis] * step for step in self.steps], self.bpb

    def bpb_at(self, axis: str, x: float) -> float | None:
        """Return the curve's value where `x` FLOPs or minutes are spent; None outside of the curve."""
        return eval.significance.interpolate_log(*self.curve(axis), x)


class Side(NamedTuple):
    """One side of the comparison: a run for each seed."""

    name: str
    runs: list[Run]


class Comparison(NamedTuple):
    limit: float  # FLOPs or minutes
    values: tuple[list[float], list[float]]  # bits per byte of each run of both sides
    interval: Interval


def run(config: Config, runtime: Runtime) -> None:
    if len(config.args) != 2:
        raise UsageError("compare takes two arguments, the runs: python launch.py --experiment=compare <a> <b>")
    with distributed.raise_on_any_failure():
        sides = [Side(text, find_runs(text)) for text in config.args]
        limits = {axis: min(run.curve(axis)[0][-1] for side in sides for run in side.runs) for axis in AXES}
        sides = [Side(name, [choose_checkpoint(run, limits["FLOPs"]) for run in runs]) for name, runs in sides]
    print("\n".join(describe(sides)), flush=True)
    unit, sizes, sides = measure(config, runtime, sides)
    results = {axis: compare(sides, sizes, axis, limit) for axis, limit in limits.items()}
    print(f"\n{format_table(sides, results)}\n")
    print("\n".join(f"note: {note}" for note in notes(sides, limits["FLOPs"])))
    print(f"{conclusion(sides, results)}\n{coverage(sides, unit, len(sizes))}")
    if runtime.is_main:
        folder = base_dir() / "compare" / re.sub(r"[^\w.,-]+", "-", f"{sides[0].name}_{sides[1].name}")[:200]
        plot(folder, sides, results)
        print(f"curves and their difference: {folder}")


# Runs


def find_runs(text: str) -> list[Run]:
    """Return the runs of one side, of which each is a pretraining run with evaluations and a checkpoint."""
    folders = []
    for name in text.split(","):
        if "*" in name:
            matching = sorted(p for p in checkpoint.runs_folder().glob(name) if (p / metrics.logger.FILE).exists())
            if not matching:
                raise UserError(f"{name}: matches no run in {checkpoint.runs_folder()}")
            folders += matching
        elif name:
            folders.append(metrics.run_folder.find_run(name))
    if not folders:
        raise UsageError(f"{text!r}: names no run")
    runs = []
    for info in map(metrics.run_folder.read_run, folders):
        if info.stage != "base":
            raise UserError(f"run {info.name} is of stage {info.stage}: compare is for pretraining runs")
        if not info.steps:
            raise UserError(f"run {info.name} has no checkpoint yet")
        steps, bpb = metrics.logger.curve(info.rows, "val/bpb")
        if not steps:
            raise UserError(f"run {info.name} has no evaluation in its metrics.jsonl, so there is no curve to compare")
        flops, seconds = metrics.run_folder.step_flops(info), metrics.run_folder.step_seconds(info)
        if not flops or not seconds:
            raise UserError(f"run {info.name}: its metrics.jsonl lacks the {'time' if flops else 'FLOPs'} of a step")
        runs.append(Run(info, steps, bpb, {"FLOPs": flops, "time": seconds / 60}, 0, np.zeros(0)))
    return runs


def choose_checkpoint(run: Run, flops: float) -> Run:
    """Return the run with the checkpoint nearest to `flops`, of those that lie on the run's curve."""
    steps = [step for step in run.info.steps if run.steps[0] <= step <= run.steps[-1]]
    if not steps:
        raise UserError(f"run {run.info.name} has no checkpoint after its first evaluation")
    return run._replace(step=min(steps, key=lambda step: abs(run.per_step["FLOPs"] * step - flops)))


def describe(sides: Sequence[Side]) -> Iterator[str]:
    """Yield lines with the checkpoints that are compared and the settings that differ."""
    for run in [run for side in sides for run in side.runs]:
        flops = f"{run.per_step['FLOPs']:.3g} FLOPs a step"
        yield f"{run.info.name}: checkpoint of step {run.step:,} of {run.info.last_step:,}, {flops}"
    a, b = (side.runs[0].settings for side in sides)
    changed = [name for name in a if name in b and a[name] != b[name] and name not in ("name", "seed", "resume")]
    yield "settings that differ: " + (", ".join(f"{n} {a[n]} → {b[n]}" for n in changed) or "none but name and seed")


# Measurement


def measure(config: Config, runtime: Runtime, sides: Sequence[Side]) -> tuple[str, np.ndarray, list[Side]]:
    """Return ("rows" or "documents", the bytes of each piece of text, the sides with their nats)."""
    runs = [run for side in sides for run in side.runs]
    with distributed.raise_on_any_failure():
        toks = [checkpoint.load_tokenizer(checkpoint.inspect(run.info.folder, run.step)) for run in runs]
        tokens = config.tokens or runs[0].info.settings.get("eval", {}).get("tokens") or 2**20
        # What packed rows depend on; they can be compared if it is the same for all runs.
        made_from = {
            (tok.fingerprint, run.context, run.data.source, run.data.text_column, run.data.buffer_docs)
            for run, tok in zip(runs, toks)
        }
        same_rows = config.source is None and len(made_from) == 1
        texts = [] if same_rows else documents(config, runs, toks, tokens)
    sizes, measured = np.zeros(0), []
    for run, tok in zip(runs, toks):
        with distributed.raise_on_any_failure():
            loaded = checkpoint.load(run.info.folder, step=run.step, device=runtime.device, dtype=runtime.compute_dtype)
        compute = model.Compute(dtype=runtime.compute_dtype)
        batches = packed_rows(run, tok, tokens, runtime) if same_rows else padded(texts, tok, run.context, runtime)
        with contextlib.closing(batches):
            # Every rank reads all batches, so the rows do not depend on the number of ranks.
            own = itertools.islice(batches, runtime.rank, None, runtime.world_size)
            by_batch = list(eval.bpb.nats_by_row(loaded.params, own, tok, loaded.config, compute))
        turns = itertools.zip_longest(*distributed.all_gather_object(by_batch), fillvalue=[])
        nats, run_sizes = np.array([row for turn in turns for rows in turn for row in rows], np.float64).T
        if len(sizes) and not np.array_equal(run_sizes, sizes):
            raise UserError(f"run {run.info.name} was measured on different text: did the validation data change?")
        sizes = run_sizes
        measured.append(run._replace(nats=nats))
        print(f"{run.info.name}: {nats.sum() / math.log(2) / sizes.sum():.4f} bits per byte", flush=True)
    n = len(sides[0].runs)
    sides = [Side(sides[0].name, measured[:n]), Side(sides[1].name, measured[n:])]
    return "rows" if same_rows else "documents", sizes, sides


def packed_rows(run: Run, tok: Tokenizer, tokens: int, runtime: Runtime) -> Batches:
    """Yield the packed rows of the validation data, as in the run's own evaluations."""
    total = max(tokens // run.context, 2)
    size = next(n for n in range(max(min(BATCH_TOKENS // run.context, total), 1), 0, -1) if total % n == 0)
    stream = data.loader.batches(
        run.data, tok, split="val", rows_per_step=size, sequence_len=run.context, seed=0, device=runtime.device
    )
    with contextlib.closing(stream):
        yield from (batch for batch, *_ in itertools.islice(stream, total // size))


def documents(config: Config, runs: Sequence[Run], toks: Sequence[Tokenizer], tokens: int) -> list[str]:
    """Return documents of the validation data, each truncated to fit into every run's context."""
    source = dataclasses.replace(runs[0].data, source=config.source or runs[0].data.source)
    contexts, sizes = [run.context for run in runs], [tokenizer.token_bytes(tok) for tok in toks]
    texts, read = [], 0
    for text in sources.texts(source, "val"):
        ids = [tok.encode(text)[:context] for tok, context in zip(toks, contexts)]
        end = min(int(size[i].sum()) for size, i in zip(sizes, ids))
        prefix = text.encode()[:end].decode(errors="ignore")
        while any(len(tok.encode(prefix)) > context for tok, context in zip(toks, contexts)):
            end -= 8  # the last bytes may take more tokens at the end of a text than within it
            prefix = text.encode()[:end].decode(errors="ignore")
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
        inputs, targets = torch.full((len(rows), context), tok.bos), torch.full((len(rows), context), model.IGNORE)
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1], targets[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        yield {"inputs": inputs.to(runtime.device), "targets": targets.to(runtime.device)}


# Results


def compare(sides: Sequence[Side], sizes: np.ndarray, axis: str, limit: float) -> Comparison | None:
    """Return the comparison at `limit` of an axis, or None if a run's first evaluation comes after it."""
    values: tuple[list[float], list[float]] = ([], [])
    for side, side_values in zip(sides, values):
        for run in side.runs:
            at_limit, at_step = run.bpb_at(axis, limit), run.bpb_at(axis, run.per_step[axis] * run.step)
            if at_limit is None or at_step is None:
                return None
            # Measured at the checkpoint, and shifted along the run's own curve from there to the limit.
            side_values.append(float(run.nats.sum() / math.log(2) / sizes.sum()) + at_limit - at_step)
    a, b = (np.mean([run.nats for run in side.runs], axis=0) for side in sides)
    _, error = eval.significance.paired_difference(a, b, sizes)
    return Comparison(limit, values, eval.significance.interval(*values, error, len(sizes)))


def format_table(sides: Sequence[Side], results: dict[str, Comparison | None]) -> str:
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
    """Yield caveats about these runs; `limit` is in FLOPs."""
    for name, runs in sides:
        first, *others = ({n: x for n, x in run.settings.items() if n not in ("name", "seed")} for run in runs)
        names = sorted({n for other in others for n in other if other[n] != first.get(n)})
        if names:
            yield f"the runs of {name} differ in more than their seed ({', '.join(names)})"
        for run in runs:
            fraction = limit / (run.per_step["FLOPs"] * run.info.last_step)
            if not run.info.done:
                yield f"{run.info.name} is not finished: its learning rate has not decayed yet"
            elif fraction < SCHEDULE_END:
                yield (
                    f"at equal FLOPs {run.info.name} is read at {fraction:.0%} of its run, before its learning rate "
                    "has decayed, which makes it look worse than a run of that length"
                )


def conclusion(sides: Sequence[Side], results: dict[str, Comparison | None]) -> str:
    a, b = (side.name for side in sides)
    parts = []
    for axis, i in [(axis, result.interval) for axis, result in results.items() if result]:
        if i.is_significant:
            low, high = sorted((abs(i.low), abs(i.high)))
            better = b if i.difference < 0 else a
            parts.append(f"at equal {axis} {better} is better by {abs(i.difference):.4f} ({low:.4f} to {high:.4f})")
        else:
            numbers = f"{i.difference:+.4f}, {i.low:+.4f} to {i.high:+.4f}"
            parts.append(f"at equal {axis} there is no significant difference ({numbers})")
    if not parts:
        return f"{a} and {b} cannot be compared: their curves do not overlap."
    return f"In bits per byte, {'; '.join(parts)}."


def coverage(sides: Sequence[Side], unit: str, count: int) -> str:
    runs = [len(side.runs) for side in sides]
    text = f"the choice of validation text ({count:,} {unit}, paired)"
    if max(runs) == 1:
        return f"The interval covers {text}, not what another seed would change: for that, name several runs a side."
    assumption = "" if min(runs) > 1 else ", the single run assumed to vary as the others do"
    return f"The interval covers {text} and the seeds ({runs[0]} and {runs[1]} runs{assumption})."


def plot(folder: Path, sides: Sequence[Side], results: dict[str, Comparison | None]) -> None:
    """Plot the curves over FLOPs and over time, and the difference between the sides' mean curves."""
    a, b = (side.name for side in sides)
    differences: dict[str, tuple[list[float], list[float]]] = {}
    for axis, result in results.items():
        curves = {run.info.name: run.curve(axis) for side in sides for run in side.runs}
        title, file = f"{a} and {b}: validation over {axis}", folder / f"bpb_{axis.lower()}.svg"
        plots.line_chart(file, curves, title=title, x_label=AXES[axis], y_label="bits per byte", log_x=axis == "FLOPs")
        if result is not None:
            start = max(xs[0] for xs, _ in curves.values())
            xs = np.geomspace(start, result.limit, 60).tolist() if start < result.limit else []
            means = [[np.mean([run.bpb_at(axis, x) or math.nan for run in side.runs]) for x in xs] for side in sides]
            change = [float(second - first) for first, second in zip(*means)]
            differences[f"at equal {axis}"] = ([100 * x / result.limit for x in xs], change)
    if differences:
        start = min([100.0, *(x for xs, _ in differences.values() for x in xs)])
        differences["none"] = ([start, 100.0], [0.0, 0.0])
        title = f"{b} minus {a}, below zero where {b} is better"
        x_label = "percent of the FLOPs, or the time, of the shorter run"
        plots.line_chart(folder / "difference.svg", differences, title=title, x_label=x_label, y_label="bits per byte")
