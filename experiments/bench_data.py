"""Measure the data path, or the CORE evaluation.

    python launch.py --experiment=bench_data
    python launch.py --experiment=bench_data --set data.source=climbmix --set tokens=2e7
    python launch.py --experiment=bench_data --set what=core --set core.bundle=/path/to/eval_bundle --set core.threads=1

what=loader: packed tokens per second with and without the token cache, beside the tokenizer alone, in turns. A minute
on two CPU cores, after the embedded corpus is built; without a tokenizer, one is trained for the measurement.

what=core: the batched evaluation, which computes shared prefixes once, against one prompt at a time. Both answer the
same rows, in turns, and have to agree; everything from rows to answers is timed. Prints prompts per second and the
ratio of the times by kind of task; on the CPU also that of processor time, which other programs disturb less. Without
core.run the model has random weights. With 40 rows a task: ten minutes on one core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat import checkpoint, data, distributed, eval, model
from nanochat.config import PositiveInt, Settings, base_dir
from nanochat.data import DataConfig
from nanochat.text import table


@dataclasses.dataclass(frozen=True)
class CoreConfig(Settings):
    """The CORE evaluation to measure.

    Attributes:
        bundle: folder of the evaluation bundle; default: the published one.
        rows: rows of each task to answer, the first ones; default: all.
        run: a trained model; default: random weights with the shape of depth, vocab_size and sequence_len.
        depth, vocab_size, sequence_len: of a model with random weights.
        max_tokens: of a prompt; default: the limit of the model.
        tokens_per_batch: as for eval_base.
        rounds: of both ways for each task; the least time counts.
        threads: of the CPU; default: torch's.
    """

    bundle: Path | None = None
    rows: PositiveInt | None = None
    run: str | None = None
    depth: PositiveInt = 4
    vocab_size: PositiveInt = 4096
    sequence_len: PositiveInt = 512
    max_tokens: PositiveInt | None = None
    tokens_per_batch: PositiveInt | None = None
    rounds: PositiveInt = 1
    threads: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to measure.

    Attributes:
        what: the data loader, or the CORE evaluation.
        tokens: to tokenize or pack in one measurement; from the cache ten times as many.
        rounds: measurements of each kind; the median counts.
        rows, sequence_len: of a batch.
        vocab_size: of the tokenizer that is trained if there is none.
        seed: of the data order.
        device, dtype: of the CORE evaluation; auto uses a GPU if there is one, and bfloat16 where it is fast.
    """

    what: Literal["loader", "core"] = "loader"
    data: DataConfig = DataConfig(source="embedded")
    tokens: PositiveInt = 2_000_000
    rounds: PositiveInt = 5
    rows: PositiveInt = 32
    sequence_len: PositiveInt = 2048
    vocab_size: PositiveInt = 4096
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    core: CoreConfig = CoreConfig()


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    distributed.require_single(runtime, "bench_data")
    if config.what == "core":
        measure_core(config.core, runtime)
    else:
        measure_loader(config)


# The data path


class Speed(NamedTuple):
    """Tokens per second in rows, and in rows or cropped; and the share of cropped tokens."""

    packed: float
    loaded: float
    cropped: float


def measure_loader(config: Config) -> None:
    with contextlib.ExitStack() as stack:
        tokenizer = load_or_train_tokenizer(config, stack)
        threads = config.data.tokenizer_threads or os.cpu_count()
        print(f"source {config.data.source}, vocabulary of {tokenizer.vocab_size:,}, {threads} tokenizer threads,")
        print(f"batches of {config.rows} x {config.sequence_len}, buffer of {config.data.buffer_docs} documents")
        start = time.perf_counter()
        packing_speed(config, tokenizer, 10 * config.tokens, cached=True)
        print(f"token cache filled in {time.perf_counter() - start:.1f} s")
        alone, uncached, cached = [], [], []
        for _ in range(config.rounds):
            alone.append(encoding_speed(config, tokenizer))
            uncached.append(packing_speed(config, tokenizer, config.tokens, cached=False))
            cached.append(packing_speed(config, tokenizer, 10 * config.tokens, cached=True))
    rows, result = [["million tokens per second", "median", "min", "max"]], {}
    for name, title, speeds in [
        ("tokenizer", "tokenizer alone (encode_batch)", alone),
        ("uncached_loaded", "loader without token cache: tokenized", [speed.loaded for speed in uncached]),
        ("uncached_packed", "loader without token cache: packed", [speed.packed for speed in uncached]),
        ("cached_packed", "loader with token cache: packed", [speed.packed for speed in cached]),
    ]:
        numbers = [statistics.median(speeds), min(speeds), max(speeds)]
        rows.append([title, *(f"{number / 1e6:.2f}" for number in numbers)])
        result[f"{name}_tokens_per_second"] = numbers[0]
    ratio = statistics.median(speed.loaded / raw for speed, raw in zip(uncached, alone))
    print(table(rows))
    print(f"  the loader without cache tokenizes at {ratio:.2f} of the tokenizer's own speed")
    print(f"  cropped at the end of rows of {config.sequence_len}: {cached[-1].cropped:.1%} of the tokens")
    result |= {"loaded_over_tokenizer": ratio, "tokens_cut_fraction": cached[-1].cropped}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "core"}
    print(json.dumps({"bench": "data", "config": settings, **result}))


