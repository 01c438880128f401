"""Measure inference: prefill and decoding of a model against the machine's limits, or a running server.

    python launch.py --experiment=bench_infer                                   # depth 4, six minutes on the CPU
    python launch.py --experiment=bench_infer --set depth=20 --set vocab_size=32768 --set sequence_len=2048
    python launch.py --experiment=bench_infer --set run=quickstart              # a trained model
    python launch.py --experiment=bench_infer --set what=server --set server.url=http://host:8000

what=decode: time to the first token and time of a step at several batch sizes, with the engine of a chat: top-k
sampling, a seed for each sequence, tool calls. Beside each time is its floor: the bytes that a step has to read (every
matrix once, and the keys and values within the windows) over the measured bandwidth of a large copy; a model that fits
into the processor's cache may be faster. Most of the time goes into compiling the first step of each shape.

what=server: tokens per second and latency by the number of concurrent clients, for a server that runs already
(--experiment=web). Each client sends one request after the other, with a new seed, and reads the streamed answer; half
a minute for each number of clients. On the server's machine, clients take some of its time too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import requests

from nanochat import checkpoint, data, distributed, infer, model
from nanochat.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings, UserError
from nanochat.text import table


@dataclasses.dataclass(frozen=True)
class ServerConfig(Settings):
    """Load on a running server.

    Attributes:
        url: of the server.
        token: bearer token, if the server wants one.
        clients: numbers of concurrent clients, one row of the table each.
        seconds: time of each row.
        streaming: share of the clients that read a stream; the others wait for whole answers.
        prompt, max_tokens, temperature, top_k: of every request.
    """

    url: str = "http://localhost:8000"
    token: str | None = dataclasses.field(default=None, repr=False)
    clients: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    seconds: PositiveFloat = 30.0
    streaming: Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1] = 1.0
    prompt: str = "Tell me a long story about the sea."
    max_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 0.8
    top_k: NonNegativeInt = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clients:
            raise UserError("server.clients: name at least one number")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to measure.

    Attributes:
        what: decoding of a model in this process, or a running server.
        run: a trained model; default: random weights with the shape of depth, vocab_size and sequence_len.
        depth, vocab_size, sequence_len: of a model with random weights.
        batches: numbers of sequences decoded at once.
        prompt_tokens, new_tokens: of each sequence.
        temperature, top_k: of sampling.
        rounds: of new_tokens each; the median of all steps counts.
        prefill_tokens: length of the prompt whose prefill is timed; default: the context less one.
        compile: whether to compile the decode step.
        exact: whether to compute all slots to the full context, as the engine does for reproducible sampling.
        threads: of the CPU; default: torch's.
        device, dtype: auto uses a GPU if there is one, and bfloat16 where it is fast.
    """

    what: Literal["decode", "server"] = "decode"
    run: str | None = None
    depth: PositiveInt = 4
    vocab_size: PositiveInt = 4096
    sequence_len: PositiveInt = 512
    batches: tuple[PositiveInt, ...] = (1, 8, 32, 128)
    prompt_tokens: PositiveInt = 110
    new_tokens: Annotated[int, "at least 2", lambda x: x >= 2] = 128
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 50
    rounds: PositiveInt = 3
    prefill_tokens: PositiveInt | None = None
    compile: bool = True
    exact: bool = False
    threads: PositiveInt | None = None
    device: str = "auto"
    dtype: str = "auto"
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batches:
            raise UserError("batches: name at least one")


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    distributed.require_single(runtime, "bench_infer")
    if config.what == "server":
        measure_server(config.server)
    else:
        measure_decoding(config, runtime)


# Prefill and decoding


def measure_decoding(config: Config, runtime: distributed.Runtime) -> None:
    from experiments import _bench

    loaded = _bench.load_model(config, runtime, lambda: make_tokenizer(config))
    if config.prompt_tokens + config.new_tokens > loaded.config.sequence_len:
        raise UserError(
            f"prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens} exceed the context of "
            f"{loaded.config.sequence_len}"
        )
    measured = _bench.limits(runtime.device, runtime.compute_dtype)
    limits = {"matmul_flops": measured.matmul, "copy_bytes_per_second": measured.copy}
    machine = _bench.describe_machine(runtime)
    print(f"{machine}, depth {loaded.config.n_layer}, width {loaded.config.n_embd}")
    print(f"limits: {measured.matmul / 1e12:.3g} TFLOP/s of products, {measured.copy / 1e9:.3g} GB/s of a copy")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "server"} | {"machine": machine}
    results: dict[str, Any] = {"bench": "infer", "settings": settings, "limits": limits}
    results["prefill"] = prefill(config, loaded, runtime, measured.matmul)
    rows = [["batch", "first token", "a step", "floor", "tokens/s", "bandwidth", "MFU", "peak memory"]]
    for batch in config.batches:
        row = results[f"batch_{batch}"] = decode(config, loaded, runtime, limits, batch)
        print(f"batch {batch}: {1e3 * row['step_seconds']:.2f} ms a step")
        print(json.dumps(results), flush=True)  # a run that is stopped has printed what it measured
        first, step, floor = (1e3 * row[f"{name}_seconds"] for name in ("first_token", "step", "floor"))
        times = [f"{first:.1f} ms", f"{step:.2f} ms", f"{floor:.2f} ms"]
        shares = [f"{row['bandwidth_use']:.0%}", f"{row['mfu']:.1%}"]
        memory = f"{row['peak_memory_bytes'] / distributed.GIB:.2f} GiB"
        rows.append([str(batch), *times, f"{row['tokens_per_second']:,.0f}", *shares, memory])
    print(table(rows))
    print(json.dumps(results))


