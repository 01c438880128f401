"""Check, time and profile everything that needs a GPU, on one GPU in under nine minutes.

    torchrun launch.py --experiment=bench_gpu                                    # all of it
    torchrun launch.py --experiment=bench_gpu --set sections=limits,train --set depths=12
    torchrun launch.py --experiment=bench_gpu --set device=cpu --set depths=1 …  # goes through the motions

Sections, in the order of importance: limits (matmul, fp8 matmul, copy), check (pytest -m gpu, gradients, loss in fp8),
train (steps of depth 20, 24 and 12 in bf16 and fp8 at the largest batch that fits: tokens/s, MFU, compile seconds, peak
memory against the plan; a profile by kernel, idle gaps and synchronisations of the host at depth 20), attention (every
kernel by window and heads), linear (bf16 against fp8 with quantising). Beside each number stands its prediction.

Results go to bench_gpu.jsonl as they come, with trace_*.json.gz (for perfetto) and pytest.txt, in --set out=<folder>,
else $OUT, else runs/bench_gpu under the base folder. The work is done in a process of its own: what hangs, crashes or
takes too long is stopped, said, and the rest goes on. What did not fit into the time is said, with the command for it.
"""

import dataclasses
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments import _bench, _gpu_bench, _gpu_checks, _gpu_kernels, _gpu_train
from experiments._bench import format_cli_value as text
from experiments._gpu_bench import Bench, Config
from experiments.bench_train import ROOT
from nanochat import config as configs
from nanochat.config import UserError, base_dir
from nanochat.distributed import Runtime

# Seconds: after which a unit of work is stopped, and below which it is not begun.
SECONDS = {"limits": (45, 10), "check": (130, 45), "train": (150, 60), "attention": (100, 25), "linear": (60, 20)}
TARGET_MFU, TARGET_FP8 = 0.60, 1.15
DROPPED = ("sections", "depths", "deadline", "units")  # of the settings, for the command that does the rest


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, here: Runtime) -> None:
    """Supervise the work, or do it in the process that was started for it."""
    if here.device.type != "cuda" and config.device != "cpu":
        raise UserError("bench_gpu needs a CUDA device, and there is none; --set device=cpu goes through the motions")
    if here.world_size > 1:
        raise UserError("bench_gpu measures one GPU: start it without --nproc_per_node; bench_scale measures several")
    if wrong := [name for name in config.sections if name not in SECONDS]:
        raise UserError(f"sections={wrong[0]}: expected some of {', '.join(SECONDS)}")
    if config.units:
        return work(config, here)
    folder = Path(config.out or os.environ.get("OUT") or base_dir() / "runs" / "bench_gpu")
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, out=str(folder), deadline=time.time() + 60 * config.minutes)
    supervise(config, folder)
    summarise(config, folder)


def units_of(config: Config) -> list[str]:
    """Return the names of all units of work, the most important first."""
    units = []
    for section in (name for name in SECONDS if name in config.sections):
        if section == "train":
            units += [f"train:{depth}:{kind}" for depth in config.depths for kind in config.linears]
        else:
            units.append(section)
    return units


# The process that supervises


def supervise(config: Config, folder: Path) -> None:
    """Start processes that do the units of work, until all are done or the time is over."""
    todo, log = units_of(config), folder / "bench_gpu.jsonl"
    write(log, event="run", units=todo, torch=torch.__version__, settings=settings_of(config))
    print(f"{len(todo)} units of work in at most {config.minutes:g} minutes; results: {log}", flush=True)
    begun = len(read(log))
    while todo and time.time() < config.deadline - 5:
        command = _bench.launch_command(ROOT / "launch.py", "bench_gpu", settings_of(config) | {"units": todo}, 1)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            problem = watch(process, log, begun, config.deadline)
        finally:
            _bench.stop_process(process)
        seen = [row["unit"] for row in read(log)[begun:] if row["event"] in ("start", "skipped")]
        if not seen:
            write(log, event="failed", unit=todo[0], problem=problem or "its process did not start")
            print(f"FAILED: {problem or 'the process that measures did not start'}", flush=True)
            return
        ended = [row["unit"] for row in read(log)[begun:] if row["event"] == "end"]
        if problem and seen[-1] not in ended:  # or it has told of it itself
            write(log, event="failed", unit=seen[-1], problem=problem)
            print(f"{seen[-1]} FAILED: {problem}", flush=True)
        todo = [unit for unit in todo if unit not in seen]


def watch(process: subprocess.Popen, log: Path, begun: int, deadline: float) -> str:
    """Wait for a process that works; return "" when it has ended well, else why it did not or is to be stopped."""
    while process.poll() is None:
        time.sleep(0.2)
        starts = [row for row in read(log)[begun:] if row["event"] == "start"]
        limit = min(starts[-1]["stop_at"] if starts else deadline, deadline)
        if time.time() > limit + 2:
            return "stopped: the time for all is over" if limit == deadline else "stopped: it took too long"
    code = process.returncode
    return "" if code == 0 else f"killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that are not the defaults, by dotted name."""
    plain = dict(configs.flatten(Config()))
    return {name: value for name, value in configs.flatten(config) if value != plain[name]}


