"""Compare two pretraining runs: bits per byte at equal FLOPs and at equal time, each with a confidence interval.

    python launch.py --experiment=compare d12 d12_muon
    torchrun --nproc_per_node=8 launch.py --experiment=compare a1,a2,a3 'b*'       # several seeds on a side

Both are evaluated on the same pieces of validation text: the rows of their own evaluations where tokenizer, context and
data agree, else documents, cut to what fits into every context. The interval is that of the paired differences, so it
covers which text happens to validate. How much another seed would change is covered if there are two runs or more on a
side (the same settings, another seed), and only then.

FLOPs and time are those of the shortest of the runs; a longer one is read off its curve there, in the middle of its
learning-rate schedule, which is said. Time is that of the steps, by each run's median step, on the machine it ran on.
Prints a table and a sentence; draws the curves and their difference into compare/<a>_<b> under the base folder. Takes
as long as an evaluation of each run.
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
from nanochat.config import UsageError, UserError, base_dir
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.metrics import plots
from nanochat.text import format_duration

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.data import Tokenizer
    from nanochat.distributed import ControlGroup, Runtime
    from nanochat.eval import Interval
    from nanochat.metrics import Curve, RunInfo

    Batches = Generator[dict[str, Tensor], None, None]

BATCH_TOKENS = 2**14
AXES = {"FLOPs": "training FLOPs", "time": "training time in minutes"}
SHORT_OF_ITS_END = 0.97  # of a run: before that, its learning rate is still well above its last


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    Attributes:
        args: the two sides, given as words: a run's name, several with commas between them, or a pattern with *.
        tokens: of validation text; none: as many as the runs' own evaluations.
        source: of documents, where rows cannot be the same; none: the first run's.
        device, dtype: auto, or as in `runtime.create`.
    """

    args: tuple[str, ...] = ()
    tokens: int | None = None
    source: str | None = None
    device: str = "auto"
    dtype: str = "auto"


class Side(NamedTuple):
    """One of the two: its runs, the steps of their checkpoints that are measured, and what was measured.

    Attributes:
        name: as it is shown. records: one a seed. steps: one of each record.
        nats: (pieces,) of each record, once they are measured.
    """

    name: str
    records: list[RunInfo]
    steps: list[int]
    nats: list[np.ndarray]


class Found(NamedTuple):
    """The comparison along one axis: where, the bits per byte of each run there, their difference."""

    limit: float
    values: tuple[list[float], list[float]]
    interval: Interval


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Find the runs, measure them on the same text, and say how they differ."""
    if len(config.args) != 2:
        raise UsageError("compare takes two words, the runs: python launch.py --experiment=compare <a> <b>")
    line = distributed.create_group()
    with distributed.raise_on_any_failure(line):
        sides = [side(word) for word in config.args]
        meant = [one for side in sides for one in side.records]
        limits = {axis: min(curve(one, axis)[0][-1] for one in meant) for axis in AXES}
        steps = [[measured_step(one, limits["FLOPs"]) for one in side.records] for side in sides]
    sides = [side._replace(steps=chosen) for side, chosen in zip(sides, steps)]
    print("\n".join(described(sides)), flush=True)
    pieces, sizes, sides = measure(config, runtime, sides, line)
    found = {axis: compared(sides, sizes, axis, limit) for axis, limit in limits.items()}
    print(f"\n{table(sides, found)}\n")
    print("\n".join(f"note: {note}" for note in notes(sides, limits["FLOPs"])))
    print(f"{verdict(sides, found)}\n{covered(sides, pieces, len(sizes))}")
    if runtime.is_main:
        folder = base_dir() / "compare" / re.sub(r"[^\w.,-]+", "-", f"{sides[0].name}_{sides[1].name}")
        draw(folder, sides, found)
        print(f"curves and their difference: {folder}")


# The runs


def side(word: str) -> Side:
    """Return the runs that a word names. Raises: UserError: none, or one that is no pretraining run with a curve."""
    folders = []
    for name in word.split(","):
        if "*" in name:
            matching = sorted(p for p in checkpoint.runs_folder().glob(name) if (p / metrics.logger.FILE).exists())
            if not matching:
                raise UserError(f"{name}: matches no run in {checkpoint.runs_folder()}")
            folders += matching
        elif name:
            folders.append(metrics.run_folder.find_run(name))
    records = [metrics.run_folder.read_run(folder) for folder in folders]
    if not records:
        raise UsageError(f"{word!r}: names no run")
    for one in records:
        if one.stage != "base":
            raise UserError(f"run {one.name} is of stage {one.stage}: compare is for pretraining runs")
        if not one.steps:
            raise UserError(f"run {one.name} has no checkpoint yet")
        if not metrics.logger.curve(one.rows, "val/bpb")[0]:
            raise UserError(f"run {one.name} has no evaluation in its metrics.jsonl: it has no curve to compare")
    return Side(word, records, [], [])


def curve(one: RunInfo, axis: str) -> Curve:
    """Return (FLOPs or minutes, bits per byte) of a run's evaluations."""
    steps, values = metrics.logger.curve(one.rows, "val/bpb")
    each = metrics.run_folder.step_flops(one) if axis == "FLOPs" else (metrics.run_folder.step_seconds(one) or 0.0) / 60
    if not each:
        raise UserError(f"run {one.name}: its metrics.jsonl does not tell the {axis} of a step")
    return [each * step for step in steps], values


