"""bench_train's what=gpu: units of work in subprocesses; and what=kernels, which is one of them."""

import dataclasses
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import _bench, _jobs, bench_train
from experiments.bench_train import Config
from nanochat import jsonl
from nanochat.config import UserError, base_dir
from nanochat.distributed import Runtime, hardware
from nanochat.model import attention, linear
from nanochat.train import planner

LEAST_SECONDS = 30  # a unit is not started with less time left
MEMORY_SHARE = 0.9  # of the free memory that a planned batch may take: one that fails costs a compilation
TARGET_MFU, TARGET_FP8 = 0.60, 1.15
COLUMNS = ("tokens/s", "MFU", "x predicted", "peak GiB", "planned GiB", "compile s")
# Bytes/s of the data sheets.
BANDWIDTH = {"NVIDIA B200": 8e12, "NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.0e12}


def run(config: Config, runtime: Runtime) -> None:
    """Run the units one after the other while there is time; print and keep what each gives, and a closing table."""
    if runtime.device.type != "cuda" and config.device != "cpu":
        raise UserError("what=gpu needs a CUDA device, and there is none; --set device=cpu is a dry run")
    names = unit_names(config)
    folder = Path(config.gpu.out or os.environ.get("OUT") or base_dir() / "runs" / "bench_gpu")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "bench_gpu.jsonl"
    print(f"{len(names)} units in at most {config.gpu.minutes:g} minutes; results: {log}", flush=True)
    results: dict[str, _jobs.RunResult] = {}
    end = time.monotonic() + 60 * config.gpu.minutes
    for name in names:
        for command in commands(config, runtime, name, folder):
            start = time.monotonic()
            seconds = min(end - start, config.gpu.unit_seconds)
            if seconds < LEAST_SECONDS:
                break
            print(f"\n== {name}, at most {seconds:.0f} s: {shlex.join(command[1:])}", flush=True)
            outcome = _jobs.run_subprocess(command, seconds=seconds, log=folder / f"{name.replace(':', '_')}.txt")
            results[name] = outcome
            row = {"time": time.time(), "torch": torch.__version__, "unit": name, "command": command}
            row |= {"seconds": time.monotonic() - start, "error": outcome.error, "last_lines": outcome.lines[-3:]}
            jsonl.append(log, row | {"result": outcome.result})
            print("\n".join(outcome.lines))
            print(f"== {name}: {outcome.error or 'done'} ({row['seconds']:.0f} s)", flush=True)
            if "OutOfMemoryError" not in outcome.error:
                break
    summarize(config, names, results)


def unit_names(config: Config) -> list[str]:
    """Return the names of the chosen units, the most important first."""
    first, *others = config.gpu.depths
    names = ["tests", f"train:{first}:dense", f"train:{first}:fp8", f"kernels:{first}"]
    names += [f"train:{depth}:{kind}" for depth in others for kind in ("dense", "fp8")] + [f"decode:{first}"]
    chosen = {unit: [name for name in names if f"{name}:".startswith(f"{unit}:")] for unit in config.gpu.units or names}
    if wrong := [unit for unit, matches in chosen.items() if not matches]:
        raise UserError(f"gpu.units={wrong[0]}: expected some of {', '.join(names)}, or their beginnings")
    return [name for name in names if any(name in matches for matches in chosen.values())]


def commands(config: Config, runtime: Runtime, name: str, folder: Path) -> list[list[str]]:
    """Return the command of a unit, and those to try in turn if it runs out of memory."""
    kind, *rest = name.split(":")
    if kind == "tests":
        tests = str(_jobs.ROOT / config.gpu.tests)
        return [[sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "-vv", tests]]
    given, depth = bench_train.changed_settings(config), int(rest[0])
    shape = bench_train.resolve(dataclasses.replace(config, depth=depth))[1]
    if kind == "kernels":
        return [_jobs.launch_command("bench_train", given | {"what": "kernels", "depth": depth})]
    if kind == "decode":
        given = {name: value for name, value in given.items() if name in ("device", "dtype", "compile", "rounds")}
        given |= {"depth": depth, "vocab_size": shape.vocab_size, "sequence_len": shape.sequence_len}
        return [_jobs.launch_command("bench_infer", given | {"batches": (1, 32)})]
    given = {"rounds": 2, "steps_per_round": 3, "trace": folder / f"trace_{depth}_{rest[1]}.json.gz"} | given
    given |= {"depth": depth, "train.linear": rest[1]}
    setup = planner.Setup(dtype=runtime.compute_dtype, fp8=rest[1] == "fp8")
    cuda, least = runtime.device.type == "cuda", min(config.gpu.batches)
    room = MEMORY_SHARE * torch.cuda.mem_get_info(runtime.device)[0] if cuda else 0
    trials = []
    for rows in sorted(config.gpu.batches, reverse=True):
        micro_batches = max(config.gpu.step_tokens // (rows * shape.sequence_len), 1)
        planned = planner.memory(shape, setup, rows=rows, micro_batches=micro_batches).allocated
        if planned < room or rows == least:
            trials.append(given | {"batch_size": rows, "micro_batches": micro_batches})
    return [_jobs.launch_command("bench_train", settings) for settings in trials]


def summarize(config: Config, names: list[str], results: Mapping[str, _jobs.RunResult]) -> None:
    """Print the steps in a table, missed targets, what failed, and the command for what is not done."""
    steps = {name: outcome.result for name, outcome in results.items() if name.startswith("train") and outcome.result}
    if steps:
        print("\ntraining steps (MFU of the 16-bit peak)")
        print(bench_train.results_table([*steps.values()], ("depth", "precision", "batch_size"), COLUMNS))
    for name, result in steps.items() if config.device != "cpu" else ():
        dense = steps.get(name.replace("fp8", "dense"))
        if result is dense:
            print(f"  {name}: MFU {result['mfu']:.1%}, {verdict(result['mfu'], TARGET_MFU)}")
        elif dense:
            ratio = result["tokens_per_second"] / dense["tokens_per_second"]
            print(f"  {name}: {ratio:.2f} x dense, {verdict(ratio, TARGET_FP8)}")
    for name, outcome in results.items():
        if outcome.error:
            print(f"  {name} failed: {outcome.error}")
    print(bench_train.NOTE)
    if missing := [name for name in names if name not in results or results[name].error]:
        gpu = dict(bench_train.changed_settings(config, "gpu"), **{"gpu.units": missing})
        command = _jobs.launch_command("bench_train", {"what": "gpu"} | bench_train.changed_settings(config) | gpu)
        print(f"not done: {', '.join(missing)}; next: python launch.py {shlex.join(command[2:])}")


def verdict(value: float, target: float) -> str:
    return f"target {target:g}: {'reached' if value >= target else f'MISSED by {1 - value / target:.0%}'}"


def measure_kernels(config: Config, runtime: Runtime) -> None:
    """Measure what the machine reaches, linear layers with quantization, and attention kernels."""
    config, shape = bench_train.resolve(config)
    device, dtype, tokens = runtime.device, runtime.compute_dtype, (config.batch_size or 1) * shape.sequence_len
    reached, gpu = _bench.limits(device, dtype), hardware.gpu_spec(_bench.device_name(runtime))
    sheet = {"matmul": gpu and gpu.half_flops, "fp8": gpu and gpu.fp8_flops, "copy": gpu and BANDWIDTH.get(gpu.device)}
    print(f"{_bench.describe_machine(runtime)}; a large product usually reaches 80% of the data sheet, a copy 90%")
    for what, value in reached._asdict().items():
        share = f" ({value / sheet[what]:.0%} of the data sheet)" if value and sheet[what] else ""
        unit = "TB/s" if what == "copy" else "TFLOP/s"
        print(f"  {what:8} " + (f"{value / 1e12:.4g} {unit}{share}" if value else "none: no float8 products here"))
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