def make_tokenizer(config: Config) -> data.Tokenizer:
    """Return a tokenizer of `vocab_size` tokens that no text would use."""
    tokens = config.vocab_size - len(data.Tokenizer(()).specials)
    if tokens < 256:
        raise UserError(f"vocab_size={config.vocab_size}: expected at least {config.vocab_size - tokens + 256}")
    return data.Tokenizer(tuple(i.to_bytes(4, "big") for i in range(tokens)))


def start_engine(
    config: Config, loaded: checkpoint.Pretrained, runtime: distributed.Runtime, slots: int, compile: bool
) -> infer.Engine:
    """Return an engine without stop tokens, so that all sequences have the same length."""
    options = {"dtype": runtime.compute_dtype, "compile": compile, "exact": config.exact}
    engine = infer.start(loaded.params, loaded.config, loaded.tokenizer, slots=slots, **options)
    engine.tools = engine.tools._replace(stops=frozenset())
    engine.step_fn = functools.partial(engine.step_fn, blocking=engine.tools.blocking)  # no row waits at a stop token
    return engine


def prefill(
    config: Config, loaded: checkpoint.Pretrained, runtime: distributed.Runtime, matmul_flops: float
) -> dict[str, float]:
    """Return tokens per second and MFU of computing one long prompt."""
    from experiments import _bench

    engine = start_engine(config, loaded, runtime, 1, compile=False)
    count = config.prefill_tokens or loaded.config.sequence_len - 1

    def once(seed: int) -> float:
        infer.admit(engine, 0, infer.Request(random_prompt(loaded, count, seed)))
        seconds = _bench.timed(lambda: infer.prefill.advance(engine.prefill, others_decode=False), runtime)
        infer.cancel(engine, 0)
        return seconds

    once(0)
    seconds = statistics.median(once(1 + i) for i in range(max(3, config.rounds)))
    # Prefill does not compute logits.
    unembedding = 2 * loaded.config.padded_vocab * loaded.config.n_embd
    flops = sum(model.decode_flops(loaded.config, i + 1) - unembedding for i in range(count - 1))
    mfu = flops / seconds / matmul_flops
    print(f"prefill: {count} tokens in {1e3 * seconds:.1f} ms, {count / seconds:,.0f} tokens/s, MFU {mfu:.1%}")
    return {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds, "mfu": mfu}


def random_prompt(loaded: checkpoint.Pretrained, count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(loaded.config.vocab_size - 9), k=count))


def decode(
    config: Config, loaded: checkpoint.Pretrained, runtime: distributed.Runtime, limits: dict[str, float], batch: int
) -> dict[str, float]:
    """Return the times of decoding `batch` sequences, and the least that they could be."""
    import torch

    from nanochat import tree

    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    engine = start_engine(config, loaded, runtime, batch, config.compile)
    batch_requests = []
    for i in range(batch):
        prompt = random_prompt(loaded, config.prompt_tokens, i)
        batch_requests.append(infer.Request(prompt, config.new_tokens, config.temperature, config.top_k, seed=i))
    for _ in infer.run(engine, batch_requests):
        pass  # compiles, and records graphs
    first, steps = [], []
    for _ in range(config.rounds):
        begin, waiting = time.perf_counter(), set(range(batch))
        for i, request in enumerate(batch_requests):
            infer.admit(engine, i, request)
        while waiting:
            waiting -= {event.key for event in infer.step(engine)}
        first.append(time.perf_counter() - begin)
        while len(engine.active) == batch:
            begin = time.perf_counter()
            infer.step(engine)
            steps.append(time.perf_counter() - begin)
        while engine.active:
            infer.step(engine)
    seconds = statistics.median(steps)
    context = config.prompt_tokens + config.new_tokens // 2
    floor = (
        model.decode_bytes(loaded.config, batch, context, runtime.compute_dtype.itemsize)
        / limits["copy_bytes_per_second"]
    )
    return {
        "first_token_seconds": statistics.median(first),
        "step_seconds": seconds,
        "floor_seconds": floor,
        "tokens_per_second": batch / seconds,
        "bandwidth_use": floor / seconds,
        "mfu": batch * model.decode_flops(loaded.config, context) / seconds / limits["matmul_flops"],
        "peak_memory_bytes": distributed.peak_memory_bytes(runtime.device),
        "cache_bytes": tree.nbytes(engine.cache),
    }


