"""bench_train's what=gpu: check, time and profile everything that needs a GPU, on one GPU in under nine minutes.

    python launch.py --experiment=bench_train --set what=gpu                                    # all of it
    python launch.py --experiment=bench_train --set what=gpu --set gpu.sections=limits,train --set gpu.depths=12
    python launch.py --experiment=bench_train --set what=gpu --set device=cpu --set gpu.depths=1 ...   # dry run on CPU

Sections, the most important first: limits (matmul, fp8 matmul, copy), check (pytest -m gpu, gradients, loss in fp8),
train (steps of depth 20, 24 and 12 in bf16 and fp8 at the largest batch that fits: tokens/s, MFU, compile seconds, peak
memory beside the planner's; at depth 20 a profile by kernel, idle gaps and host synchronizations), attention (every
kernel by window and heads), linear (bf16 against fp8 with quantization). Every number is printed with its prediction.

Results are appended to bench_gpu.jsonl, with trace_*.json.gz (for perfetto) and pytest.txt beside it. The work is done
in a child process: a unit that hangs, crashes or takes too long is stopped and reported, and the rest continues. What
did not fit into the time is listed at the end, with the command that runs it.
"""

import dataclasses
import functools
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments import _bench, _gpu_sections, _jobs, bench_train
from experiments._gpu_sections import Bench, first_line
from experiments.bench_train import Config
from nanochat import config as configs
from nanochat import jsonl
from nanochat.config import UserError, base_dir
from nanochat.distributed import GIB, Runtime

# Section -> (time limit, and the least time to start it with), in seconds.
SECONDS = {"limits": (45, 10), "check": (130, 45), "train": (150, 60), "attention": (100, 25), "linear": (60, 20)}
TARGET_MFU, TARGET_FP8 = 0.60, 1.15
PER_RUN = ("gpu.sections", "gpu.depths", "gpu.deadline", "gpu.units")  # not part of the command for the rest


def run(config: Config, runtime: Runtime) -> None:
    """Supervise the child processes, or do the work of one."""
    if runtime.device.type != "cuda" and config.device != "cpu":
        raise UserError("what=gpu needs a CUDA device, and there is none; --set device=cpu is a dry run")
    if runtime.world_size > 1:
        raise UserError("what=gpu measures one GPU: start it without --nproc_per_node; what=scaling measures several")
    if wrong := [name for name in config.gpu.sections if name not in SECONDS]:
        raise UserError(f"gpu.sections={wrong[0]}: expected some of {', '.join(SECONDS)}")
    if config.gpu.units:
        return work(config, runtime)
    folder = Path(config.gpu.out or os.environ.get("OUT") or base_dir() / "runs" / "bench_gpu")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * config.gpu.minutes
    config = dataclasses.replace(config, gpu=dataclasses.replace(config.gpu, out=str(folder), deadline=deadline))
    supervise(config, folder)
    summarize(config, folder)


def units_of(config: Config) -> list[str]:
    """Return the names of all units of work, the most important first."""
    units = []
    for section in (name for name in SECONDS if name in config.gpu.sections):
        if section == "train":
            units += [f"train:{depth}:{kind}" for depth in config.gpu.depths for kind in config.gpu.linears]
        else:
            units.append(section)
    return units


# The parent process


def supervise(config: Config, folder: Path) -> None:
    """Start child processes that do the units of work, until all are done or the time is up."""
    todo, log = units_of(config), folder / "bench_gpu.jsonl"
    write(log, event="run", units=todo, torch=torch.__version__, settings=changed_settings(config))
    print(f"{len(todo)} units of work in at most {config.gpu.minutes:g} minutes; results: {log}", flush=True)
    start = len(read(log))
    while todo and time.time() < config.gpu.deadline - 5:
        command = _jobs.launch_command("bench_train", changed_settings(config) | {"gpu.units": todo})
        process = subprocess.Popen(command, start_new_session=True)
        try:
            problem = watch(process, log, start, config.gpu.deadline)
        finally:
            _jobs.stop_process(process)
        rows = read(log)[start:]
        started = [row["unit"] for row in rows if row["event"] in ("start", "skipped")]
        if not started:
            write(log, event="failed", unit=todo[0], problem=problem or "its process did not start")
            print(f"FAILED: {problem or 'the child process did not start'}", flush=True)
            return
        if problem and started[-1] not in [row["unit"] for row in rows if row["event"] == "end"]:
            write(log, event="failed", unit=started[-1], problem=problem)
            print(f"{started[-1]} FAILED: {problem}", flush=True)
        todo = [unit for unit in todo if unit not in started]


def watch(process: subprocess.Popen, log: Path, start: int, deadline: float) -> str:
    """Wait for a child process; return "" if it exits with 0, else why it failed or has to be stopped."""
    while process.poll() is None:
        time.sleep(0.2)
        starts = [row for row in read(log)[start:] if row["event"] == "start"]
        limit = min(starts[-1]["stop_at"] if starts else deadline, deadline)
        if time.time() > limit + 2:
            return "stopped: the total time is up" if limit == deadline else "stopped: it took too long"
    return _jobs.describe_exit(process.returncode) if process.returncode else ""


