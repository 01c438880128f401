"""Measure inference: prefill, time to the first token, decoding at several batches, against the machine's limits.

    python launch.py --experiment=bench_infer                                   # depth 4, on the CPU in six minutes
    python launch.py --experiment=bench_infer --set depth=20 --set vocab_size=32768 --set sequence_len=2048
    python launch.py --experiment=bench_infer --set run=quickstart              # a trained model

Decoding is that of a chat: the engine of nanochat/generate.py with top-k sampling, each row with a seed of its own,
tool calls looked for, one token a row handed to the host each step. Beside each time stands its floor: the bytes that
a step has to read (every matrix once, and the keys and values of each row within the windows) over the bandwidth of a
large copy, measured in the same run. A model that fits a cache of the processor may be faster than that floor.
Prints a table and one JSON line. The first step of each shape is compiled, which is most of the time it takes.
"""

import dataclasses
import json
import platform
import resource
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch

from experiments import _bench
from nanochat import checkpoint, infer, model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import Runtime
from nanochat.infer import Engine, Request
from nanochat.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and on what.

    Attributes:
        run: a trained model; none: one of random weights, shaped by depth, vocab_size and sequence_len.
        batches: rows decoded at once. prompt_tokens, new_tokens: of each row. temperature, top_k: of its draws.
        rounds: of new_tokens, timed each on its own; the median of all steps counts.
        prefill_tokens: of the prompt whose prefill is timed; none: all of the context but one.
        compile, exact: as for `generate.start`. threads: of the CPU; none: as torch has them.
        device, dtype: auto takes a GPU where there is one, and bfloat16 where it is fast.
    """

    run: str | None = None
    depth: int = 4
    vocab_size: int = 4096
    sequence_len: int = 512
    batches: tuple[int, ...] = (1, 8, 32, 128)
    prompt_tokens: int = 110
    new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 50
    rounds: int = 3
    prefill_tokens: int | None = None
    compile: bool = True
    exact: bool = False
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"


class Model(NamedTuple):
    """What is measured."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer


def config() -> Config:
    return Config()


def run(config: Config, here: Runtime) -> None:
    if here.world_size > 1:
        raise UserError("bench_infer measures one process: start it with python, not torchrun")
    if min(config.batches, default=0) < 1 or config.rounds < 1 or config.prompt_tokens < 1 or config.new_tokens < 2:
        raise UserError("batches, rounds and prompt_tokens have to be at least 1, new_tokens at least 2")
    if config.threads:
        torch.set_num_threads(config.threads)
    bot = subject(config, here)
    if config.prompt_tokens + config.new_tokens > bot.config.sequence_len:
        raise UserError(
            f"prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens} are over the context of "
            f"{bot.config.sequence_len}"
        )
    cpu = here.device.type == "cpu"
    limits = _bench.limits(here.device, here.compute_dtype, *((1024, 2**29) if cpu else ()))
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = name if cpu else torch.cuda.get_device_name(here.device)
    dtype = str(here.compute_dtype).removeprefix("torch.")
    print(f"{name}, torch {torch.__version__}, {dtype}, depth {bot.config.n_layer}, width {bot.config.n_embd}")
    print(f"limits: {limits.matmul / 1e12:.3g} TFLOP/s of products, {limits.copy / 1e9:.3g} GB/s of a copy")
    found: dict[str, Any] = {"prefill": prefill(config, bot, here, limits)}
    heads = ("first token", "a step", "floor", "tokens/s", "bandwidth", "MFU", "peak memory")
    print("\nbatch " + " ".join(f"{head:>{width}}" for head, width in zip(heads, (12, 10, 10, 10, 10, 6, 12))))
    for batch in config.batches:
        row = found[f"batch_{batch}"] = decoding(config, bot, here, limits, batch)
        print(
            f"{batch:>5} {1e3 * row['first_token_seconds']:>9.1f} ms {1e3 * row['step_seconds']:>7.2f} ms"
            f" {1e3 * row['floor_seconds']:>7.2f} ms {row['tokens_per_second']:>10,.0f} {row['bandwidth_use']:>10.0%}"
            f" {row['mfu']:>6.1%} {row['peak_memory_bytes'] / 2**30:>8.2f} GiB",
            flush=True,
        )
    settings = dataclasses.asdict(config) | {"device": name, "dtype": dtype, "torch": torch.__version__}
    limit = {"matmul_flops": limits.matmul, "copy_bytes_per_second": limits.copy}
    print("\n" + json.dumps({"settings": settings, "limits": limit} | found))


