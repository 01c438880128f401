"""Measure the training step: tokens/s, FLOP utilisation and memory, beside the machine's matmul ceiling.

    torchrun launch.py --experiment=bench_train
    torchrun launch.py --experiment=bench_train --set depth=12 --set width=768 --set head_dim=128 \
        --set vocab_size=32768 --set sequence_len=2048 --set batch_size=32 --set window_pattern=SSSL   # one GPU

The default shape is small enough for a laptop; it takes about two minutes on two CPU cores, most of it compiling. The
full step is timed (forward, backward, Muon and AdamW), in rounds that alternate with a large square matmul, so that
both see the same machine. Prints a table, a profile by kind of operation, and one JSON line.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from nanochat import metrics, model, optim, runtime, stage, train
from nanochat.config import UserError
from nanochat.model import ModelConfig
from nanochat.runtime import Runtime
from nanochat.train import TrainConfig, TrainState

Step = Callable[[TrainState], TrainState]


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model and of the measurement."""

    depth: int = 4
    width: int = 256
    head_dim: int = 64
    kv_heads: int | None = None
    vocab_size: int = 4096
    sequence_len: int = 512
    batch_size: int = 8
    window_pattern: str = "L"
    rounds: int = 5
    steps_per_round: int = 4
    compile: bool = True
    profile: bool = True
    device: str = "auto"
    dtype: str = "auto"
    train: TrainConfig = TrainConfig()


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, here: Runtime) -> None:
    """Measure, and print what was measured."""
    n_head = config.width // config.head_dim
    try:
        shape = ModelConfig(
            sequence_len=config.sequence_len,
            vocab_size=config.vocab_size,
            n_layer=config.depth,
            n_head=n_head,
            n_kv_head=config.kv_heads or n_head,
            n_embd=config.width,
            window_pattern=config.window_pattern,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    tokens = config.batch_size * config.sequence_len
    flops = model.flops_per_token(shape)
    kernel, step, state = prepare(config, shape, here)
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else here.device.type
    print(f"depth {config.depth}, width {config.width}, {model.count(shape)['total']:,} parameters")
    print(f"{flops / 1e6:.4g} MFLOP per token, batch {config.batch_size} x {config.sequence_len} tokens")
    print(f"{name}, {here.compute_dtype}, attention {kernel}, compile={config.compile}", flush=True)
    start = time.perf_counter()
    state = step(step(state))
    runtime.synchronize(here.device)
    compile_seconds = time.perf_counter() - start
    print(f"first two steps, with compilation: {compile_seconds:.1f} s", flush=True)

    seconds, squares, shapes = measure(config, shape, step, state, here)
    limit, limit_from = runtime.peak_flops(here.device, here.compute_dtype)
    speed = flops * tokens / seconds
    square = 2 * 2048**3 / squares
    result: dict[str, float | str] = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "model_flops_per_second": speed,
        "matmul_2048_flops_per_second": square,
        "share_of_matmul_2048": speed / square,
        "seconds_of_its_matmuls_alone": shapes,
        "share_of_step_for_its_matmuls": shapes / seconds,
        "mfu": speed / limit,
        "mfu_limit": limit_from,
        "peak_memory_bytes": metrics.peak_memory_bytes(here.device),
        "compile_seconds": compile_seconds,
        "attention": kernel,
    }
    for key, value in result.items():
        print(f"  {key:32}{value:.4g}" if isinstance(value, float) else f"  {key:32}{value}")
    if config.profile:
        print("where the time of a step goes, by operation:")
        print("\n".join(breakdown(step, state, here)))
    print(json.dumps({"bench": "train", **dataclasses.asdict(config), **result}))


def prepare(config: Config, shape: ModelConfig, here: Runtime) -> tuple[str, Step, TrainState]:
    """Return the attention kernel's name, a function that does one full step on a fixed batch, and the state."""
    settings = stage.StageConfig(compile=config.compile, train=config.train)
    step_fn, _, kernel = stage.functions(settings, shape, here)
    params = model.init(shape, 0, device=here.device, dtype=here.compute_dtype)
    state = train.init(params, model.spec(shape), here.compute_dtype)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(shape.vocab_size, (config.batch_size, shape.sequence_len + 1), generator=generator)
    rows = rows.to(here.device)
    batch = {"inputs": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
    rates = optim.rates(optim.OptimConfig(), shape.n_embd)
    for group in rates.values():
        group["lr"] = 0.0  # the work of a step is the same, and the numbers stay what they are on random tokens
    hparams = optim.as_hparams(rates)
    return kernel, lambda state: step_fn(state, [batch], hparams)[0], state


def measure(
    config: Config, shape: ModelConfig, step: Step, state: TrainState, here: Runtime
) -> tuple[float, float, float]:
    """Return median seconds of a step, of a 2048³ matmul, and of the model's own matmuls, taken in turns."""
    a, b = (torch.randn(2048, 2048, device=here.device).to(here.compute_dtype) for _ in range(2))
    own = matmuls(shape, config.batch_size * config.sequence_len, here)
    steps, squares, shapes = [], [], []
    for _ in range(config.rounds):
        squares += [timed(lambda: a @ b, here) for _ in range(5)]
        steps += [timed(lambda: step(state), here) for _ in range(config.steps_per_round)]
        shapes.append(timed(own, here))
    return statistics.median(steps), statistics.median(squares), statistics.median(shapes[1:] or shapes)


def timed(f: Callable[[], Any], here: Runtime) -> float:
    """Return the seconds that one call takes, the device's work included."""
    runtime.synchronize(here.device)
    start = time.perf_counter()
    f()
    runtime.synchronize(here.device)
    return time.perf_counter() - start


def matmuls(shape: ModelConfig, tokens: int, here: Runtime) -> Callable[[], None]:
    """Return a function that does the step's dense products and nothing else: forward and both gradients."""
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


def breakdown(step: Step, state: TrainState, here: Runtime, rows: int = 14) -> list[str]:
    """Return lines of the operations that take most of a step, with their share."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (here.device.type == "cuda")
    with torch_profile(activities=activities) as profiler:
        step(state)
        runtime.synchronize(here.device)
    kind = "self_device_time_total" if here.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in events) or 1
    shares = [(getattr(event, kind) / total, event.key) for event in events[:rows]]
    return [f"  {share:6.1%}  {key[:100]}" for share, key in shares]