def changed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the defaults, by dotted name."""
    usual = dict(configs.flatten(Config()))
    return {name: value for name, value in configs.flatten(config) if value != usual[name]}


def write(log: Path, **row: Any) -> None:
    jsonl.append(log, {"time": time.time(), **row})


def read(log: Path) -> list[dict[str, Any]]:
    return [row for _, row in jsonl.read(log, missing_ok=True, drop_partial=True)]


# The child process


def work(config: Config, runtime: Runtime) -> None:
    """Do the units of work one after the other, as long as there is time."""
    folder = Path(config.gpu.out or ".")
    log = folder / "bench_gpu.jsonl"
    size, copy_bytes = config.gpu.matmul_size, config.gpu.copy_bytes
    limits = functools.cache(lambda: _bench.limits(runtime.device, runtime.compute_dtype, size, copy_bytes))
    for unit in config.gpu.units:
        section, *arguments = unit.split(":")
        most, least = SECONDS[section]
        left = config.gpu.deadline - time.time()
        if left < least:
            write(log, event="skipped", unit=unit, problem=f"skipped: {left:.0f} s left, it needs at least {least}")
            print(f"== {unit}: skipped, {left:.0f} s left", flush=True)
            continue
        begin = time.time()
        stop_at = min(begin + most, config.gpu.deadline)
        write(log, event="start", unit=unit, stop_at=stop_at)
        print(f"== {unit} (at most {stop_at - begin:.0f} s; {left:.0f} s left)", flush=True)
        report = functools.partial(write, log, event="result", unit=unit)
        bench = Bench(config, runtime, folder, report, limits, lambda stop_at=stop_at: stop_at - time.time())
        problem = attempt(functools.partial(_gpu_sections.SECTIONS[section], bench, *arguments))
        write(log, event="end", unit=unit, seconds=time.time() - begin, problem=problem)
        print(f"   {unit}: {f'FAILED: {problem}' if problem else 'done'} in {time.time() - begin:.0f} s", flush=True)
        if problem and "CUDA error" in problem:
            raise SystemExit(1)  # this process can no longer use the GPU: another one does the rest
        _gpu_sections.release(bench)


def attempt(f: Callable[[], None]) -> str | None:
    """Call `f`; return its exception in a line, or None."""
    try:
        f()
    except Exception as error:  # a section that fails must not stop the others
        where = ""
        if not isinstance(error, UserError) and error.__traceback__:
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        return f"{type(error).__name__}: {first_line(error)[:200]}{where}"
    return None


# Summary


def summarize(config: Config, folder: Path) -> None:
    """Print the steps in a table, missed targets, what failed or was skipped, and what to do next."""
    rows = read(folder / "bench_gpu.jsonl")
    rows = rows[max(i for i, row in enumerate(rows) if row["event"] == "run") + 1 :]
    results = [row for row in rows if row["event"] == "result"]
    steps = {(row["depth"], row["linear"]): row for row in results if row.get("what") == "step"}
    accumulated = {(row["depth"], row["linear"]): row for row in results if row.get("what") == "accumulated"}
    if steps:
        print("\ntraining steps (MFU of the 16-bit peak; accumulated: with the micro-batches of pretraining)")
        table_rows = [
            bench_train.derived(row)
            | {
                "accumulated_mfu": accumulated.get(key, {}).get("mfu"),
                "step_over_prediction": row["step_seconds"] / row["predicted_seconds"],
                "planned_gib": row["planned_bytes"] / GIB,
            }
            for key, row in steps.items()
        ]
        print(bench_train.results_table(table_rows, ("depth", "precision", "rows"), bench_train.GPU_COLUMNS))
    for (depth, kind), row in steps.items() if config.device != "cpu" else ():
        mfu = max(row["mfu"], accumulated.get((depth, kind), row)["mfu"])
        if kind == "dense":
            print(f"  depth {depth} {row['precision']}: MFU {mfu:.1%}, target {TARGET_MFU:.0%}: "
                  f"{target_verdict(mfu, TARGET_MFU)}")  # fmt: skip
        elif (depth, "dense") in steps:
            ratio = row["tokens_per_second"] / steps[depth, "dense"]["tokens_per_second"]
            print(f"  depth {depth}: fp8 is {ratio:.2f} x dense, target {TARGET_FP8}: "
                  f"{target_verdict(ratio, TARGET_FP8)}")  # fmt: skip
    for row in rows:
        if row["event"] in ("failed", "skipped", "end") and row.get("problem"):
            print(f"  {row['unit']}: {row['problem']}")
    print(f"results: {folder}/bench_gpu.jsonl ({len(results)} rows); {bench_train.NOTE}")
    done = {row["unit"] for row in rows if row["event"] == "end" and not row["problem"]}
    if missing := [unit for unit in units_of(config) if unit not in done]:
        print(f"not done: {', '.join(missing)}; next: {command_for(config, missing)}")


def target_verdict(value: float, target: float) -> str:
    return "reached" if value >= target else f"MISSED by {1 - value / target:.0%}"


def command_for(config: Config, units: list[str]) -> str:
    """Return the command that does these units of work."""
    sections = list(dict.fromkeys(unit.split(":")[0] for unit in units))
    depths = list(dict.fromkeys(unit.split(":")[1] for unit in units if unit.startswith("train:")))
    settings = {name: value for name, value in changed_settings(config).items() if name not in PER_RUN}
    settings |= {"gpu.sections": sections} | ({"gpu.depths": depths} if depths else {})
    return " ".join(["python launch.py --experiment=bench_train", *_jobs.set_flags(settings)])