def load_or_train_tokenizer(config: Config, stack: contextlib.ExitStack) -> data.Tokenizer:
    """Return the trained tokenizer, or train one whose cached tokens are deleted at the end."""
    folder = data.tokenizer.default_dir()
    if (folder / "tokenizer.txt").exists():
        return data.tokenizer.load(folder)
    print(f"no tokenizer in {folder}: training one of {config.vocab_size:,} tokens for this measurement")
    texts = itertools.islice(data.sources.texts(config.data, "train"), 200_000)
    tokenizer = data.tokenizer.train(texts, config.vocab_size, max_chars=20_000_000)
    stack.callback(shutil.rmtree, base_dir() / "tokens" / tokenizer.fingerprint[:16], ignore_errors=True)
    return tokenizer


def encoding_speed(config: Config, tokenizer: data.Tokenizer) -> float:
    """Return the tokens per second of `encode_batch`, without reading the texts."""
    shards = data.sources.shards_of(config.data, "train")
    blocks = itertools.cycle([(shard, i) for shard in shards for i in range(data.sources.num_blocks(shard))])
    tokens, seconds = 0, 0.0
    while tokens < config.tokens:
        texts = data.sources.read_block(*next(blocks), config.data.text_column)
        start = time.perf_counter()
        ids = tokenizer.encode_batch(texts, config.data.tokenizer_threads)
        seconds += time.perf_counter() - start
        tokens += sum(map(len, ids))
    return tokens / seconds


def packing_speed(config: Config, tokenizer: data.Tokenizer, tokens: int, *, cached: bool) -> Speed:
    """Measure the loader until that many tokens are packed.

    The first batch does not count: it also fills the buffer and the queues, which are as full at the end.
    """
    stream = data.loader.batches(
        dataclasses.replace(config.data, token_cache=cached), tokenizer,
        split="train", rows_per_step=config.rows, sequence_len=config.sequence_len, seed=config.seed,
    )  # fmt: skip
    with contextlib.closing(stream):
        _, _, first = next(stream)
        start = time.perf_counter()
        for _, _, stats in stream:
            packed = stats["tokens_packed"] - first["tokens_packed"]
            if packed >= tokens:
                seconds = time.perf_counter() - start
                loaded = packed + stats["tokens_cut"] - first["tokens_cut"]
                return Speed(packed / seconds, loaded / seconds, stats["tokens_cut_fraction"])
    raise AssertionError("the stream is endless")


# The CORE evaluation


class Times(NamedTuple):
    """Prompts, tokens, and seconds of a task, one prompt at a time and batched; and the same in processor time."""

    prompts: int
    tokens: int
    single: float
    batched: float
    cpu_single: float
    cpu_batched: float


def measure_core(config: CoreConfig, runtime: distributed.Runtime) -> None:
    from experiments import _bench

    bundle = eval.core_bundle.read(config.bundle or eval.core_bundle.fetch())
    loaded = load_core_model(config, runtime)
    shape, machine = loaded.config, _bench.describe_machine(runtime)
    print(f"{machine}, depth {shape.n_layer}, width {shape.n_embd}, vocabulary {shape.vocab_size}, "
          f"context {shape.sequence_len}")  # fmt: skip
    times: dict[str, Times] = {}
    kinds: dict[str, list[Times]] = {}
    for label in bundle.entries:
        task = eval.core_bundle.load(bundle, label)
        times[label] = time_task(config, loaded, task, runtime)
        kinds.setdefault(task.kind, []).append(times[label])
        print(f"{label}: {times[label].single / times[label].batched:.2f}x", flush=True)
    rows = [["task", "prompts", "tokens", "one at a time", "batched", "ratio", "CPU ratio"]]
    results = {}
    sums = {kind: Times(*map(sum, zip(*group))) for kind, group in [*kinds.items(), ("all", [*times.values()])]}
    for label, t in [*times.items(), *sums.items()]:
        results[label] = t._asdict() | {"ratio": t.single / t.batched, "cpu_ratio": t.cpu_single / t.cpu_batched}
        rates = [f"{t.prompts / seconds:.1f}/s" for seconds in (t.single, t.batched)]
        ratios = [f"{results[label][name]:.2f}x" for name in ("ratio", "cpu_ratio")]
        rows.append([label, str(t.prompts), str(t.tokens), *rates, *ratios])
    print(table(rows))
    settings = dataclasses.asdict(config) | {"bundle": str(config.bundle), "machine": machine}
    print(json.dumps({"bench": "core", "settings": settings} | {kind: results[kind] for kind in sums}))