def measured_step(one: RunInfo, flops: float) -> int:
    """Return the checkpoint next to so many FLOPs, of those that lie on the run's curve."""
    xs, _ = curve(one, "FLOPs")
    each = metrics.run_folder.step_flops(one) or 1.0
    there = [step for step in one.steps if xs[0] <= each * step <= xs[-1]]
    if not there:
        raise UserError(f"run {one.name} has no checkpoint of after its first evaluation")
    return min(there, key=lambda step: abs(each * step - flops))


def described(sides: Sequence[Side]) -> Iterator[str]:
    """Yield lines that say what is compared, and in which settings the two differ."""
    for side in sides:
        for one, step in zip(side.records, side.steps):
            flops = metrics.run_folder.step_flops(one) or math.nan
            yield f"{one.name}: checkpoint of step {step:,} of {one.last_step:,}, {flops:.3g} FLOPs a step"
    a, b = (flat(side.records[0]) for side in sides)
    changed = [name for name in a if name in b and a[name] != b[name] and name not in ("name", "seed", "resume")]
    yield "settings that differ: " + (", ".join(f"{n} {a[n]} → {b[n]}" for n in changed) or "none but name and seed")


def flat(one: RunInfo) -> dict[str, Any]:
    """Return a run's settings by dotted name."""
    return dict(one.meta.get("config", {}))


# The measurement


def measure(
    config: Config, runtime: Runtime, sides: Sequence[Side], line: ControlGroup
) -> tuple[str, np.ndarray, list[Side]]:
    """Return (what the pieces are, their bytes, the sides with the nats of each run on each piece)."""
    every = [(one, step) for side in sides for one, step in zip(side.records, side.steps)]
    with distributed.raise_on_any_failure(line):
        toks = [tokenizer_of(one, step) for one, step in every]
        identities = [identity(one, tok) for (one, _), tok in zip(every, toks)]
        first = every[0][0]
        tokens = config.tokens or first.settings.get("eval", {}).get("tokens") or 2**20
        rows = config.source is None and all(other == identities[0] for other in identities)
        texts = [] if rows else documents(config, every, toks, tokens)
    import torch

    sizes, nats = np.zeros(0), []
    for (one, step), tok in zip(every, toks):
        with distributed.raise_on_any_failure(line):
            bot = checkpoint.load(one.folder, step=step, device=runtime.device, dtype=runtime.compute_dtype)
        context = bot.config.sequence_len
        batches = as_rows(one, tok, tokens, context, runtime) if rows else as_batches(texts, tok, context, runtime)
        found: list[Any] = []
        token_bytes = torch.from_numpy(tokenizer.token_bytes(tok)).to(runtime.device)
        compute = model.Compute(dtype=runtime.compute_dtype)
        with contextlib.closing(batches):
            for number, batch in enumerate(
                batches
            ):  # every rank reads all of them: the same rows on any number of ranks
                if number % runtime.world_size == runtime.rank:
                    found += [
                        [number, eval.significance.piece_nats(bot.params, [batch], token_bytes, bot.config, compute)]
                    ]
        whole = sorted(itertools.chain.from_iterable(distributed.all_gather_object(line, found)))
        pairs = np.array([pair for _, part in whole for pair in part], np.float64)
        if len(sizes) and not np.array_equal(pairs[:, 1], sizes):
            raise UserError(f"run {one.name} was measured on other text: did the validation data change meanwhile?")
        sizes = pairs[:, 1]
        nats.append(pairs[:, 0])
        print(f"{one.name}: {pairs[:, 0].sum() / math.log(2) / sizes.sum():.4f} bits per byte", flush=True)
    rest = iter(nats)
    return "rows" if rows else "documents", sizes, [s._replace(nats=[next(rest) for _ in s.records]) for s in sides]


