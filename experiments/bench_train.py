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

import torch

from nanochat import attention, loss, metrics, model, optim, runtime, train
from nanochat.runtime import Runtime


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
    train: train.TrainConfig = train.TrainConfig()


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Measure, and print what was measured."""
    n_head = config.width // config.head_dim
    shape = model.ModelConfig(
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
        n_layer=config.depth,
        n_head=n_head,
        n_kv_head=config.kv_heads or n_head,
        n_embd=config.width,
        window_pattern=config.window_pattern,
    )
    tokens = config.batch_size * config.sequence_len
    flops = model.flops_per_token(shape)
    kernel, step, state, batch = prepare(config, shape, runtime)
    print(f"model: depth {config.depth}, width {config.width}, {model.count(shape)['total']:,} parameters, ")
    print(f"       {flops / 1e6:.4g} MFLOP per token; batch {config.batch_size} x {config.sequence_len} tokens")
    print(f"       {runtime.device.type}, {runtime.compute_dtype}, attention {kernel}, compile={config.compile}")

    start = time.perf_counter()
    state = step(state, [batch])
    state = step(state, [batch])
    synchronize(runtime)
    compile_seconds = time.perf_counter() - start
    print(f"first two steps (compilation included): {compile_seconds:.1f} s")

    ceilings, seconds = [], []
    for _ in range(config.rounds):
        ceilings.append(matmul_ceiling(runtime))
        for _ in range(config.steps_per_round):
            start = time.perf_counter()
            state = step(state, [batch])
            synchronize(runtime)
            seconds.append(time.perf_counter() - start)
    ceilings.append(matmul_ceiling(runtime))
    ceiling, second = statistics.median(ceilings), statistics.median(seconds)
    shapes = shape_ceiling(shape, tokens, runtime)
    datasheet, source = peak(runtime)
    result = {
        "tokens_per_second": tokens / second,
        "step_seconds": second,
        "model_tflops_per_second": flops * tokens / second / 1e12,
        "matmul_2048_tflops_per_second": ceiling / 1e12,
        "share_of_matmul_2048": flops * tokens / second / ceiling,
        "seconds_of_the_models_matmuls": shapes,
        "share_of_step_that_they_need": shapes / second,
        "mfu": flops * tokens / second / datasheet,
        "mfu_of": source,
        "peak_memory_gib": metrics.peak_memory_bytes(runtime.device) / 2**30,
        "compile_seconds": compile_seconds,
        "attention": kernel,
    }
    for name, value in result.items():
        print(f"  {name:32} {value:.4g}" if isinstance(value, float) else f"  {name:32} {value}")
    if config.profile:
        print(profile(lambda: step(state, [batch]), runtime))
    print(json.dumps({"bench": "train", "config": dataclasses.asdict(config), **result}))