def load_core_model(config: CoreConfig, runtime: distributed.Runtime) -> checkpoint.Pretrained:
    import torch

    from experiments import _bench
    from nanochat import tree

    loaded = _bench.load_model(config, runtime, lambda: embedded_tokenizer(config.vocab_size))
    if config.run is not None:
        return loaded
    # The zeros of an untrained model would make all of its answers ties.
    generator = torch.Generator().manual_seed(0)
    params = tree.map(lambda x: x + 0.05 * torch.randn(x.shape, generator=generator).to(x), loaded.params)
    return dataclasses.replace(loaded, params=params)


def embedded_tokenizer(vocab_size: int) -> data.Tokenizer:
    """Return a tokenizer trained on the embedded corpus, once."""
    folder = base_dir() / f"bench_tokenizer_{vocab_size}"
    if not folder.exists():
        print(f"training a tokenizer of {vocab_size} tokens, once")
        texts = data.sources.texts(DataConfig("embedded"), "train")
        data.tokenizer.save(data.tokenizer.train(texts, vocab_size), folder)
    return data.tokenizer.load(folder)


def time_task(
    config: CoreConfig,
    loaded: checkpoint.Pretrained,
    task: eval.core_bundle.CoreTask,
    runtime: distributed.Runtime,
) -> Times:
    """Return the times of a task, both ways, which have to give the same answers in float32."""
    import torch

    compute = model.Compute(loaded.params["wte"].dtype)
    limit = config.max_tokens or model.CONTEXT_LIMIT * loaded.config.sequence_len
    best, best_cpu = [math.inf, math.inf], [math.inf, math.inf]
    answers: list[list[eval.Answer]] = [[], []]
    questions: list[eval.Question] = []
    for _, way in itertools.product(range(config.rounds), range(2)):
        distributed.synchronize(runtime.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        questions = list(itertools.islice(eval.core.questions(task, loaded.tokenizer, limit), config.rows))
        prompts = [question.prompts for question in questions]
        if way == 0:
            scores = [[score_singly(loaded, prompt) for prompt in options] for options in prompts]
        else:
            scores = eval.likelihood.score(
                loaded.params, loaded.config, prompts, tokens_per_batch=config.tokens_per_batch, compute=compute
            )
        answers[way] = [eval.core.answer(*pair) for pair in zip(questions, scores)]
        distributed.synchronize(runtime.device)
        best[way] = min(best[way], time.perf_counter() - start)
        best_cpu[way] = min(best_cpu[way], time.process_time() - start_cpu)
    wrong = sum(a.is_correct != b.is_correct for a, b in zip(*answers))
    if wrong and compute.dtype == torch.float32:
        raise RuntimeError(f"{task.label}: {wrong} of {len(questions)} answers differ")
    lengths = [len(prompt.ids) for question in questions for prompt in question.prompts]
    return Times(len(lengths), sum(lengths), *best, *best_cpu)


def score_singly(loaded: checkpoint.Pretrained, prompt: eval.likelihood.Prompt) -> eval.likelihood.Scored:
    """Return the score of a prompt from a forward pass of its own, with the logits of all its tokens."""
    import torch
    import torch.nn.functional as F

    tokens = torch.tensor([prompt.ids], device=loaded.params["wte"].device)
    with torch.no_grad():
        logits = model.apply(loaded.params, tokens)[0]
    targets = tokens[0].roll(-1)
    nll, likeliest = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)
    answer = slice(prompt.start - 1, prompt.end - 1)
    n_correct = int((likeliest[answer] == targets[answer]).sum())
    return eval.likelihood.Scored(nll[answer].sum().item(), n_correct, prompt.end - prompt.start)
