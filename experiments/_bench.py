"""Measure training steps: their time, their kernels and collectives, the limits of the machine, the roofline.

Every timing waits for the device before and after, and nowhere in between. What is compared is measured in turns or
predicted beforehand.

Benchmarks as processes of their own: each with a time limit, its result as JSON, its failure as one line.
"""

import contextlib
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import distributed, model, optim, train
from nanochat.distributed import Layout, Runtime, sharding
from nanochat.model import ModelConfig, linear
from nanochat.train import StageConfig, TrainState

Step = Callable[[TrainState], TrainState]


class TrainStepBench(NamedTuple):
    """A training step that can be measured: it works on a fixed batch of random tokens, at a rate of zero.

    Attributes:
        step: does one whole step. many: n -> the step with n times its micro-batches, without compiling anew.
        state: to begin with; steps write into its memory.
        kernels: in words. layout: of several ranks, or None.
    """

    step: Step
    many: Callable[[int], Step]
    state: TrainState
    kernels: str
    layout: Layout | None


def make_train_step(settings: StageConfig, shape: ModelConfig, here: Runtime, micro_batches: int = 1) -> TrainStepBench:
    """Return the step that a stage with these settings would do, and a state for it.

    Raises:
        UserError: what is asked for does not run here.
    """
    layout = sharding.make_layout(settings.sharding, here, model.spec(shape))
    step_fn, _, kernels = train.build_step_functions(settings, shape, here, layout)
    params = model.init(shape, 0, device=here.device, dtype=here.compute_dtype, layout=layout)
    state = train.init(params, model.spec(shape), here.compute_dtype, layout)
    generator = torch.Generator().manual_seed(here.rank)
    batches = []
    for _ in range(micro_batches):
        size = (settings.rows, shape.sequence_len + 1)
        rows = torch.randint(shape.vocab_size, size, generator=generator).to(here.device)
        batches.append({"inputs": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()})
    rates = optim.param_group_settings(optim.OptimConfig(), shape.n_embd)
    for group in rates.values():
        group["lr"] = 0.0  # the work of a step is the same, and the numbers stay what they are on random tokens
    hparams = optim.as_hparams(rates)

    def many(n: int) -> Step:
        return lambda state: step_fn(state, batches * n, hparams)[0]

    return TrainStepBench(many(1), many, state, kernels, layout)


# Time


def timed(f: Callable[[], Any], here: Runtime) -> float:
    """Return the seconds that one call takes, the device's work included; all ranks begin together."""
    distributed.synchronize(here.device)
    if here.world_size > 1:
        distributed.barrier()
    start = time.perf_counter()
    f()
    distributed.synchronize(here.device)
    return time.perf_counter() - start


