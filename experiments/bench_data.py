"""Measure the data path: packed tokens per second with and without the token cache, beside the tokenizer alone.

    torchrun launch.py --experiment=bench_data
    torchrun launch.py --experiment=bench_data --set data.source=climbmix --set tokens=2e7

Takes about a minute on two CPU cores, plus the building of the embedded corpus where it is not there yet. A tokenizer
of 4096 tokens is trained for the occasion if there is none. The three measurements alternate, so that all see the same
machine. Prints a table, the fraction of tokens lost by cutting documents at the end of rows, and one JSON line.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

from nanochat.config import UserError, base_dir
from nanochat.data import DataConfig, Tokenizer, loader, sources, tokenizer
from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
        tokens: to tokenise or pack in one measurement; ten times as many are packed from the cache.
        rounds: measurements of each kind; the median counts.
        rows: of a batch. vocab_size: of the tokenizer that is trained if there is none.
    """

    data: DataConfig = DataConfig(source="embedded")
    tokens: int = 2_000_000
    rounds: int = 5
    rows: int = 32
    sequence_len: int = 2048
    vocab_size: int = 4096
    seed: int = 42


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Measure, and print what was measured."""
    if runtime.world_size > 1:
        raise UserError("bench_data runs in one process: start it without --nproc_per_node")
    with contextlib.ExitStack() as stack:
        tok = find_tokenizer(config, stack)
        threads = config.data.tokenizer_threads or os.cpu_count()
        print(f"source {config.data.source}, {tok.vocab_size:,} tokens of vocabulary, {threads} tokenizer threads,")
        print(f"batches of {config.rows} x {config.sequence_len}, buffer of {config.data.buffer_docs} documents")
        fill_cache(config, tok)
        alone, uncached, cached = [], [], []
        for _ in range(config.rounds):
            alone.append(encoding_speed(config, tok))
            uncached.append(packing_speed(config, tok, config.tokens, cached=False))
            cached.append(packing_speed(config, tok, 10 * config.tokens, cached=True))
    print(f"  {'million tokens per second':40} {'median':>8} {'least':>8} {'most':>8}")
    result = {}
    for name, title, speeds in [
        ("tokenizer", "tokenizer alone (encode_batch)", alone),
        ("uncached_loaded", "loader, no token cache: tokenised", [speed.loaded for speed in uncached]),
        ("uncached_packed", "loader, no token cache: packed", [speed.packed for speed in uncached]),
        ("cached_packed", "loader, token cache warm: packed", [speed.packed for speed in cached]),
    ]:
        numbers = [statistics.median(speeds), min(speeds), max(speeds)]
        print(f"  {title:40}" + "".join(f" {number / 1e6:8.2f}" for number in numbers))
        result[f"{name}_tokens_per_second"] = numbers[0]
    ratio = statistics.median(speed.loaded / raw for speed, raw in zip(uncached, alone))
    print(f"  the loader without cache tokenises at {ratio:.2f} of the tokenizer's own speed")
    print(f"  lost by cutting at T = {config.sequence_len}: {cached[-1].cut_fraction:.1%} of the tokens")
    result |= {"loaded_over_tokenizer": ratio, "tokens_cut_fraction": cached[-1].cut_fraction}
    print(json.dumps({"bench": "data", "config": dataclasses.asdict(config), **result}))


def find_tokenizer(config: Config, stack: contextlib.ExitStack) -> Tokenizer:
    """Return the tokenizer that is there, or train one and forget it, and what it cached, at the end."""
    if (tokenizer.default_dir() / "tokenizer.txt").exists():
        return tokenizer.load(tokenizer.default_dir())
    print(
        f"no tokenizer in {tokenizer.default_dir()}: training one of {config.vocab_size:,} tokens for this measurement"
    )
    tok = tokenizer.train(itertools.islice(documents(config), 200_000), config.vocab_size, max_chars=20_000_000)
    stack.callback(shutil.rmtree, base_dir() / "tokens" / tok.fingerprint[:16], ignore_errors=True)
    return tok


def documents(config: Config) -> Iterator[str]:
    """Yield the training documents once, in the order of the shards."""
    for block in blocks(config):
        yield from block


def blocks(config: Config) -> Iterator[list[str]]:
    """Yield the training documents once, block after block."""
    for shard in sources.shards_of(config.data, "train"):
        for index in range(sources.num_blocks(shard)):
            yield sources.read_block(shard, index, config.data.text_column)


def encoding_speed(config: Config, tok: Tokenizer) -> float:
    """Return the tokens per second of `encode_batch` on the source's texts, reading them not counted."""
    tokens, seconds = 0, 0.0
    while tokens < config.tokens:
        for texts in blocks(config):
            started = time.perf_counter()
            ids = tok.encode_batch(texts, config.data.tokenizer_threads)
            seconds += time.perf_counter() - started
            tokens += sum(map(len, ids))
            if tokens >= config.tokens:
                break
    return tokens / seconds


class Speed(NamedTuple):
    """Tokens per second: in rows, and in rows or cut away; and the fraction that was cut away."""

    packed: float
    loaded: float
    cut_fraction: float


def packing_speed(config: Config, tok: Tokenizer, tokens: int, *, cached: bool) -> Speed:
    """Measure the loader until that many tokens are packed.

    The first batch is not counted: it also fills the buffer and the queues between threads, as full at the end.
    """
    data = dataclasses.replace(config.data, token_cache=cached)
    stream = loader.batches(
        data, tok, split="train", rows_per_step=config.rows, sequence_len=config.sequence_len, seed=config.seed
    )
    with contextlib.closing(stream):
        _, _, first = next(stream)
        started = time.perf_counter()
        for _, _, stats in stream:
            packed = stats["tokens_packed"] - first["tokens_packed"]
            if packed >= tokens:
                seconds = time.perf_counter() - started
                loaded = packed + stats["tokens_cut"] - first["tokens_cut"]
                return Speed(packed / seconds, loaded / seconds, stats["tokens_cut_fraction"])
    raise AssertionError("the stream has no end")


def fill_cache(config: Config, tok: Tokenizer) -> None:
    """Load what the measurement from the cache will read: an epoch, or as far as that gets."""
    started = time.perf_counter()
    packing_speed(config, tok, 10 * config.tokens, cached=True)
    print(f"token cache filled in {time.perf_counter() - started:.1f} s")
