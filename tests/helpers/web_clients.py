"""Clients of a web server, in a process of their own that leaves the server the first turn on the cores.

    python web_clients.py URL REQUESTS SEED < {"questions": [...], "answers": [...]}

sends REQUESTS requests from CLIENTS clients: some malformed, some disconnected midway; a complete answer must be the
known one. Prints how many were complete.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CLIENTS = 64
NICE = 10
MALFORMED = (b"{", b'{"messages": []}', b"\xff\xfe", b'{"messages": [{"role": "user", "content": ""}], "seed": 1}')


class Sent(NamedTuple):
    """A request in progress: status and head of its response, and a reader of the rest."""

    status: int
    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@contextlib.asynccontextmanager
async def post(url: str, path: str, content: bytes) -> AsyncIterator[Sent]:
    """Post with as little work as possible: a slow client would measure itself."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        received = await reader.readuntil(b"\r\n\r\n")
        yield Sent(int(received.split(b" ", 2)[1]), received, reader, writer)
    finally:
        writer.close()


async def whole_answer(url: str, question: dict[str, Any]) -> str:
    """Return a complete streamed answer."""
    async with post(url, "/chat/completions", json.dumps(question).encode()) as sent:
        assert sent.status == 200, await sent.reader.read()
        raw = await sent.reader.read()
    assert raw.endswith(b"\r\n0\r\n\r\n"), "the response is complete"
    *events, last = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]
    assert last.get("done") is True, last
    return "".join(event["token"] for event in events)


async def load(url: str, questions: list[dict[str, Any]], answers: list[str], requests: int, rng: random.Random) -> int:
    """Send `requests` requests from CLIENTS clients; returns how many answers were complete."""
    remaining, complete = iter(range(requests)), 0

    async def client() -> None:
        nonlocal complete
        for _ in remaining:
            kind, which = rng.random(), rng.randrange(len(questions))
            content = json.dumps(questions[which]).encode()
            if kind < 0.1:
                async with post(url, "/chat/completions", rng.choice(MALFORMED)) as sent:
                    assert sent.status == 400 and b'{"error":{"message":' in await sent.reader.read()
            elif kind < 0.25:  # disconnects, at once or midway
                async with post(url, "/chat/completions", content) as sent:
                    assert sent.status == 200
                    for _ in range(rng.randrange(8)):
                        await sent.reader.readline()
            elif kind < 0.4:
                async with post(url, "/v1/chat/completions", content) as sent:
                    message = json.loads(await sent.reader.read())["choices"][0]["message"]
                parts = [part["text"] for part in message.get("nanochat_parts", ())]  # it calls tools as well
                assert ("".join(parts) or message["content"]) == answers[which]
                complete += 1
            else:
                assert await whole_answer(url, questions[which]) == answers[which]
                complete += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return complete


def main() -> None:
    os.nice(NICE)
    url, requests, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(asyncio.run(load(url, **json.load(sys.stdin), requests=requests, rng=random.Random(seed))))


if __name__ == "__main__":
    main()
