"""bench_train's suite=gpu: units of work, each in a process; what=limits and what=kernels, which are two of them."""

import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments import _bench, _jobs, bench_train
from experiments.bench_train import Config
from nanochat import jsonl, model
from nanochat.config import UserError, base_dir
from nanochat.distributed import GIB, GPU_SPECS, GpuSpec, Runtime, hardware
from nanochat.metrics import report
from nanochat.model import attention, linear
from nanochat.train import planner

LEAST_SECONDS = 45  # a unit is not started with less time left
MEMORY_SHARE = 0.9  # of the free memory that a planned batch may take: one that fails costs a compilation
# What large products and copies usually reach of the data sheet, and with them all that is expected of a unit.
PRODUCTS_SHARE, COPY_SHARE = 0.8, 0.9
# Bytes/s of the data sheets.
BANDWIDTH = {"NVIDIA B200": 8e12, "NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.0e12}
DECODE_ROWS, PROMPT_TOKENS, NEW_TOKENS = (1, 8, 64), 110, 128
MEMBERS = {"depth": 4, "members": 16, "batch_size": 16, "rounds": 2, "steps_per_round": 4}
# A dry run: each path of a unit, none of its size.
TINY = {"depth": 1, "width": 128, "head_dim": 64, "vocab_size": 512, "sequence_len": 64, "compile": False}
TINY |= {"rounds": 1, "steps_per_round": 1, "dry_run": True}


class Unit(NamedTuple):
    """A piece of the suite; `commands` after the first are for when that runs out of memory."""

    name: str
    commands: list[list[str]]
    expected: dict[str, float]  # quantity, as in `measured` -> value


def run(config: Config, runtime: Runtime) -> None:
    """Run the units one after the other while there is time; write what each gives, and a table of all."""
    if runtime.device.type != "cuda" and not config.dry_run:
        raise UserError("suite=gpu needs a CUDA device, and there is none; --set dry_run=true tries it in tiny shapes")
    gpu = hardware.gpu_spec(_bench.device_name(runtime))
    gpu = gpu if gpu and gpu.device in BANDWIDTH else GPU_SPECS["h100"]
    folder = Path(config.gpu.out or os.environ.get("OUT") or base_dir() / "runs" / "bench_gpu")
    folder.mkdir(parents=True, exist_ok=True)
    units = make_units(config, runtime, gpu, folder)
    names = chosen_names(config, [unit.name for unit in units])
    place = {"machine": _bench.describe_machine(runtime), "commit": report.code(_jobs.ROOT).get("commit", "unknown")}
    log, done = folder / "bench_gpu.jsonl", {}
    earlier = [row for _, row in jsonl.read(log, missing_ok=True, drop_partial=True)]
    rows = {row["unit"]: row for row in earlier if place.items() <= row.items()}  # the last of each
    print(f"{len(names)} units in at most {config.minutes:g} minutes; results: {log}\n")
    print(as_table(units, {}, gpu, place))
    end = time.monotonic() + 60 * config.minutes
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and so stop the running unit
    try:
        for unit, command in [(u, command) for u in units if u.name in names for command in u.commands]:
            start = time.monotonic()
            seconds = min(end - start, config.gpu.unit_seconds)
            if seconds < LEAST_SECONDS or (unit.name in done and "OutOfMemoryError" not in done[unit.name]["error"]):
                continue
            print(f"\n== {unit.name}, at most {seconds:.0f} s: {shlex.join(command[1:])}", flush=True)
            output = folder / f"{unit.name.replace(':', '_')}.txt"
            if config.dry_run and unit.name != "tests":
                outcome = _jobs.run_in_process(command, runtime, output)
            else:  # tests compile many small functions
                env = {"TORCHINDUCTOR_COMPILE_THREADS": str(min(hardware.cpu_cores(), 8))}
                outcome = _jobs.run_subprocess(command, seconds=seconds, env=env, log=output)
            row = {"time": time.time(), **place, "unit": unit.name, "command": command, "error": outcome.error}
            row |= {"seconds": time.monotonic() - start, "last_lines": outcome.lines[-3:], "result": outcome.result}
            rows[unit.name] = done[unit.name] = row
            jsonl.append(log, row)
            (folder / "bench_gpu.md").write_text(as_table(units, rows, gpu, place) + "\n", "utf-8")
            print("\n".join(outcome.lines))
            print(f"== {unit.name}: {outcome.error or 'done'} ({row['seconds']:.0f} s)", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{as_table(units, rows, gpu, place)}\n")
    print("targets: an MFU of 60%, fp8 1.15 times as fast as bf16, decoding at 60% of the bandwidth")
    print(bench_train.NOTE + f"; the table is also in {folder / 'bench_gpu.md'}")
    if missing := [name for name in names if name not in done or done[name]["error"]]:
        suite = {"suite": "gpu", **bench_train.changed_settings(config), **bench_train.changed_settings(config, "gpu")}
        command = _jobs.launch_command("bench_train", suite | {"gpu.units": missing})
        print(f"not done: {', '.join(missing)}; next: python launch.py {shlex.join(command[2:])}")


def chosen_names(config: Config, names: Sequence[str]) -> list[str]:
    chosen = {unit: [name for name in names if f"{name}:".startswith(f"{unit}:")] for unit in config.gpu.units or names}
    if wrong := [unit for unit, matches in chosen.items() if not matches]:
        raise UserError(f"gpu.units={wrong[0]}: expected some of {', '.join(names)}, or their beginnings")
    return [name for name in names if any(name in matches for matches in chosen.values())]


def make_units(config: Config, runtime: Runtime, gpu: GpuSpec, folder: Path) -> list[Unit]:
    """Return all units, the most valuable first, with what the data sheet of `gpu` lets expect of each."""
    given = bench_train.changed_settings(dataclasses.replace(config, dry_run=False))
    given = (TINY if config.dry_run else {"depth": 20, "rounds": 2, "steps_per_round": 3}) | given
    shape = shape_of(given)
    products, fp8 = (PRODUCTS_SHARE * (flops or 0) for flops in (gpu.half_flops, gpu.fp8_flops))
    limits = _bench.Limits(products, fp8 or None, COPY_SHARE * BANDWIDTH[gpu.device])
    launch = functools.partial(_jobs.launch_command, "bench_train")

    def train(kernel: str, precision: str) -> Unit:
        setup = planner.Setup(dtype=torch.bfloat16, fp8=precision == "fp8")
        settings = given | {"train.attention": "sdpa" if config.dry_run else kernel}
        settings["train.linear"] = "fp8" if setup.fp8 else "dense"
        trials, auto = batch_trials(config, shape, setup, runtime), kernel == "auto"
        name = f"train:{'auto' if auto else 'named'}:{precision}"
        settings["trace"] = folder / f"trace_{name.replace(':', '_')}.json.gz"
        settings |= {"profile": False} if config.dry_run and auto else {}  # it is the same kernel
        rows, micro_batches = trials[0]["batch_size"], trials[0]["micro_batches"]
        seconds = sum(_bench.roofline(shape, rows, limits, torch.bfloat16, setup.fp8, micro_batches).values())
        speed = rows * micro_batches * shape.sequence_len / seconds
        planned = planner.memory(shape, setup, rows=rows, micro_batches=micro_batches).allocated
        expected = {"tokens/s": speed, "MFU %": 100 * speed * model.flops_per_token(shape) / gpu.half_flops}
        return Unit(name, [launch(settings | trial) for trial in trials], expected | {"peak GiB": planned / GIB})

    def tests() -> Unit:
        paths = [_jobs.ROOT / config.gpu.tests] if config.gpu.tests else sorted(_jobs.ROOT.glob("tests/**/test_*.py"))
        files = [str(path) for path in paths if config.gpu.tests or "mark.gpu" in path.read_text("utf-8")]
        options = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "-v", "--durations=15"]
        return Unit("tests", [[sys.executable, *options, *files]], {"failed": 0})

    def decode() -> Unit:
        settings = {name: value for name, value in given.items() if name in ("device", "dtype", "compile", "rounds")}
        batches, prompt, new = ((1, 2), 8, 4) if config.dry_run else (DECODE_ROWS, PROMPT_TOKENS, NEW_TOKENS)
        settings |= {"depth": shape.n_layer, "vocab_size": shape.vocab_size, "sequence_len": shape.sequence_len}
        settings |= {"batches": batches, "prompt_tokens": prompt, "new_tokens": new}
        expected = {
            f"batch {n}, tokens/s": n * limits.copy / model.decode_bytes(shape, n, prompt + new // 2, 2)
            for n in batches
        }
        expected["prefill tokens/s"] = limits.matmul / model.decode_flops(shape, shape.sequence_len // 2)
        return Unit("decode", [_jobs.launch_command("bench_infer", settings)], expected)

    def members() -> Unit:
        settings = given | ({"members": 2, "batch_size": 1} if config.dry_run else MEMBERS)
        steps = _bench.roofline(shape_of(settings), settings["batch_size"], limits, torch.bfloat16, fp8=False)
        milliseconds = 1e3 * settings["members"] * sum(steps.values())
        return Unit("members", [launch(settings | {"what": "members"})], {"ms a step of all": milliseconds})

    kernel = config.gpu.kernel
    of_limits = {"copy TB/s": limits.copy / 1e12, "16-bit TFLOP/s": limits.matmul / 1e12}
    of_limits |= {"fp8 TFLOP/s": limits.fp8 / 1e12} if limits.fp8 else {}
    return [
        tests(),
        Unit("limits", [launch(given | {"what": "limits"})], of_limits),
        train(kernel, "bf16"),
        decode(),
        train(kernel, "fp8"),
        train("auto", "bf16"),
        members(),
        train("auto", "fp8"),
        Unit("kernels", [launch(given | {"what": "kernels"})], {}),
    ]


def shape_of(settings: Mapping[str, Any]) -> model.ModelConfig:
    names = {field.name for field in dataclasses.fields(Config)}
    return bench_train.resolve(Config(**{name: value for name, value in settings.items() if name in names}))[1]


def batch_trials(config: Config, shape: Any, setup: planner.Setup, runtime: Runtime) -> list[dict[str, int]]:
    """Return batch sizes, the largest first that the planner lets fit."""
    if config.dry_run:
        return [{"batch_size": 1, "micro_batches": 2}]
    room, trials = MEMORY_SHARE * torch.cuda.mem_get_info(runtime.device)[0], []
    for rows in sorted(config.gpu.batches, reverse=True):
        micro_batches = max(config.gpu.step_tokens // (rows * shape.sequence_len), 1)
        planned = planner.memory(shape, setup, rows=rows, micro_batches=micro_batches).allocated
        if planned < room or rows == min(config.gpu.batches):
            trials.append({"batch_size": rows, "micro_batches": micro_batches})
    return trials


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a unit by quantity."""
    result, kind = row["result"] or {}, row["unit"].split(":")[0]
    if kind == "tests":
        found = re.findall(r"(\d+) (passed|failed|error)", " ".join(row["last_lines"][-1:]))
        counts = {name: int(n) for n, name in found}
        return {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0)}
    numbers: dict[str, float | None] = {}
    if kind == "limits" and result:
        names = {"copy TB/s": "copy", "16-bit TFLOP/s": "matmul", "fp8 TFLOP/s": "fp8"}
        numbers = {text: (result["limits"][name] or 0) / 1e12 or None for text, name in names.items()}
    elif kind == "train" and "mfu" in result:
        numbers = {"tokens/s": result["tokens_per_second"], "MFU %": 100 * result["mfu"]}
        numbers |= {"peak GiB": result["peak_memory_bytes"] / GIB, "first two steps, s": result["compile_seconds"]}
    elif kind == "decode":
        batches = [(name[6:], value) for name, value in result.items() if name.startswith("batch_")]
        numbers = {f"batch {n}, tokens/s": value["tokens_per_second"] for n, value in batches}
        numbers["prefill tokens/s"] = result.get("prefill", {}).get("tokens_per_second")
    elif kind == "members" and result:
        numbers = {"ms a step of all": 1e3 * result["step_seconds"]}
    return {name: value for name, value in numbers.items() if value is not None}


def as_table(units: Sequence[Unit], rows: Mapping[str, Any], gpu: GpuSpec, place: Mapping[str, str]) -> str:
    """Return what is expected of the units and what was measured, in Markdown."""
    sheet = f"{gpu.half_flops / 1e12:.0f} TFLOP/s in 16 bits and {BANDWIDTH[gpu.device] / 1e12:.3g} TB/s"
    reach = f"of which products reach {PRODUCTS_SHARE:.0%} and copies {COPY_SHARE:.0%}"
    lines = [
        f"{place['machine']}; commit {place['commit']}; {time.strftime('%Y-%m-%d')}. Expected: by the limits of an "
        f"{gpu.device}, {sheet}, {reach}.\n",
        "| unit | quantity | expected | measured | measured / expected |",
        "|---|---|--:|--:|--:|",
    ]
    for unit in units:
        got = measured(rows[unit.name]) if unit.name in rows else {}
        for quantity in {**unit.expected, **got}:
            wanted, value = unit.expected.get(quantity), got.get(quantity)
            ratio = f"{value / wanted:.2f}" if wanted and value is not None else ""
            lines.append(f"| {unit.name} | {quantity} | {number(wanted)} | {number(value)} | {ratio} |")
        if error := rows.get(unit.name, {}).get("error"):
            lines.append(f"| {unit.name} | failed: {error.replace('|', '/')} | | | |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_limits(runtime: Runtime) -> _bench.Limits:
    """Measure large products and a copy, and print them beside the data sheet."""
    reached, gpu = _bench.limits(runtime.device, runtime.compute_dtype), hardware.gpu_spec(_bench.device_name(runtime))
    sheet = {"matmul": gpu and gpu.half_flops, "fp8": gpu and gpu.fp8_flops, "copy": gpu and BANDWIDTH.get(gpu.device)}
    usual = f"a large product usually reaches {PRODUCTS_SHARE:.0%} of the data sheet, a copy {COPY_SHARE:.0%}"
    print(f"{_bench.describe_machine(runtime)}; {usual}")
    for what, value in reached._asdict().items():
        share = f" ({value / sheet[what]:.0%} of the data sheet)" if value and sheet[what] else ""
        unit = "TB/s" if what == "copy" else "TFLOP/s"
        print(f"  {what:8} " + (f"{value / 1e12:.4g} {unit}{share}" if value else "none: no float8 products here"))
    return reached


def measure_limits(config: Config, runtime: Runtime) -> None:
    print(json.dumps({"bench": "limits", "limits": print_limits(runtime)._asdict()}))


def measure_kernels(config: Config, runtime: Runtime) -> None:
    """Measure what the machine reaches, linear layers with quantization, and attention kernels."""
    config, shape = bench_train.resolve(config)
    device, dtype, tokens = runtime.device, runtime.compute_dtype, (config.batch_size or 1) * shape.sequence_len
    reached = print_limits(runtime)
    fp8, description = linear.choose("fp8", device)
    print(f"linear layers, forward and both gradients; fp8 is {description}", flush=True)
    c, products = shape.n_embd, []
    for out, width in ((c, c), (4 * c, c), (c, 4 * c), (shape.padded_vocab, c)):
        n = min(8192, tokens) if out == shape.padded_vocab else tokens  # the loss computes logits in chunks
        x, grad = (torch.randn(n, side, device=device, dtype=dtype) for side in (width, out))
        weight = torch.randn(out, width, device=device)
        layers = {"dense": linear.dense, "fp8": fp8}
        seconds = {
            name: _bench.best_seconds(three_products(layer, x, weight, grad, config.compile), device)
            for name, layer in layers.items()
        }
        flops, quantize = 6 * n * out * width, (7 * n * (out + width) + 11 * out * width) / reached.copy
        least = {"dense": flops / reached.matmul, "fp8": flops / (reached.fp8 or reached.matmul) + quantize}
        texts = [f"{name} {1e3 * t:.3f} ms (at least {1e3 * least[name]:.3f} ms)" for name, t in seconds.items()]
        print(
            f"  {n} x {width} -> {out}: {'; '.join(texts)}; fp8 is {seconds['dense'] / seconds['fp8']:.2f} x",
            flush=True,
        )
        products.append({"rows": n, "inner": width, "outer": out, "seconds": seconds, "predicted_seconds": least})
    heads = (shape.n_head, shape.n_kv_head, shape.head_dim)
    kernels = attention.choose(
        config.train.attention, shape.sequence_len, shape.windows, heads, device, dtype,
        rows=config.batch_size or 1, compile=config.compile,
    )  # fmt: skip
    print(f"attention, forward and backward: {kernels.text}")
    result = {"limits": reached._asdict(), "linear": products, "attention": kernels.text}
    print(json.dumps({"bench": "kernels", **dataclasses.asdict(config), **result}))


def three_products(layer: linear.Linear, x: Tensor, weight: Tensor, grad: Tensor, compile: bool) -> Any:
    """Return a function that computes the three products of a linear layer, as training does."""
    products = linear.matmuls(layer.__name__, len(x), weight)

    def step(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        dtype = x.dtype
        a, b, g = products.operand(x, dtype), products.operand(weight, dtype), products.grad_operand(grad, dtype)
        return [products.y(a, b, dtype), products.grad_x(g, b, dtype), products.grad_w(g, a, torch.float32)]

    return functools.partial(torch.compile(step, dynamic=False) if compile else step, x, weight, grad)