def tokenizer_of(one: RunInfo, step: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint."""
    path = one.folder / "checkpoints" / str(step)
    files = checkpoint.check_files(path, checkpoint.read_header(path)["files"])
    return tokenizer.load(files[tokenizer.TOKENS_FILE].parent)


def identity(one: RunInfo, tok: Tokenizer) -> list[Any]:
    """Return what the validation rows of a run follow from."""
    data = data_config(one)
    assert one.shape is not None
    return [tok.fingerprint, one.shape.sequence_len, data.source, data.text_column, data.buffer_docs]


def data_config(one: RunInfo) -> DataConfig:
    """Return the data settings of a run."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: x for name, x in one.settings.get("data", {}).items() if name in known})


def as_rows(one: RunInfo, tok: Tokenizer, tokens: int, context: int, runtime: Runtime) -> Batches:
    """Yield the packed rows of the validation data, as the run's own evaluation reads them."""
    total = max(tokens // context, 2)
    size = next(n for n in range(max(min(BATCH_TOKENS // context, total), 1), 0, -1) if total % n == 0)
    stream = data.loader.batches(
        data_config(one), tok, split="val", rows_per_step=size, sequence_len=context, seed=0, device=runtime.device
    )
    with contextlib.closing(stream):
        yield from (batch for batch, *_ in itertools.islice(stream, total // size))


def documents(
    config: Config, every: Sequence[tuple[RunInfo, int]], toks: Sequence[Tokenizer], tokens: int
) -> list[str]:
    """Return documents of the validation data, each cut to what fits into every run's context."""
    data = data_config(every[0][0])
    data = dataclasses.replace(data, source=config.source) if config.source else data
    contexts = [one.shape.sequence_len for one, _ in every if one.shape]
    sizes = [tokenizer.token_bytes(tok) for tok in toks]
    texts, read = [], 0
    for text in sources.texts(data, "val"):
        whole = text.encode()
        ids = [tok.encode(text)[:context] for tok, context in zip(toks, contexts)]
        end = min(int(size[i].sum()) for size, i in zip(sizes, ids))
        while (cut := whole[:end].decode(errors="ignore")) and any(
            len(tok.encode(cut)) > context for tok, context in zip(toks, contexts)
        ):
            end -= 8  # the end of a text may take more tokens than the same bytes within it
        if cut:
            texts.append(cut)
            read += len(ids[0])
        if read >= tokens:
            break
    if len(texts) < 2:
        raise UserError(f"data.source={data.source}: has fewer than two documents to validate on")
    return texts


def as_batches(texts: Sequence[str], tok: Tokenizer, context: int, runtime: Runtime) -> Batches:
    """Yield documents as rows of their own, after <|bos|>, padded to the context."""
    import torch

    size = max(BATCH_TOKENS // context, 1)
    for start in range(0, len(texts), size):
        rows = [[tok.bos, *tok.encode(text)] for text in texts[start : start + size]]
        inputs, targets = torch.full((len(rows), context), tok.bos), torch.full((len(rows), context), -1)
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1], targets[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        yield {"inputs": inputs.to(runtime.device), "targets": targets.to(runtime.device)}


# What follows from it


def compared(sides: Sequence[Side], sizes: np.ndarray, axis: str, limit: float) -> Found | None:
    """Return the comparison at `limit` of an axis, or None where a run's first evaluation comes after it.

    A run's value is what was measured at its checkpoint, moved along its own curve from there to the limit.
    """
    values: tuple[list[float], list[float]] = ([], [])
    for side, found in zip(sides, values):
        for one, step, nats in zip(side.records, side.steps, side.nats):
            xs, ys = curve(one, axis)
            evaluated = metrics.logger.curve(one.rows, "val/bpb")[0]
            here, there = eval.significance.at(xs, ys, limit), eval.significance.at(evaluated, ys, step)
            if here is None or there is None:
                return None
            found.append(float(nats.sum() / math.log(2) / sizes.sum()) + here - there)
    means = [np.mean(side.nats, axis=0) for side in sides]
    _, error = eval.significance.paired(means[0], means[1], sizes)
    return Found(limit, values, eval.significance.interval(*values, error, len(sizes)))


def shown(axis: str, limit: float) -> str:
    """Return a place on an axis as text."""
    return f"{limit:.3g} FLOPs" if axis == "FLOPs" else format_duration(60 * limit)


def table(sides: Sequence[Side], found: dict[str, Found | None]) -> str:
    """Return the comparison as a table."""
    names = [side.name for side in sides]
    width = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'at equal':<22}{names[0]:>{width}}{names[1]:>{width}}{'difference':>13}   95% interval"]
    for axis, one in found.items():
        if one is None:
            lines.append(f"{axis:<22}{'-':>{width}}{'-':>{width}}{'-':>13}   no common place on the curves")
            continue
        a, b = (float(np.mean(values)) for values in one.values)
        place, i = f"{axis}: {shown(axis, one.limit).removesuffix(' FLOPs')}", one.interval
        lines.append(f"{place:<22}{a:>{width}.4f}{b:>{width}.4f}{i.difference:>+13.4f}   {i.low:+.4f} to {i.high:+.4f}")
    return "\n".join(lines)


def notes(sides: Sequence[Side], limit: float) -> Iterator[str]:
    """Yield what a reader of the table has to know about these runs."""
    for side in sides:
        settings = [{n: x for n, x in flat(one).items() if n not in ("name", "seed")} for one in side.records]
        if any(other != settings[0] for other in settings):
            names = sorted({n for other in settings for n in other if other[n] != settings[0].get(n)})
            yield f"the runs of {side.name} differ in more than their seed ({', '.join(names)})"
        for one in side.records:
            share = limit / ((metrics.run_folder.step_flops(one) or 1.0) * one.last_step)
            if not one.done:
                yield f"{one.name} is not finished: its learning rate has yet to come down"
            elif share < SHORT_OF_ITS_END:
                yield (
                    f"at equal FLOPs {one.name} is read at {share:.0%} of its run, before its learning rate has come "
                    "down, which makes it look worse than a run of that length"
                )


def verdict(sides: Sequence[Side], found: dict[str, Found | None]) -> str:
    """Return how they differ, in one sentence."""
    a, b = (side.name for side in sides)
    parts = []
    for axis, one in found.items():
        if one is None:
            continue
        i = one.interval
        better, size, ends = (b, -i.difference, (-i.high, -i.low)) if i.difference < 0 else (a, i.difference, i[1:3])
        if i.told:
            parts.append(f"at equal {axis} {better} is better by {size:.4f} ({ends[0]:.4f} to {ends[1]:.4f})")
        else:
            parts.append(
                f"at equal {axis} no difference can be told ({i.difference:+.4f}, {i.low:+.4f} to {i.high:+.4f})"
            )
    if not parts:
        return f"{a} and {b} cannot be compared: their curves have no place in common."
    text = "; ".join(parts)
    return f"In bits per byte, {text}."


def covered(sides: Sequence[Side], pieces: str, count: int) -> str:
    """Return what the interval is of, in one sentence."""
    runs = [len(side.records) for side in sides]
    of = f"the choice of validation text ({count:,} {pieces}, paired)"
    if max(runs) == 1:
        return f"The interval covers {of}, not what another seed would change: for that, name several runs a side."
    how = "" if min(runs) > 1 else ", the single run taken to vary as the others do"
    return f"The interval covers {of} and the seeds ({runs[0]} and {runs[1]} runs{how})."


def draw(folder: Path, sides: Sequence[Side], found: dict[str, Found | None]) -> None:
    """Draw the curves over FLOPs and over time, and the difference along the runs."""
    names = [side.name for side in sides]
    gaps: dict[str, Curve] = {}
    for axis, result in found.items():
        curves = {one.name: curve(one, axis) for side in sides for one in side.records}
        title = f"{names[0]} and {names[1]}: validation over {axis}"
        file = folder / f"bpb_{axis.lower()}.svg"
        plots.line_chart(file, curves, title=title, x_label=AXES[axis], y_label="bits per byte", log_x=axis == "FLOPs")
        if result is not None:
            xs, differences = gap(sides, axis, result.limit)
            gaps[f"at equal {axis}"] = ([100 * x / result.limit for x in xs], differences)
    if gaps:
        gaps["none"] = ([min([100.0, *(x for xs, _ in gaps.values() for x in xs)]), 100.0], [0.0, 0.0])
        title = f"{names[1]} less {names[0]}, below zero where {names[1]} is better"
        x_label = "percent of the FLOPs, or the time, of the shorter run"
        plots.line_chart(folder / "difference.svg", gaps, title=title, x_label=x_label, y_label="bits per byte")


def gap(sides: Sequence[Side], axis: str, limit: float) -> Curve:
    """Return the difference of the sides' mean curves where both have one, up to the limit."""
    curves = [[curve(one, axis) for one in side.records] for side in sides]
    start = max(xs[0] for group in curves for xs, _ in group)
    places = np.geomspace(start, limit, 60).tolist() if start < limit else []
    found = [[[eval.significance.at(xs, ys, x) or math.nan for xs, ys in group] for x in places] for group in curves]
    return places, [float(np.mean(b) - np.mean(a)) for a, b in zip(*found)]
