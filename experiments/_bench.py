"""Measure training steps: their time, the limits of the machine, and the roofline that follows from both.

Every timing synchronizes the device before and after, and nowhere in between. Alternatives are timed in turns.
"""

import dataclasses
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from experiments import _trace
from nanochat import checkpoint, distributed, model, optim, train
from nanochat.checkpoint import Pretrained
from nanochat.data import Tokenizer
from nanochat.distributed import GIB, Runtime, ShardingPlan, sharding
from nanochat.model import ModelConfig, linear
from nanochat.train import StageConfig, planner

if TYPE_CHECKING:
    from experiments.bench_data import CoreConfig
    from experiments.bench_infer import Config as InferConfig
    from experiments.bench_train import Config

Step = Callable[[], None]
MATMUL_ROWS = 32768  # of the model's own products on a GPU: more rows are no faster, and need memory


def make_train_step(config: "Config", shape: ModelConfig, runtime: Runtime) -> tuple[Step, ShardingPlan | None, str]:
    """Return a stage's training step on random tokens at a learning rate of zero, its sharding plan, its kernels."""
    settings = StageConfig(
        compile=config.compile, train=config.train, sharding=config.sharding, device_batch_size=config.batch_size or 1
    )
    sharding_plan = sharding.make_plan(settings.sharding, runtime, model.spec(shape))
    step_fn, _, kernels = train.build_step_functions(settings, shape, runtime, sharding_plan)
    params = model.init(shape, 0, device=runtime.device, dtype=runtime.compute_dtype, sharding_plan=sharding_plan)
    state = train.init(params, model.spec(shape), runtime.compute_dtype, sharding_plan)
    generator = torch.Generator().manual_seed(runtime.rank)
    batches = []
    for _ in range(config.micro_batches):
        size = (settings.rows, shape.sequence_len + 1)
        rows = torch.randint(shape.vocab_size, size, generator=generator).to(runtime.device)
        batches.append({"inputs": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()})
    rates = optim.param_group_settings(optim.OptimConfig(), shape.n_embd)
    for group in rates.values():
        group["lr"] = 0.0  # the same work, and the parameters stay what they are
    hparams = optim.as_hparams(rates)

    def step() -> None:
        nonlocal state
        state, _ = step_fn(state, batches, hparams)

    return step, sharding_plan, kernels


def precision(config: "Config", runtime: Runtime) -> str:
    """Return bf16, fp16, fp32 or fp8: the precision of the large matrix products."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return "fp8" if config.train.linear == "fp8" else names[runtime.compute_dtype]


def measure(config: "Config", shape: ModelConfig, runtime: Runtime) -> None:
    """Measure a resolved configuration; print what it is, the numbers, a profile, and one JSON line."""
    tokens = (config.batch_size or 1) * shape.sequence_len * config.micro_batches * runtime.world_size
    flops = model.flops_per_token(shape)
    step, sharding_plan, kernels = make_train_step(config, shape, runtime)
    print(f"depth {shape.n_layer}, width {shape.n_embd}, {model.count(shape)['total']:,} parameters")
    micro = f" x {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    print(f"{flops / 1e6:.4g} MFLOP per token, batch {config.batch_size} x {shape.sequence_len} tokens{micro}")
    print(f"{device_name(runtime)}, {runtime.compute_dtype}, {kernels}, compile={config.compile}", flush=True)
    if sharding_plan:
        mesh = f"{sharding_plan.replicas} x {sharding_plan.shards}"
        print(f"{runtime.world_size} ranks, {sharding_plan.mode}: mesh of {mesh}")
    compile_seconds = timed(step, runtime) + timed(step, runtime)
    print(f"first two steps, with compilation: {compile_seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "ranks": runtime.world_size,
        "mode": sharding_plan.mode if sharding_plan else "single",
        "precision": precision(config, runtime),
        "attention": kernels,
        "compile_seconds": compile_seconds,
    }
    if config.rounds:
        # Before the operands of the matmuls.
        peak_memory_bytes = distributed.all_reduce_max(distributed.peak_memory_bytes(runtime.device))
        seconds, squares, products = alternate(config, shape, step, runtime)
        limit, limit_from = distributed.peak_flops(runtime.device, runtime.compute_dtype)
        speed = flops * tokens / seconds / runtime.world_size
        result |= {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "model_flops_per_second": speed,
            "seconds_of_its_matmuls_alone": products,
            "share_of_step_for_its_matmuls": products / seconds,
            "mfu": speed / limit,
            "mfu_limit": limit_from,
            "peak_memory_bytes": peak_memory_bytes,
        }
        for size, value in squares.items():  # the largest is the last
            square = 2 * size**3 / value
            result |= {f"matmul_{size}_flops_per_second": square, f"share_of_matmul_{size}": speed / square}
            result["share_of_largest_matmul"] = speed / square
    if config.profile and config.rounds and sharding_plan:
        result |= communication(config, shape, step, sharding_plan, runtime)
    elif config.profile and config.rounds:
        result |= predictions(config, shape, runtime)
    for key, value in result.items():
        print(f"  {key:32}{value:.4g}" if isinstance(value, float) else f"  {key:32}{value}")
    report = {"bench": "train", **dataclasses.asdict(config)}
    if config.profile and config.rounds:
        print(json.dumps(report | result), flush=True)  # if profiling fails, it is kept
        path = Path(config.trace) if config.trace else None
        result |= _trace.print_profile(step, runtime, result["step_seconds"], path)
    print(json.dumps(report | result))


def device_name(runtime: Runtime) -> str:
    return torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else runtime.device.type


def describe_machine(runtime: Runtime) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = cpu if runtime.device.type == "cpu" else device_name(runtime)
    return f"{name}, torch {torch.__version__}, {str(runtime.compute_dtype).removeprefix('torch.')}"


def load_model(
    config: "CoreConfig | InferConfig", runtime: Runtime, make_tokenizer: Callable[[], Tokenizer]
) -> Pretrained:
    """Set the number of threads; return the trained model, or one of random weights."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.run is not None:
        loaded = checkpoint.load(config.run, device=runtime.device, dtype=runtime.compute_dtype)
        print(checkpoint.describe_model(loaded))
        return loaded
    tokenizer = make_tokenizer()
    shape = model.from_depth(config.depth, vocab_size=tokenizer.vocab_size, sequence_len=config.sequence_len)
    params = model.init(shape, 0, device=runtime.device, dtype=runtime.compute_dtype)
    return Pretrained(params, shape, tokenizer, name="random weights", step=0, stage="base", folder=Path())


