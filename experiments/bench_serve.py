"""Measure a running web server: tokens per second and waiting times by the number of clients at once.

    python launch.py --experiment=web                                   # in one terminal
    python launch.py --experiment=bench_serve                           # in another
    python launch.py --experiment=bench_serve --set url=http://host:8000 --set token=… --set clients=1,64

Each client asks one question after the other, with a seed of its own each, and reads the answer as it streams. Half a
minute for each number of clients (seconds=30). The table: answers, tokens per second of all clients and how many times
that of the first row, time to the first piece (median and 95th percentile) and between pieces, and how long /health
took at most meanwhile. Tokens are counted by the server. Run it on an otherwise idle machine; the clients take some of
its time as well if it is the server's.
"""

import concurrent.futures
import dataclasses
import http.client
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from nanochat.config import UserError
from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config:
    """A measurement.

    Attributes:
        url, token: of the server. clients: how many at once, one row of the table each. seconds: a row.
        prompt, max_tokens, temperature, top_k: of every question.
    """

    url: str = "http://localhost:8000"
    token: str | None = dataclasses.field(default=None, repr=False)
    clients: tuple[int, ...] = (1, 4, 16, 64)
    seconds: float = 30.0
    prompt: str = "Tell me a long story about the sea."
    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50


class Answer(NamedTuple):
    """What a client saw: seconds to the first piece, between pieces, and the server's count of tokens."""

    first_seconds: float
    gaps_seconds: list[float]
    tokens: int


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Measure and print the table."""
    if runtime.world_size > 1:
        raise UserError("bench_serve runs in one process: start it with python, not torchrun")
    if not config.clients or min(config.clients) < 1 or config.seconds <= 0:
        raise UserError("clients: expected numbers from 1 on; seconds: a number above 0")
    stats = json.loads(fetch(config, "/stats"))
    if not stats["model"]:
        raise UserError(f"{config.url}: its model is still being loaded")
    devices = ", ".join(f"{w['slots']} slots on {w['device']}" for w in stats["workers"])
    print(f"{stats['model']['name']}, step {stats['model']['step']}: {devices}")
    seeds = itertools.count()
    ask(config, next(seeds))  # warm
    print("clients  answers  tokens/s  times  first ms: 50%    95%  gap ms  health ms")
    base = 0.0
    for clients in config.clients:
        answers, seconds, health = measure(config, clients, seeds)
        rate = sum(answer.tokens for answer in answers) / seconds
        base = base or rate
        first = sorted(1000 * answer.first_seconds for answer in answers)
        gaps = [1000 * gap for answer in answers for gap in answer.gaps_seconds]
        gap = statistics.median(gaps) if gaps else 0.0
        late = first[min(len(first) - 1, int(0.95 * len(first)))]
        row = f"{clients:>7}{len(answers):>9}{rate:>10.1f}{rate / base:>7.2f}{statistics.median(first):>15.1f}"
        print(f"{row}{late:>7.1f}{gap:>8.1f}{1000 * health:>11.1f}", flush=True)


def measure(config: Config, clients: int, seeds: Iterator[int]) -> tuple[list[Answer], float, float]:
    """Let so many clients ask for `config.seconds`; an answer under way then is read to its end.

    Returns:
        (answers, seconds that all of it took, the slowest answer of /health in seconds).
    """
    start = time.perf_counter()
    end = start + config.seconds

    def client() -> list[Answer]:
        answers = []
        while not answers or time.perf_counter() < end:
            answers.append(ask(config, next(seeds)))
        return answers

    def nurse() -> float:
        slowest = 0.0
        while not all(future.done() for future in futures):
            asked = time.perf_counter()
            fetch(config, "/health")
            slowest = max(slowest, time.perf_counter() - asked)
            time.sleep(0.1)
        return slowest

    with concurrent.futures.ThreadPoolExecutor(clients + 1) as threads:
        futures = [threads.submit(client) for _ in range(clients)]
        health = threads.submit(nurse)
        answers = [answer for future in futures for answer in future.result()]
        seconds = time.perf_counter() - start
        return answers, seconds, health.result()


def ask(config: Config, seed: int) -> Answer:
    """Ask once and read the stream.

    Raises:
        UserError: the server refuses, or the stream breaks off.
    """
    sampling = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_k": config.top_k, "seed": seed}
    body = {"messages": [{"role": "user", "content": config.prompt}], "stream": True, **sampling}
    body["stream_options"] = {"include_usage": True}
    start, times, tokens = time.perf_counter(), [], 0
    connection, response = request(config, "/v1/chat/completions", json.dumps(body))
    try:
        for line in response:
            if line.startswith(b'data: {"error"'):
                raise UserError(f"{config.url}: {json.loads(line[6:])['error']['message']}")
            if b'"completion_tokens"' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif line.startswith(b"data: {"):
                times.append(time.perf_counter())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{config.url}: a stream broke off ({error})") from None
    finally:
        connection.close()
    pieces = times[1:-1] or times[-1:]  # without the role at the beginning and the reason at the end
    if not pieces:
        raise UserError(f"{config.url}: a stream ended without an answer")
    return Answer(pieces[0] - start, [b - a for a, b in itertools.pairwise(pieces)], tokens)


def fetch(config: Config, path: str) -> bytes:
    """Return what a GET gives. Raises: UserError."""
    connection, response = request(config, path)
    try:
        return response.read()
    finally:
        connection.close()


def request(
    config: Config, path: str, body: str | None = None
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Send a request, a POST if it has a body.

    Raises:
        UserError: nobody answers, or not with 200.
    """
    url = urlsplit(config.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    headers = {"content-type": "application/json"}
    if config.token:
        headers["authorization"] = f"Bearer {config.token}"
    try:
        connection = kind(url.netloc, timeout=120)
        connection.request("POST" if body else "GET", path, body, headers)
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        started = "`python launch.py --experiment=web` starts one"
        raise UserError(f"url={config.url}: no server answers ({error}); {started}") from None
    if response.status != 200:
        said = response.read(500).decode("utf-8", "replace")
        connection.close()
        raise UserError(f"{config.url}{path}: status {response.status}, {said}")
    return connection, response