def subject(config: Config, here: Runtime) -> Model:
    """Return the model to measure. Raises: UserError."""
    if config.run is not None:
        bot = checkpoint.load(config.run, device=here.device, dtype=here.compute_dtype)
        print(checkpoint.describe_model(bot))
        return Model(bot.params, bot.config, bot.tokenizer)
    shape = model.from_depth(config.depth, vocab_size=config.vocab_size, sequence_len=config.sequence_len)
    params = model.init(shape, 0, device=here.device, dtype=here.compute_dtype)
    tokens = config.vocab_size - len(Tokenizer(()).specials)
    if tokens < 256:
        raise UserError(f"vocab_size={config.vocab_size}: expected at least {config.vocab_size - tokens + 256}")
    return Model(params, shape, Tokenizer(tuple(i.to_bytes(4, "big") for i in range(tokens))))


def start(config: Config, bot: Model, here: Runtime, slots: int) -> Engine:
    """Return an engine whose rows do not end by themselves, so that all have the same length."""
    decoder = infer.start(
        bot.params,
        bot.config,
        bot.tokenizer,
        slots=slots,
        device=here.device,
        dtype=here.compute_dtype,
        compile=config.compile,
        exact=config.exact,
    )
    decoder.rules = decoder.rules._replace(stops=frozenset())
    return decoder


def prefill(config: Config, bot: Model, here: Runtime, limits: _bench.Limits) -> dict[str, float]:
    """Return tokens per second and MFU of computing one long prompt."""
    decoder = start(dataclasses.replace(config, compile=False), bot, here, 1)
    count = config.prefill_tokens or bot.config.sequence_len - 1

    def once(seed: int) -> float:
        request = Request(prompt(bot, count, seed))
        seconds = _bench.timed(lambda: infer.admit(decoder, 0, request), here)
        infer.cancel(decoder, 0)
        return seconds

    once(0)
    seconds = statistics.median(once(1 + i) for i in range(max(3, config.rounds)))
    # The unembedding is not computed: only what follows the prompt is drawn.
    head = 2 * bot.config.padded_vocab * bot.config.n_embd
    flops = sum(model.decode_flops(bot.config, i + 1) - head for i in range(count - 1))
    found = {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds}
    found["mfu"] = flops / seconds / limits.matmul
    print(f"prefill: {count} tokens in {1e3 * seconds:.1f} ms, {count / seconds:,.0f} tokens/s, MFU {found['mfu']:.1%}")
    return found


def prompt(bot: Model, count: int, seed: int) -> tuple[int, ...]:
    """Return random ids of plain tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, bot.config.vocab_size - 9, (count,), generator=generator).tolist())


def decoding(config: Config, bot: Model, here: Runtime, limits: _bench.Limits, batch: int) -> dict[str, float]:
    """Return what decoding `batch` rows took, and what it could not take less than."""
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here.device)
    decoder = start(config, bot, here, batch)
    requests = [
        Request(prompt(bot, config.prompt_tokens, i), config.new_tokens, config.temperature, config.top_k, seed=i)
        for i in range(batch)
    ]
    for _ in infer.run(decoder, requests):
        pass  # compiles, and records graphs
    first, steps = [], []
    for _ in range(config.rounds):
        begin = time.perf_counter()
        for i, request in enumerate(requests):
            infer.admit(decoder, i, request)
        seen: set[Any] = set()
        while len(seen) < batch:
            seen |= {event.key for event in infer.step(decoder)}
        first.append(time.perf_counter() - begin)
        while len(decoder.active) == batch:
            begin = time.perf_counter()
            infer.step(decoder)
            steps.append(time.perf_counter() - begin)
        while decoder.active:
            infer.step(decoder)
    seconds = statistics.median(steps)
    context = config.prompt_tokens + config.new_tokens // 2
    read = model.decode_bytes(bot.config, batch, context, here.compute_dtype.itemsize)
    cuda = here.device.type == "cuda"
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {
        "first_token_seconds": statistics.median(first),
        "step_seconds": seconds,
        "floor_seconds": read / limits.copy,
        "tokens_per_second": batch / seconds,
        "bandwidth_use": read / limits.copy / seconds,
        "mfu": batch * model.decode_flops(bot.config, context) / seconds / limits.matmul,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(here.device) if cuda else peak,
        "cache_bytes": tree.nbytes(decoder.cache),
    }