def alternate(
    config: "Config", shape: ModelConfig, step: Step, runtime: Runtime
) -> tuple[float, dict[int, float], float]:
    """Return median seconds of a step, of square matmuls by size, and of the model's own matmuls, timed in turns."""
    cuda = runtime.device.type == "cuda"
    sizes = (256,) if config.dry_run else (2048, 8192) if cuda else (2048,)
    pairs = {n: [torch.randn(n, n, device=runtime.device).to(runtime.compute_dtype) for _ in range(2)] for n in sizes}
    tokens = (config.batch_size or 1) * shape.sequence_len * config.micro_batches
    rows = min(tokens, MATMUL_ROWS) if cuda else tokens
    own = matmuls(shape, rows, runtime)
    steps, products, squares = [], [], {n: [] for n in sizes}
    for _ in range(config.rounds):
        for n, (a, b) in pairs.items():
            squares[n] += [timed(functools.partial(torch.matmul, a, b), runtime) for _ in range(5)]
        steps += [timed(step, runtime) for _ in range(config.steps_per_round)]
        products.append(timed(own, runtime) * tokens / rows)
    medians = {n: statistics.median(seconds) for n, seconds in squares.items()}
    return statistics.median(steps), medians, statistics.median(products[1:] or products)


def communication(
    config: "Config", shape: ModelConfig, step: Step, sharding_plan: ShardingPlan, runtime: Runtime
) -> dict[str, Any]:
    """Return the time of a profiled step in collectives, and the bytes that this rank sent beside the expected."""
    trace = _trace.trace(step, runtime, shapes=True)
    seconds, exposed_seconds = _trace.communication(trace)
    numbers: dict[str, Any] = {
        "profiled_step_seconds": trace.seconds,
        "communication_seconds": seconds,
        "communication_exposed_seconds": exposed_seconds,
        "communication_share": seconds / trace.seconds,
        "communication_exposed_share": exposed_seconds / trace.seconds,
    }
    try:
        numbers["sent_bytes"] = sum(_trace.sent_bytes(trace, sharding_plan).values())
    except LookupError as error:
        print(f"bytes sent: unknown ({error})")
    if sharding_plan.full or (config.compile and sharding_plan.gather == "layer"):  # what the planner's figures are of
        setup = planner.Setup(sharding_plan.mode, runtime.world_size, sharding_plan.shards, runtime.compute_dtype)
        expected = planner.traffic(shape, setup, micro_batches=config.micro_batches)
        numbers["sent_bytes_expected"] = sum(expected.values())
    return numbers