def seconds_of(fs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of each of `fs`, called in turns; each is warmed up, then called several in a row."""
    calls = {}
    for name, f in fs.items():
        f()
        once = _in_a_row(f, 1, device)
        calls[name] = max(1, min(20, int(0.02 / max(once, 1e-6))))  # or the time would be that of a launch
    found: dict[str, list[float]] = {name: [] for name in fs}
    for _ in range(rounds):
        for name, f in fs.items():
            found[name].append(_in_a_row(f, calls[name], device))
    return {name: statistics.median(values) for name, values in found.items()}


def _in_a_row(f: Callable[[], Any], calls: int, device: torch.device) -> float:
    distributed.synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            f()
        distributed.synchronize(device)
        return (time.perf_counter() - start) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        f()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 / calls


def matmuls(shape: ModelConfig, tokens: int, here: Runtime) -> Callable[[], None]:
    """Return a function that does a micro-batch's dense products and nothing else: forward and both gradients."""
    rows = [row.shape for row in model.spec(shape).values() if row.matmul and min(row.shape) >= 64]
    sizes = {size: rows.count(size) for size in set(rows)}
    rand = functools.partial(torch.randn, device=here.device, dtype=here.compute_dtype)
    operands = [
        (rand(tokens, inner), rand(outer, inner), rand(tokens, outer), n) for (outer, inner), n in sizes.items()
    ]

    def run() -> None:
        for x, weight, grad, n in operands:
            for _ in range(n):
                torch.mm(x, weight.T)
                torch.mm(grad, weight)
                torch.mm(grad.T, x)

    return run


# The machine


class Limits(NamedTuple):
    """What the machine reached: FLOP/s of large products in the compute dtype and in fp8, bytes/s of a copy."""

    matmul: float
    fp8: float | None
    copy: float


def limits(device: torch.device, dtype: torch.dtype, size: int = 8192, copy_bytes: int = 2**32) -> Limits:
    """Measure the machine: products of (size, size), and a copy of so many bytes, read and written ones counted."""
    tensors = [torch.randn(size, size, device=device) for _ in range(2)]
    a, b = (x.to(dtype) for x in tensors)
    source = torch.empty(copy_bytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    fs: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    if device.type == "cuda" and linear.fp8_support(device) == "native":
        x, y = (linear.quantise(t, torch.float8_e4m3fn) for t in tensors)
        scaled: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        how = {"scale_a": x.scale, "scale_b": y.scale, "out_dtype": dtype, "use_fast_accum": True}
        fs["fp8"] = lambda: scaled(x.values, y.values.t(), **how)
    found = seconds_of(fs, device)
    products = {name: 2 * size**3 / seconds for name, seconds in found.items() if name != "copy"}
    return Limits(products["matmul"], products.get("fp8"), 2 * source.numel() / found["copy"])


def roofline(
    shape: ModelConfig, rows: int, micro_batches: int, limits: Limits, dtype: torch.dtype, fp8: bool
) -> dict[str, float]:
    """Return the least seconds of each part of a step in one process, at the machine's measured limits.

    Products and attention are counted in FLOPs; quantising, elementwise work and the optimizer in bytes. The last three
    are what fused kernels must at least move: 132·C bytes a token and layer for norms, rotation, relu² and residuals,
    forward and backward; 8 a logit. Attention counts visible keys only: 4 FLOPs a key and channel forward, 2.5 times
    that backward.
    """
    tokens, width = rows * micro_batches * shape.sequence_len, shape.n_embd
    fast = limits.fp8 if fp8 and limits.fp8 else limits.matmul
    found: dict[str, float] = dict.fromkeys(
        ("products", "quantise", "attention", "elementwise", "muon", "optimizer"), 0.0
    )
    for row in model.spec(shape).values():
        numel = math.prod(row.shape)
        if row.matmul:
            fits = fp8 and linear.fp8_fits(rows * shape.sequence_len, torch.empty(row.shape, device="meta"))
            found["products"] += 6 * numel * tokens / (fast if fits else limits.matmul)
            # Read twice, written once and once more transposed: activations, gradients, weights.
            moved = 7 * tokens * sum(row.shape) + 11 * numel * micro_batches if fits else 0
            found["quantise"] += moved / limits.copy
        if row.group == optim.MATRIX:
            long, short = max(row.shape), min(row.shape)
            flops = len(optim.POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3)
            found["muon"] += flops / limits.matmul
            found["optimizer"] += 60 * numel / limits.copy  # stacks, momenta, five passes in 16 bits
        else:
            kept = model.storage_dtype(row, dtype).itemsize
            found["optimizer"] += (3 * kept + 16) * numel / limits.copy
    time = shape.sequence_len
    keys = sum(min(w, time) - min(w, time) ** 2 / (2 * time) for w in shape.windows)  # the mean over positions
    found["attention"] = 14 * width * keys * tokens / limits.matmul
    moved = tokens * (132 * width * shape.n_layer * dtype.itemsize / 2 + 8 * shape.vocab_size)
    found["elementwise"] = moved / limits.copy
    return found


def host_syncs(f: Callable[[], Any]) -> list[str]:
    """Return where a call makes the host wait for the GPU, one entry a time: file, line and what CUDA's mode says."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}: {str(w.message).splitlines()[0][:120]}" for w in found]


# Text


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text; the first row is the header, the first column is to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        return "  " + "  ".join([row[0].ljust(widths[0]), *cells])

    return "\n".join(line(row) for row in rows)


class RunResult(NamedTuple):
    """How a job ended: the JSON of the last line that has one, or None and one line of what went wrong."""

    result: dict[str, Any] | None
    problem: str


def run_subprocess(command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> RunResult:
    """Run a benchmark as a process of its own, so that its failure, or its memory, stays its own.

    Args:
        command: its words; torchrun's variables of this process are not passed on. seconds: after which it is stopped.
        env: variables to set beside those of this process.
    """
    ours = re.compile(r"(RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TORCHRUN_)")
    clean = {name: value for name, value in os.environ.items() if not ours.match(name)} | dict(env or {})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=clean, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop_process(process)
        file.seek(0)
        lines = file.read().splitlines()
    if code is None:
        return RunResult(None, f"stopped after {seconds:.0f} s")
    if code:
        return RunResult(
            None, _last_problem(lines) or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        )
    result = next((json.loads(line) for line in reversed(lines) if line.startswith('{"bench"')), None)
    return RunResult(result, "" if result else "it printed no result")


def stop_process(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own: kindly, then by force; its children with it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):  # what is left of its group, also after a good end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_problem(lines: Sequence[str]) -> str:
    """Return the line of a failed job's output that says why."""
    for pattern in (r"error: .+", r"(?!.*ChildFailedError)[\w.]*(Error|Exception|Exit|Interrupt)\b.*"):
        for line in lines:
            text = re.sub(r"^\[rank\d+\]:\s*", "", line).strip()
            if re.fullmatch(pattern, text):
                return text.removeprefix("error: ")[:200]
    return ""


def launch_command(launch: Path, experiment: str, values: Mapping[str, Any], ranks: int) -> list[str]:
    """Return the words that start an experiment on some ranks of this machine.

    Args:
        launch: the file launch.py. values: settings by dotted name.
    """
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(launch), f"--experiment={experiment}"]
    return words + [word for name, value in values.items() for word in ("--set", f"{name}={format_cli_value(value)}")]


def format_cli_value(value: Any) -> str:
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(format_cli_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