def write(log: Path, **row: Any) -> None:
    """Append a row to the results."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), **row}) + "\n")


def read(log: Path) -> list[dict[str, Any]]:
    """Return all rows of the results; a last line that is being written is left out."""
    data = log.read_text("utf-8") if log.exists() else ""
    return [json.loads(line) for line in data[: data.rfind("\n") + 1].splitlines()]


# The process that works


def work(config: Config, here: Runtime) -> None:
    """Do the units of work one after the other, as long as there is time."""
    folder = Path(config.out or ".")
    log = folder / "bench_gpu.jsonl"
    limits = functools.lru_cache(maxsize=1)(
        lambda: _bench.limits(here.device, here.compute_dtype, config.matmul_size, config.copy_bytes)
    )
    for unit in config.units:
        section, *arguments = unit.split(":")
        most, least = SECONDS[section]
        left = config.deadline - time.time()
        if left < least:
            write(
                log, event="skipped", unit=unit, problem=f"{left:.0f} s were left, it is not begun with under {least}"
            )
            print(f"== {unit}: skipped, {left:.0f} s are left", flush=True)
            continue
        begin = time.time()
        stop_at = min(begin + most, config.deadline)
        write(log, event="start", unit=unit, stop_at=stop_at)
        print(f"== {unit} (at most {stop_at - begin:.0f} s; {left:.0f} s left)", flush=True)
        report = functools.partial(write, log, event="result", unit=unit)
        bench = Bench(config, here, folder, report, limits, lambda stop_at=stop_at: stop_at - time.time())
        problem = attempt(functools.partial(SECTIONS[section], bench, *arguments))
        write(log, event="end", unit=unit, seconds=time.time() - begin, problem=problem)
        print(f"   {unit}: {f'FAILED: {problem}' if problem else 'done'} in {time.time() - begin:.0f} s", flush=True)
        if problem and "CUDA error" in problem:
            raise SystemExit(1)  # this process can no longer use the GPU: another one does the rest
        _gpu_bench.tidy(bench)


def attempt(f: Callable[[], None]) -> str | None:
    """Call `f`; return what went wrong in a line, or None."""
    try:
        f()
    except Exception as error:  # a section that fails must not take the others with it
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        place = ""
        if not isinstance(error, UserError) and error.__traceback__:
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        return f"{type(error).__name__}: {lines[0][:200]}{place}"
    return None


SECTIONS: dict[str, Callable[..., None]] = {
    "limits": _gpu_bench.limits,
    "check": _gpu_checks.check,
    "train": lambda bench, depth, kind: _gpu_train.train_step(bench, int(depth), kind),
    "attention": _gpu_kernels.attention_kernels,
    "linear": _gpu_kernels.linear_layers,
}


# What came out


def summarise(config: Config, folder: Path) -> None:
    """Print the steps in a table, what missed its aim, what failed or was not done, and what to do next."""
    rows = read(folder / "bench_gpu.jsonl")
    last = max(i for i, row in enumerate(rows) if row["event"] == "run")
    rows = rows[last + 1 :]
    results = [row for row in rows if row["event"] == "result"]
    steps = {(row["depth"], row["linear"]): row for row in results if row.get("what") == "step"}
    more = {(row["depth"], row["linear"]): row for row in results if row.get("what") == "accumulated"}
    header = ["depth", "precision", "rows", "tokens/s", "MFU", "accumulated", "x predicted", "peak GiB", "planned"]
    cells = [[*header, "compile s"]]
    for key, row in steps.items():
        cells.append(
            [
                str(row["depth"]),
                row["precision"],
                str(row["rows"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{more[key]['mfu']:.1%}" if key in more else "-",
                f"{row['step_seconds'] / row['predicted_seconds']:.2f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['planned_bytes'] / 2**30:.2f}",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    if steps:
        print("\ntraining steps (MFU of the 16-bit limit; accumulated: with the micro-batches of pretraining)")
        print(_bench.table(cells))
    for (depth, kind), row in steps.items() if config.device != "cpu" else ():
        best = max(row["mfu"], more.get((depth, kind), row)["mfu"])
        if kind == "dense":
            print(
                f"  depth {depth} {row['precision']}: MFU {best:.1%}, aim {TARGET_MFU:.0%}: {verdict(best, TARGET_MFU)}"
            )
        elif (depth, "dense") in steps:
            ratio = row["tokens_per_second"] / steps[depth, "dense"]["tokens_per_second"]
            print(f"  depth {depth}: fp8 is {ratio:.2f} x dense, aim {TARGET_FP8}: {verdict(ratio, TARGET_FP8)}")
    ended = {row["unit"] for row in rows if row["event"] == "end" and not row["problem"]}
    for row in rows:
        if row["event"] in ("failed", "skipped", "end") and row.get("problem"):
            print(f"  {row['unit']}: {row['problem']}")
    missing = [unit for unit in units_of(config) if unit not in ended]
    print(f"results: {folder}/bench_gpu.jsonl ({len(results)} rows); note them, with date, machine and commit, in "
          "experiments/RESULTS.md, and where a number missed its prediction, why")  # fmt: skip
    if missing:
        print(f"not done: {', '.join(missing)}; next: {again(config, missing)}")


def verdict(value: float, aim: float) -> str:
    """Return whether a number reached its aim."""
    return "reached" if value >= aim else f"MISSED by {1 - value / aim:.0%}"


def again(config: Config, missing: list[str]) -> str:
    """Return the command that does what is missing."""
    sections = list(dict.fromkeys(unit.split(":")[0] for unit in missing))
    depths = list(dict.fromkeys(unit.split(":")[1] for unit in missing if unit.startswith("train:")))
    kept = {name: value for name, value in settings_of(config).items() if name not in DROPPED}
    values = kept | {"sections": sections} | ({"depths": depths} if depths else {})
    return " ".join(["torchrun launch.py --experiment=bench_gpu", *(f"--set {n}={text(v)}" for n, v in values.items())])