def predictions(config: "Config", shape: ModelConfig, runtime: Runtime) -> dict[str, float]:
    """Print and return the least time of a step by the roofline, and the memory by the planner."""
    rows, fp8 = config.batch_size or 1, config.train.linear == "fp8"
    reached = limits(runtime.device, runtime.compute_dtype)
    parts = roofline(shape, rows, reached, runtime.compute_dtype, fp8, config.micro_batches)
    setup = planner.Setup(dtype=runtime.compute_dtype, fp8=fp8, chunk_tokens=config.train.chunk_tokens or 8192)
    planned = planner.memory(shape, setup, rows=rows, micro_batches=config.micro_batches).allocated
    texts = [f"{name} {1e3 * seconds:.1f} ms" for name, seconds in parts.items() if seconds]
    print(f"at least, by the limits of the machine: {', '.join(texts)}; planned memory: {planned / GIB:.2f} GiB")
    return {"predicted_seconds": sum(parts.values()), "planned_bytes": planned}


# Time


def timed(f: Callable[[], Any], runtime: Runtime) -> float:
    """Return the seconds of one call, device work included; all ranks start together."""
    distributed.synchronize(runtime.device)
    if runtime.world_size > 1:
        distributed.barrier()
    start = time.perf_counter()
    f()
    distributed.synchronize(runtime.device)
    return time.perf_counter() - start


def best_seconds(f: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call; the first try may compile, and on a GPU the calls of a try run back to back."""
    return distributed.time_best(f, device, tries=5, repeat=1 if device.type == "cpu" else 5)


def matmuls(shape: ModelConfig, tokens: int, runtime: Runtime) -> Callable[[], None]:
    """Return a function that computes only a micro-batch's dense products: forward and both gradients."""
    rows = [row.shape for row in model.spec(shape).values() if row.matmul and min(row.shape) >= 64]
    sizes = {size: rows.count(size) for size in set(rows)}
    rand = functools.partial(torch.randn, device=runtime.device, dtype=runtime.compute_dtype)
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
    """Measured FLOP/s of large products in the compute dtype and in fp8, and bytes/s of a copy."""

    matmul: float
    fp8: float | None
    copy: float


@functools.cache
def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure large square products, and a copy; bytes read and written both count."""
    size, copy_bytes = (1024, 2**29) if device.type == "cpu" else (8192, 2**32)
    tensors = [torch.randn(size, size, device=device) for _ in range(2)]
    a, b = (x.to(dtype) for x in tensors)
    source = torch.empty(copy_bytes // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    fp8 = None
    if linear.fp8_support(device) == "native":
        x, y = (linear.quantize(t, torch.float8_e4m3fn) for t in tensors)
        scaled: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        options = {"scale_a": x.scale, "scale_b": y.scale, "out_dtype": dtype, "use_fast_accum": True}
        fp8 = 2 * size**3 / best_seconds(lambda: scaled(x.values, y.values.t(), **options), device)
    matmul = 2 * size**3 / best_seconds(lambda: a @ b, device)
    return Limits(matmul, fp8, 2 * source.numel() / best_seconds(lambda: target.copy_(source), device))


def roofline(
    shape: ModelConfig, rows: int, limits: Limits, dtype: torch.dtype, fp8: bool, micro_batches: int = 1
) -> dict[str, float]:
    """Return the least seconds of each part of a step in one process, at the measured limits.

    Products and attention are counted in FLOPs; quantization, elementwise work and the optimizer in bytes that fused
    kernels have to move: 132·C a token and layer for norms, rotation, relu² and residuals, forward and backward; 8 a
    logit. Attention counts visible keys only: 4 FLOPs a key and channel forward, 2.5 times that backward.
    """
    length, width = shape.sequence_len, shape.n_embd
    tokens = rows * length
    products = quantize = muon = optimizer = 0.0
    for row in model.spec(shape).values():
        numel = math.prod(row.shape)
        if row.matmul:
            in_fp8 = fp8 and linear.fp8_fits(tokens, torch.empty(row.shape, device="meta"))
            products += 6 * numel * tokens / (limits.fp8 if in_fp8 and limits.fp8 else limits.matmul)
            # Read twice, written once, and once more transposed: activations, gradients, weights.
            quantize += (7 * tokens * sum(row.shape) + 11 * numel) / limits.copy if in_fp8 else 0
        if row.group == optim.MATRIX:
            long, short = max(row.shape), min(row.shape)
            muon += len(optim.POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3) / limits.matmul
            optimizer += 60 * numel / limits.copy  # stacks, momenta, five passes in 16 bits
        else:
            optimizer += (3 * model.storage_dtype(row, dtype).itemsize + 16) * numel / limits.copy
    keys = sum(min(w, length) - min(w, length) ** 2 / (2 * length) for w in shape.windows)  # mean over positions
    elementwise = tokens * (132 * width * shape.n_layer * dtype.itemsize / 2 + 8 * shape.vocab_size)
    return {
        "products": micro_batches * products,
        "quantize": micro_batches * quantize,
        "attention": micro_batches * 14 * width * keys * tokens / limits.matmul,
        "muon": muon,
        "optimizer": optimizer,
        "elementwise": micro_batches * elementwise / limits.copy,
    }
