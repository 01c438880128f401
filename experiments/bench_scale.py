"""Measure how training scales over ranks: the same work on more of them, and more work on more of them.

    torchrun launch.py --experiment=bench_scale --set depth=20                     # all GPUs of this machine
    torchrun launch.py --experiment=bench_scale --set ranks=1,2 --set modes=zero2,fsdp        # on the CPU, over gloo

It starts jobs of 1, 2, 4, … ranks itself (bench_train, each of its own), so start it on one process. Weak scaling:
every rank has one micro-batch. Strong scaling: the tokens of a step stay those of the largest job, and fewer ranks
accumulate over more micro-batches, as pretraining does. On the CPU all jobs have the same threads a rank: the cores,
shared by the largest job. Count one to three minutes for every mode and number of ranks. Prints a table (tokens/s,
efficiency against one rank, bytes on the wire of a step measured and expected, share of the step in communication) and
one JSON line.
"""

import dataclasses
import json
import os
from typing import Any

import torch

from experiments import _bench, bench_train
from nanochat.config import UserError
from nanochat.distributed import Runtime
from nanochat.text import format_count
from nanochat.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What to scale, and how far.

    Attributes:
        ranks: of the jobs; none: 1, 2, 4, … up to the GPUs of this machine, or its cores. modes: of sharding.
        weak, strong: which of the two to measure.
        depth, width, head_dim, vocab_size, sequence_len, batch_size, window_pattern, rounds, steps_per_round, compile,
            device, dtype, train, job_seconds: as for bench_train.
    """

    ranks: tuple[int, ...] = ()
    modes: tuple[str, ...] = ("replicate", "zero2", "fsdp")
    weak: bool = True
    strong: bool = True
    depth: int | None = None
    width: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    sequence_len: int | None = None
    batch_size: int | None = None
    window_pattern: str | None = None
    rounds: int = 3
    steps_per_round: int = 4
    compile: bool = True
    device: str = "auto"
    dtype: str = "auto"
    train: TrainConfig = TrainConfig()
    job_seconds: int = 900

    def __post_init__(self) -> None:
        if wrong := [n for n in self.ranks if n < 1]:
            raise UserError(f"ranks={wrong[0]}: must be at least 1")
        if not (self.weak or self.strong):
            raise UserError("weak=false and strong=false: nothing is left to measure")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: must be at least 1")


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, here: Runtime) -> None:
    """Start the jobs, and print how they compare."""
    if here.world_size > 1:
        raise UserError("bench_scale starts its jobs itself: start it without --nproc_per_node")
    sizes = ranks_of(config, here)
    shared = {f.name for f in dataclasses.fields(bench_train.Config)} & {f.name for f in dataclasses.fields(Config)}
    base = bench_train.Config(**{name: getattr(config, name) for name in shared - {"modes"}})
    bench_train.resolve(base)  # an impossible shape is said before any job
    threads = {} if here.device.type == "cuda" else {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // sizes[-1], 1))}
    print(f"jobs of {', '.join(map(str, sizes))} ranks on {here.device.type}" + (f", {threads}" if threads else ""))
    kinds = ["weak"] * config.weak + ["strong"] * config.strong
    done: dict[tuple[str, int, int], dict[str, Any]] = {}
    rows = []
    for kind in kinds:
        for mode in config.modes:
            for n in sizes:
                micro_batches = 1 if kind == "weak" else sizes[-1] // n
                key = (mode if n > 1 else "single", n, micro_batches)  # one rank has nothing to share: measured once
                if key not in done:
                    done[key] = measured(base, *key, threads)
                rows.append({"kind": kind, "mode": mode, **done[key]})
                print(f"  {kind}, {mode}, {n} ranks: {summary(done[key])}", flush=True)
    for row in rows:
        one = next(r for r in rows if (r["kind"], r["mode"]) == (row["kind"], row["mode"]))
        if "tokens_per_second" in row and "tokens_per_second" in one:
            each, first = row["tokens_per_second"] / row["ranks"], one["tokens_per_second"] / one["ranks"]
            row["efficiency"] = each / first
    print(_bench.table([HEADER, *(cells(row) for row in rows)]))
    print(f"efficiency: tokens/s of a rank against a job of {sizes[0]}; wire: bytes that one rank sends in a step")
    print("note what is worth keeping, with date, machine and commit, in experiments/RESULTS.md")
    print(json.dumps({"bench": "scale", **dataclasses.asdict(config), "ranks": sizes, "results": rows}))


def ranks_of(config: Config, here: Runtime) -> list[int]:
    """Return the numbers of ranks to measure, ascending.

    Raises:
        UserError: there are not so many GPUs, or for strong scaling one does not divide the largest.
    """
    most = torch.cuda.device_count() if here.device.type == "cuda" else os.cpu_count() or 1
    sizes = sorted(set(config.ranks)) or [2**i for i in range(most.bit_length()) if 2**i <= most]
    if here.device.type == "cuda" and sizes[-1] > most:
        raise UserError(f"ranks={sizes[-1]}: this machine has {most} GPUs")
    if config.strong and (odd := [n for n in sizes if sizes[-1] % n]):
        raise UserError(f"ranks={odd[0]}: must divide {sizes[-1]}, or set strong=false")
    return sizes


def measured(
    base: bench_train.Config, mode: str, ranks: int, micro_batches: int, threads: dict[str, str]
) -> dict[str, Any]:
    """Return what a job of so many ranks measured, or its problem."""
    changes: dict[str, Any] = {"micro_batches": micro_batches}
    if ranks > 1:
        changes["sharding.mode"] = mode
    outcome = bench_train.start(base, changes, ranks, threads)
    names = ("tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "sent_bytes", "sent_bytes_expected")
    names += ("communication_share", "communication_exposed_share")
    found = {name: outcome.result[name] for name in names if name in outcome.result} if outcome.result else {}
    problem = {"problem": outcome.problem} if outcome.problem else {}
    return {"ranks": ranks, "micro_batches": micro_batches, **found, **problem}


HEADER = ["scaling", "mode", "ranks", "micro-batches", "tokens/s", "efficiency", "wire", "expected"]
HEADER += ["communication", "exposed", "peak GiB"]


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table; dashes where there is nothing."""

    def text(key: str, form: str, scale: float = 1) -> str:
        return format(row[key] * scale, form) if key in row else "-"

    wire = [f"{format_count(row[name])}B" if name in row else "-" for name in ("sent_bytes", "sent_bytes_expected")]
    return [
        row["kind"],
        row["mode"],
        str(row["ranks"]),
        str(row["micro_batches"]),
        text("tokens_per_second", ",.0f"),
        text("efficiency", ".1%"),
        *wire,
        text("communication_share", ".1%"),
        text("communication_exposed_share", ".1%"),
        text("peak_memory_bytes", ".2f", 2**-30),
    ]


def summary(row: dict[str, Any]) -> str:
    """Return a result as a line of progress."""
    return row.get("problem") or f"{format_count(row['tokens_per_second'])} tokens/s"
