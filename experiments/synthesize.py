"""Generate conversations about the assistant's identity with a large model at any OpenAI-compatible endpoint.

    export OPENAI_API_KEY=…
    python launch.py --experiment=synthesize --set model=gpt-4.1-mini --set count=1000
    python launch.py --experiment=synthesize --set base_url=http://localhost:80/v1 --set key_variable=none --set model=…
    python launch.py --experiment=synthesize --set facts=about_my_model.txt --set output=mine.jsonl --set model=…

The prompt of conversation i has a topic, a persona and an opening drawn from seed i (experiments/prompts/identity.txt).
Answers that do not fit the JSON schema, and failed requests, are retried with exponential backoff. Appends to a jsonl
file that `identity:<file>` and `customjson:<file>` read. The same command resumes and skips the seeds in the file. A
thousand conversations take some minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import string
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from nanochat import jsonl, text
from nanochat.config import NonNegativeFloat, PositiveFloat, PositiveInt, Settings, UserError, base_dir
from nanochat.metrics import progress
from nanochat.text import format_duration

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

PROMPTS = Path(__file__).parent / "prompts" / "identity.txt"
MAX_RESPONSE_BYTES = 2**20
MAX_MESSAGES, MAX_CHARACTERS = 16, 4000
MAX_FAILURES_IN_A_ROW = 10
MAX_WAIT_SECONDS = 60.0
MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {"role": {"type": "string", "enum": ["user", "assistant"]}, "content": {"type": "string"}},
    "required": ["role", "content"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"messages": {"type": "array", "items": MESSAGE_SCHEMA}},
    "required": ["messages"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to generate, and at which endpoint.

    Attributes:
        model: the model's name at the endpoint.
        base_url: the endpoint, as OpenAI's clients take it.
        key_variable: environment variable that holds the API key; none: send no key.
        output: file to append to; none: identity.jsonl in the base folder.
        count: number of conversations, including those of earlier runs.
        seed: seed of the first conversation.
        facts: a text file about the assistant; none: facts about nanochat.
        temperature: sampling temperature.
        schema: request output that follows the JSON schema; false for endpoints without structured outputs.
        workers: concurrent requests.
        attempts: number of attempts for each conversation.
        timeout_seconds: time limit of an attempt.
        backoff_seconds: wait after the first failed attempt, doubled after each further one, up to a minute.
    """

    model: str | None = None
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    output: Path | None = None
    count: PositiveInt = 1000
    seed: int = 0
    facts: Path | None = None
    temperature: NonNegativeFloat = 1.0
    schema: bool = True
    workers: PositiveInt = 8
    attempts: PositiveInt = 5
    timeout_seconds: PositiveFloat = 120.0
    backoff_seconds: NonNegativeFloat = 1.0