# A running server


class Answer(NamedTuple):
    """What a client measured: seconds to the first chunk of a stream and between chunks, the server's token count."""

    first_seconds: float | None
    gap_seconds: list[float]
    tokens: int


def measure_server(config: ServerConfig) -> None:
    with request(config, "GET", "/stats") as response:
        stats = response.json()
    if not stats["model"]:
        raise UserError(f"{config.url}: its model is still being loaded")
    devices = ", ".join(f"{w['slots']} slots on {w['device']}" for w in stats["workers"])
    print(f"{stats['model']['name']}, step {stats['model']['step']}: {devices}")
    seeds = itertools.count()
    ask(config, next(seeds), True)  # warm-up
    rows = [["clients", "answers", "tokens/s", "speed-up", "answers/s", "first ms: 50%", "99%", "gap ms: 50%", "99%"]]
    rows[0].append("health ms")
    base = 0.0
    for clients in config.clients:
        answers, seconds, health = load_test(config, clients, seeds)
        rate = sum(answer.tokens for answer in answers) / seconds
        base = base or rate
        first = [answer.first_seconds for answer in answers if answer.first_seconds is not None]
        gaps = [gap for answer in answers for gap in answer.gap_seconds]
        times = [1000 * quantile(values, q) for values in (first, gaps) for q in (0.5, 0.99)]
        rows.append([str(clients), str(len(answers)), f"{rate:.1f}", f"{rate / base:.2f}"])
        rows[-1] += [f"{len(answers) / seconds:.2f}", *(f"{x:.1f}" for x in (*times, 1000 * health))]
        print(f"{clients} clients: {rate:.1f} tokens/s", flush=True)
    print(table(rows))


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def load_test(config: ServerConfig, clients: int, seeds: Iterator[int]) -> tuple[list[Answer], float, float]:
    """Let `clients` ask for `config.seconds`; return answers, total seconds, and those of the slowest /health."""
    start = time.perf_counter()
    end = start + config.seconds

    def client(number: int) -> list[Answer]:
        answers = []
        while not answers or time.perf_counter() < end:
            answers.append(ask(config, next(seeds), number < round(config.streaming * clients)))
        return answers

    def poll_health() -> float:
        slowest = 0.0
        while not all(future.done() for future in futures):
            begin = time.perf_counter()
            request(config, "GET", "/health").close()
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(0.1)
        return slowest

    with concurrent.futures.ThreadPoolExecutor(clients + 1) as threads:
        futures = [threads.submit(client, number) for number in range(clients)]
        health = threads.submit(poll_health)
        answers = [answer for future in futures for answer in future.result()]
        return answers, time.perf_counter() - start, health.result()


def ask(config: ServerConfig, seed: int, stream: bool) -> Answer:
    """Send one request and read the answer."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": config.prompt}], "stream": stream, "seed": seed}
    body |= {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_k": config.top_k}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    start, times, tokens = time.perf_counter(), [], 0
    try:
        with request(config, "POST", "/v1/chat/completions", json=body) as response:
            if not stream:
                return Answer(None, [], response.json()["usage"]["completion_tokens"])
            for line in response.iter_lines():
                if line.startswith(b'data: {"error"'):
                    raise UserError(f"{config.url}: {json.loads(line[6:])['error']['message']}")
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                elif line.startswith(b"data: {"):
                    times.append(time.perf_counter())
    except requests.RequestException as error:
        raise UserError(f"{config.url}: the stream broke off ({error})") from None
    chunks = times[1:-1] or times[-1:]  # without the role at the start and the finish reason at the end
    if not chunks:
        raise UserError(f"{config.url}: the stream had no answer")
    return Answer(chunks[0] - start, [b - a for a, b in itertools.pairwise(chunks)], tokens)


def request(config: ServerConfig, method: str, path: str, **options: Any) -> requests.Response:
    session = requests.Session()
    session.trust_env = False  # no proxy in between
    if config.token:
        session.headers["authorization"] = f"Bearer {config.token}"
    try:
        response = session.request(method, config.url.rstrip("/") + path, timeout=120, stream=True, **options)
    except (OSError, ValueError) as error:  # requests' own are both
        hint = "`python launch.py --experiment=web` starts one"
        raise UserError(f"server.url={config.url}: no server answers ({error}); {hint}") from None
    if response.status_code != 200:
        raise UserError(f"{config.url}{path}: status {response.status_code}, {response.text[:500]}")
    return response
