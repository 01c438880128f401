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

from nanochat import dataloader, dataset, tokenizer
from nanochat.dataset import DataConfig
from nanochat.runtime import Runtime, base_dir
from nanochat.tokenizer import Tokenizer


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
    with contextlib.ExitStack() as stack:
        tok = find_tokenizer(config, stack)
        threads = config.data.tokenizer_threads or os.cpu_count()
        print(f"source {config.data.source}, {tok.vocab_size:,} tokens of vocabulary, {threads} tokenizer threads,")
        print(f"batches of {config.rows} x {config.sequence_len}, buffer of {config.data.buffer_docs} documents")
        fill_cache(config, tok)
        speeds: dict[str, list[float]] = {"tokenizer": [], "uncached": [], "cached": []}
        fractions = []
        for _ in range(config.rounds):
            speeds["tokenizer"].append(encoding_speed(config, tok))
            speeds["uncached"].append(packing_speed(config, tok, config.tokens, cached=False)[0])
            speed, fraction = packing_speed(config, tok, 10 * config.tokens, cached=True)
            speeds["cached"].append(speed)
            fractions.append(fraction)
    ratios = [packed / alone for packed, alone in zip(speeds["uncached"], speeds["tokenizer"])]
    titles = {
        "tokenizer": "tokenizer alone (encode_batch)",
        "uncached": "loader, no token cache",
        "cached": "loader, token cache warm",
    }
    print(f"  {'million tokens per second':32} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in speeds.items():
        numbers = [statistics.median(values), min(values), max(values)]
        print(f"  {titles[name]:32}" + "".join(f" {number / 1e6:8.2f}" for number in numbers))
    print(f"  loader without cache / tokenizer alone: {statistics.median(ratios):.2f}")
    print(f"  lost by cutting at T = {config.sequence_len}: {fractions[-1]:.1%} of the tokens")
    result = {f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()}
    result |= {"uncached_over_tokenizer": statistics.median(ratios), "tokens_cut_fraction": fractions[-1]}
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
    for shard in dataset.resolve(config.data, "train"):
        for index in range(dataset.num_blocks(shard)):
            yield dataset.read_block(shard, index, config.data.text_column)


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


def packing_speed(config: Config, tok: Tokenizer, tokens: int, *, cached: bool) -> tuple[float, float]:
    """Return (tokens per second in rows, fraction of tokens cut).

    The first batch is not counted: it also fills the buffer and the threads' queues, which are as full at the end.
    """
    data = dataclasses.replace(config.data, token_cache=cached)
    stream = dataloader.batches(
        data, tok, split="train", rows_per_step=config.rows, sequence_len=config.sequence_len, seed=config.seed
    )
    with contextlib.closing(stream):
        first = next(stream)[2]
        started = time.perf_counter()
        for _, _, stats in stream:
            if stats["tokens_packed"] - first["tokens_packed"] >= tokens:
                seconds = time.perf_counter() - started
                return (stats["tokens_packed"] - first["tokens_packed"]) / seconds, stats["tokens_cut_fraction"]
    raise AssertionError("the stream has no end")


def fill_cache(config: Config, tok: Tokenizer) -> None:
    """Load what the measurement from the cache will read: an epoch, or as far as that gets."""
    started = time.perf_counter()
    packing_speed(config, tok, 10 * config.tokens, cached=True)
    print(f"token cache filled in {time.perf_counter() - started:.1f} s")