class RequestError(Exception):
    """A failed attempt; `retry`: another one may succeed, after the seconds that the server asked for."""

    def __init__(self, reason: str, *, retry: bool = True, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry, self.wait_seconds = retry, wait_seconds


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    if config.model is None:
        raise UserError("set the model's name at the endpoint: --set model=…")
    path = config.output or base_dir() / "identity.jsonl"
    key = os.environ.get(config.key_variable, "").strip() if config.key_variable else ""
    if config.key_variable and not key:
        raise UserError(
            f"the environment variable {config.key_variable} holds no API key: export {config.key_variable}=…, use "
            "another one (--set key_variable=…), or send none (--set key_variable=none)"
        )
    facts = jsonl.read_text(config.facts, f"facts={config.facts}") if config.facts else prompt_sections()["facts"]
    finished = read_seeds(path)
    seeds = [seed for seed in range(config.seed, config.seed + config.count) if seed not in finished]
    print(f"{config.count} conversations, {config.count - len(seeds)} of them are in {path}", flush=True)
    jsonl.append(path)  # fails now if the file cannot be written
    start = time.monotonic()
    failures = generate(config, path, key, facts, seeds) if seeds else Counter()
    print(f"{len(seeds) - failures.total()} written to {path} in {format_duration(time.monotonic() - start)}")
    if failures:
        reasons = ", ".join(f"{reason} ({count}x)" for reason, count in failures.most_common(3))
        raise UserError(f"{failures.total()} of {len(seeds)} failed: {reasons}; the same command retries them")
    print("next: look at them (this needs a tokenizer), and fine-tune with them:")
    print(f"  python launch.py --experiment=tasks --set task=identity:{path}")
    print(f"  torchrun launch.py --experiment=sft --set tasks=smoltalk,2*identity:{path}")


def generate(config: Config, path: Path, key: str, facts: str, seeds: Sequence[int]) -> Counter[str]:
    """Append the conversations of the seeds to `path` as they arrive; return the number of failures by reason."""
    failures: Counter[str] = Counter()
    stop, in_a_row = threading.Event(), 0

    def work(seed: int) -> tuple[int, list[dict[str, str]] | str]:
        try:
            return seed, request_conversation(config, key, build_prompt(facts, seed), seed, stop)
        except UserError:  # every other request would fail as well
            stop.set()
            raise

    # The pool's threads are daemons and are not joined: Ctrl-C does not wait for pending answers.
    with (
        progress.Bar(len(seeds), label="synthesize", unit="conversation") as bar,
        ThreadPool(min(config.workers, len(seeds))) as pool,
    ):
        try:
            for seed, result in pool.imap_unordered(work, seeds):
                if isinstance(result, str):
                    failures[result] += 1
                    in_a_row += 1
                    if in_a_row >= MAX_FAILURES_IN_A_ROW:
                        raise UserError(
                            f"{in_a_row} conversations in a row failed, the last: {result}; {path} has the earlier "
                            "ones, and the same command resumes"
                        )
                else:
                    in_a_row = 0
                    jsonl.append(path, {"messages": result, "seed": seed, "model": config.model})
                bar.update(failed=failures.total())
        finally:
            stop.set()
    return failures


def request_conversation(
    config: Config, key: str, prompt: str, seed: int, stop: threading.Event
) -> list[dict[str, str]] | str:
    """Request a conversation until it is valid, attempts are used up, or `stop` is set; return it or the reason."""
    reason, wait = "stopped", 0.0
    for attempt in range(config.attempts):
        if stop.wait(wait):
            break
        wait = config.backoff_seconds * 2**attempt
        try:
            return parse_messages(post(config, key, prompt, seed + 1_000_003 * attempt))
        except RequestError as error:
            reason, wait = str(error), max(wait, error.wait_seconds)
            if not error.retry:
                break
        except requests.RequestException as error:
            reason = f"{type(error).__name__}: {text.reason(error)}"
            if isinstance(error, requests.Timeout) or "timed out" in str(error).lower():
                reason = "timed out"
            elif isinstance(error, requests.ConnectionError):
                reason = f"cannot connect to {config.base_url}"
        wait = min(wait, MAX_WAIT_SECONDS)
    return reason


def build_prompt(facts: str, seed: int) -> str:
    """Return the prompt for the large model; topic, persona, opening and length are drawn from the seed."""
    sections, rng = prompt_sections(), random.Random(seed)
    drawn = {name: rng.choice(sections[f"{name}s"].splitlines()) for name in ("topic", "persona", "opening")}
    count = rng.choice((1, 1, 2, 2, 3, 4))
    exchanges = f"{count} message{'s' if count > 1 else ''}"
    return string.Template(sections["prompt"]).substitute(drawn, facts=facts.strip(), exchanges=exchanges)


@functools.cache
def prompt_sections() -> dict[str, str]:
    """Return the sections of the prompt file by their headings: prompt, facts, topics, personas, openings."""
    sections = re.findall(r"^# (\w+)\n(.*?)(?=^# \w+\n|\Z)", PROMPTS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {name: section.strip() for name, section in sections}


def post(config: Config, key: str, prompt: str, seed: int) -> str:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": config.model, "messages": messages, "temperature": config.temperature, "seed": seed}
    if config.schema:
        schema = {"name": "conversation", "schema": SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    url, deadline = f"{config.base_url.rstrip('/')}/chat/completions", time.monotonic() + config.timeout_seconds
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with requests.post(url, json=body, headers=headers, timeout=config.timeout_seconds, stream=True) as response:
        content = b""
        for chunk in response.iter_content(2**14):
            content += chunk
            if len(content) > MAX_RESPONSE_BYTES:
                raise RequestError(f"the response is over {MAX_RESPONSE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise RequestError("timed out")
    status, retry_after = response.status_code, response.headers.get("Retry-After", "")
    if status in (408, 409, 425, 429) or status >= 500:
        raise RequestError(f"HTTP {status}", wait_seconds=float(retry_after) if retry_after.isdigit() else 0.0)
    if status != 200:
        raise refusal(config, status, content, key)
    try:
        choice = json.loads(content)["choices"][0]
        answer, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RequestError("the response does not have OpenAI's form") from None
    if not isinstance(answer, str) or finish == "length":
        raise RequestError("the answer was truncated" if finish == "length" else "the answer has no text")
    return answer


def refusal(config: Config, status: int, content: bytes, key: str) -> Exception:
    """Return the error of a refused request, with the first line of the endpoint's message but without the key."""
    try:
        error = json.loads(content)["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        message = content.decode("utf-8", "replace")
    line = (message.strip().splitlines() or [""])[0][:200]
    advice = "; if it does not support JSON schemas: --set schema=false" if config.schema else ""
    if status in (401, 403):
        advice = f"; is the key in {config.key_variable} right?" if config.key_variable else "; set key_variable"
    elif status == 404:
        advice = "; are base_url and model right?"
    reason = f"HTTP {status} {line.replace(key, '…') if key else line}{advice}"
    if status in (400, 422):  # may be due to this one prompt
        return RequestError(reason, retry=False)
    return UserError(f"{config.base_url} refuses the request: {reason}")


def parse_messages(answer: str) -> list[dict[str, str]]:
    """Return the messages of an answer: JSON, bare or in a code block."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", answer, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except ValueError:
        raise RequestError("the answer is not valid JSON") from None
    messages = value["messages"] if isinstance(value, dict) and value.keys() == {"messages"} else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(field, str) for field in message.values())
        for message in messages
    ):
        raise RequestError("the answer does not fit the schema")
    if not 1 <= len(messages) // 2 <= MAX_MESSAGES // 2:
        raise RequestError("the conversation has too few or too many messages")
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise RequestError("user and assistant do not take turns, or the conversation ends with the user")
    messages = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    if not all(0 < len(message["content"]) <= MAX_CHARACTERS for message in messages):
        raise RequestError("a message is empty or too long")
    return messages


def read_seeds(path: Path) -> set[int]:
    """Return the seeds of the conversations in a file, without a partial last line."""
    rows = jsonl.read(path, missing_ok=True, drop_partial=True)
    foreign = [number for number, row in rows if not isinstance(row, dict) or "seed" not in row]
    if foreign or (not rows and path.exists() and path.stat().st_size):
        line = min(foreign, default=1)
        raise UserError(f"output={path} line {line}: not written by synthesize; choose another file")
    return {row["seed"] for _, row in rows}
