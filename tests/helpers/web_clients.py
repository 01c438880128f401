"""Clients of a web server, in a process of their own that leaves the server the first turn on the cores.

    python web_clients.py URL REQUESTS SEED < {"questions": [...], "answers": [...]}

sends REQUESTS requests from CLIENTS clients: some malformed, some disconnected midway; a complete answer must be the
known one. Prints how many were complete.
"""

import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

CLIENTS = 64
NICE = 10
MALFORMED = (b"{", b'{"messages": []}', b"\xff\xfe", b'{"messages": [{"role": "user", "content": ""}], "seed": 1}')


def ask(http: httpx.Client, question: dict[str, Any]) -> str:
    """Return a complete streamed answer."""
    response = http.post("/chat/completions", json=question)
    assert response.status_code == 200, response.text
    *events, last = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: ")]
    assert last.get("done") is True, last
    return "".join(event["token"] for event in events)


def send(http: httpx.Client, question: dict[str, Any], answer: str, rng: random.Random) -> bool:
    """Send some request; returns whether its answer was complete."""
    kind = rng.random()
    if kind < 0.1:
        headers = {"content-type": "application/json"}
        response = http.post("/chat/completions", content=rng.choice(MALFORMED), headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"]
        return False
    if kind < 0.25:  # disconnects, at once or midway
        with http.stream("POST", "/chat/completions", json=question) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            for _ in range(rng.randrange(8)):
                next(lines, None)
        return False
    if kind < 0.4:
        message = http.post("/v1/chat/completions", json=question).json()["choices"][0]["message"]
        parts = [part["text"] for part in message.get("nanochat_parts", ())]  # it calls tools as well
        assert ("".join(parts) or message["content"]) == answer
    else:
        assert ask(http, question) == answer
    return True


def main() -> None:
    os.nice(NICE)
    url, requests, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    known = json.load(sys.stdin)
    pairs = list(zip(known["questions"], known["answers"]))

    def client(number: int) -> bool:
        rng = random.Random(f"{seed} {number}")
        return send(http, *rng.choice(pairs), rng)

    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(CLIENTS) as pool:
        print(sum(pool.map(client, range(requests))))


if __name__ == "__main__":
    main()
