"""Have a large model write conversations about who the assistant is, over any endpoint that speaks OpenAI's protocol.

    export OPENAI_API_KEY=…
    python launch.py --experiment=synthesize --set model=gpt-4.1-mini --set count=1000
    python launch.py --experiment=synthesize --set base_url=http://localhost:80/v1 --set key_variable=none --set model=…
    python launch.py --experiment=synthesize --set facts=about_my_model.txt --set output=mine.jsonl --set model=…

Conversation i is asked for with a topic, a persona and an opening that are drawn from seed i, so that a thousand of
them are a thousand different ones. What comes back has to fit a JSON schema; what does not, and what fails on the way,
is tried again, waiting longer each time. Appends to a jsonl file that `identity:<file>` and `customjson:<file>` read;
the same command goes on after a stop, and skips the seeds that are there. A thousand take some minutes, 8 at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import requests

from experiments import _identity_prompts, chat
from nanochat.config import UserError, base_dir
from nanochat.data import chat_format
from nanochat.metrics import progress
from nanochat.text import format_duration

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

MAX_RESPONSE_BYTES = 2**20
MAX_MESSAGES, MAX_CHARACTERS = 16, 4000
GIVE_UP = 10
"""So many failures without a success in between, and the rest is not worth a try."""
MAX_WAIT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What to ask for, and whom.

    Attributes:
        model: its name at the endpoint. base_url: of the endpoint, as OpenAI's clients take it.
        key_variable: environment variable that holds the API key; none: no key is sent.
        output: file to append to; none: identity.jsonl in the base folder.
        count: conversations in all, those of earlier runs included. seed: of the first one.
        facts: a text file about the assistant; none: facts about nanochat.
        temperature: of the sampling. schema: ask the endpoint to keep to the JSON schema; false where it cannot.
        workers: requests at once. attempts: for a conversation. timeout_seconds: for an attempt.
        backoff_seconds: wait after the first failure; doubled after each further one, up to a minute.
    """

    model: str | None = None
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    output: Path | None = None
    count: int = 1000
    seed: int = 0
    facts: Path | None = None
    temperature: float = 1.0
    schema: bool = True
    workers: int = 8
    attempts: int = 5
    timeout_seconds: float = 120.0
    backoff_seconds: float = 1.0

    def __post_init__(self) -> None:
        chat.check_settings(self, count=1, temperature=0, workers=1, attempts=1, backoff_seconds=0)
        if self.timeout_seconds <= 0:
            raise UserError(f"timeout_seconds={self.timeout_seconds}: must be above 0")


class Asked(NamedTuple):
    """What came of a seed: messages, or the reason why there are none; `fatal` if no other seed would fare better."""

    seed: int
    messages: list[dict[str, str]]
    reason: str = ""
    fatal: bool = False


class TryAgain(Exception):
    """A failure that may pass; `wait_seconds` is what the server asked for."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Refused(Exception):
    """A failure that trying again does not mend; `fatal` if every other request would meet it as well."""

    def __init__(self, reason: str, fatal: bool) -> None:
        super().__init__(reason)
        self.fatal = fatal


def config() -> Config:
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    if config.model is None:
        raise UserError("set the model's name at the endpoint: --set model=…")
    path = config.output or base_dir() / "identity.jsonl"
    key, facts = read_key(config), read_facts(config)
    there = read_seeds(path)
    wanted = range(config.seed, config.seed + config.count)
    seeds = [seed for seed in wanted if seed not in there]
    print(f"{config.count} conversations, {config.count - len(seeds)} of them are in {path}", flush=True)
    began, failures = time.monotonic(), Counter[str]()
    if seeds:
        failures = collect(config, path, key, facts, seeds)
    added = len(seeds) - failures.total()
    print(f"{added} written to {path} in {format_duration(time.monotonic() - began)}")
    if failures:
        reasons = ", ".join(f"{reason} ({count}x)" for reason, count in failures.most_common(3))
        raise UserError(f"{failures.total()} of {len(seeds)} failed: {reasons}; the same command tries these again")
    print("next: look at them, with a tokenizer at hand, and fine-tune with them:")
    print(f"  python launch.py --experiment=tasks --set task=identity:{path}")
    print(f"  torchrun launch.py --experiment=sft --set tasks=smoltalk,2*identity:{path}")


def collect(config: Config, path: Path, key: str, facts: str, seeds: Sequence[int]) -> Counter[str]:
    """Append the conversations of the seeds to `path` as they come; returns how many failed for which reason.

    Raises:
        UserError: the endpoint refuses every request, too many fail in a row, or the file cannot be written.
    """
    failures: Counter[str] = Counter()
    in_a_row = 0
    with appended(path) as file, progress.bar(len(seeds), label="synthesize", unit="conversation") as bar:
        for asked in ask_all(config, key, facts, seeds):
            if asked.fatal:
                raise UserError(f"{config.base_url} refuses the request: {asked.reason}")
            if asked.reason:
                failures[asked.reason] += 1
                in_a_row += 1
                if in_a_row >= GIVE_UP:
                    raise UserError(
                        f"{in_a_row} conversations in a row failed, the last: {asked.reason}; {path} has what came "
                        "before, and the same command goes on"
                    )
            else:
                in_a_row = 0
                line = {"messages": asked.messages, "seed": asked.seed, "model": config.model}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
            bar.update(failed=failures.total())
    return failures


def ask_all(config: Config, key: str, facts: str, seeds: Sequence[int]) -> Iterator[Asked]:
    """Yield what comes of each seed, as it comes, from several threads."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    stop = threading.Event()
    for seed in seeds:
        todo.put(seed)

    def work() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                try:
                    seed = todo.get_nowait()
                except queue.Empty:
                    return
                asked = ask(session, config, key, facts, seed, stop)
                if asked.fatal:
                    stop.set()
                done.put(asked)

    # Daemon threads: Ctrl-C need not wait for an answer that is still being written.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(config.workers, len(seeds)))]
    try:
        for thread in threads:
            thread.start()
        for _ in seeds:
            yield done.get()
    finally:
        stop.set()


def ask(
    session: requests.Session, config: Config, key: str, facts: str, seed: int, stop: threading.Event | None = None
) -> Asked:
    """Ask for the conversation of a seed until it is good, or the attempts are used up."""
    stop, reason = stop or threading.Event(), ""
    for attempt in range(config.attempts):
        wait = 0.0
        try:
            return Asked(seed, checked(post(session, config, key, request(config, facts, seed, attempt))))
        except Refused as error:
            return Asked(seed, [], str(error), error.fatal)
        except TryAgain as error:
            reason, wait = str(error), error.wait_seconds
        except requests.Timeout:
            reason = "timed out"
        except requests.ConnectionError as error:
            reason = "timed out" if "timed out" in str(error).lower() else f"cannot connect to {config.base_url}"
        except Exception as error:  # a thread must always report back
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if attempt + 1 < config.attempts:
            stop.wait(min(MAX_WAIT_SECONDS, max(wait, config.backoff_seconds * 2**attempt)))
        if stop.is_set():
            break
    return Asked(seed, [], reason)


def request(config: Config, facts: str, seed: int, attempt: int) -> dict[str, Any]:
    """Return the body of a request for the conversation of a seed; another attempt samples anew."""
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": _identity_prompts.prompt(facts, seed)}],
        "temperature": config.temperature,
        "seed": seed + 1_000_003 * attempt,
    }
    if config.schema:
        schema = {"name": "conversation", "schema": _identity_prompts.SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def post(session: requests.Session, config: Config, key: str, body: Mapping[str, Any]) -> str:
    """Send a request and return the text of the answer.

    Raises:
        TryAgain, Refused: as the status says. requests.RequestException: there was no answer.
    """
    url, deadline = f"{config.base_url.rstrip('/')}/chat/completions", time.monotonic() + config.timeout_seconds
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with session.post(url, json=body, headers=headers, timeout=config.timeout_seconds, stream=True) as response:
        content = b""
        for chunk in response.iter_content(2**14):
            content += chunk
            if len(content) > MAX_RESPONSE_BYTES:
                raise TryAgain(f"the answer is over {MAX_RESPONSE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TryAgain("timed out")
        status = response.status_code
        if status in (408, 409, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "")
            raise TryAgain(f"HTTP {status}", float(asked) if asked.isdigit() else 0.0)
        if status != 200:
            fatal = status not in (400, 422)  # these may be about what this one prompt says
            raise Refused(f"HTTP {status} {_explained(content, key)}{_advice(config, status)}", fatal)
    try:
        choice = json.loads(content)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise TryAgain("the response is not of OpenAI's form") from None
    if not isinstance(text, str) or finish == "length":
        raise TryAgain("the answer was cut off" if finish == "length" else "the answer has no text")
    return text


def checked(text: str) -> list[dict[str, str]]:
    """Return the messages that an answer holds as JSON, bare or in a fence.

    Raises:
        TryAgain: it does not fit the schema, or is no conversation to learn from.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError:
        raise TryAgain("the answer is no JSON") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or set(value) != {"messages"}:
        raise TryAgain("the answer does not fit the schema")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise TryAgain("the answer does not fit the schema")
        if not isinstance(message["content"], str) or not 0 < len(message["content"].strip()) <= MAX_CHARACTERS:
            raise TryAgain("a message is empty, too long, or no text")
    try:
        chat_format.check(value)
    except UserError:
        raise TryAgain("user and assistant do not take turns") from None
    if not 2 <= len(messages) <= MAX_MESSAGES or len(messages) % 2 or messages[0]["role"] != "user":
        raise TryAgain("the conversation has too few or too many messages, or ends with the user")
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


def read_key(config: Config) -> str:
    """Return the API key. Raises: UserError: the variable that should hold it is not set."""
    if config.key_variable is None:
        return ""
    key = os.environ.get(config.key_variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.key_variable} holds no API key: export {config.key_variable}=…, name "
            "another one (--set key_variable=…), or send none (--set key_variable=none)"
        )
    return key


def read_facts(config: Config) -> str:
    """Return what the conversations shall say about the assistant. Raises: UserError."""
    if config.facts is None:
        return _identity_prompts.FACTS
    try:
        return config.facts.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"facts={config.facts}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_seeds(path: Path) -> set[int]:
    """Return the seeds whose conversations are in a file, after cutting off a last line that was not finished.

    Raises:
        UserError: a line is not of this experiment's form, so that nothing is appended to a file of something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"output={path}: cannot be read ({error.strerror})") from None
    seeds = set()
    for number, line in enumerate(lines, start=1):
        try:
            seeds.add(json.loads(line)["seed"])
        except (ValueError, LookupError, TypeError):
            if number < len(lines):
                raise UserError(f"output={path} line {number}: not by synthesize; choose another file") from None
            os.truncate(path, path.stat().st_size - len(line))  # nothing, or the process was killed within it
        else:
            if number == len(lines):
                path.write_bytes(b"\n".join([*lines, b""]))  # an editor took the last line break
    return seeds


@contextlib.contextmanager
def appended(path: Path) -> Iterator[Any]:
    """Give a file to append bytes to. Raises: UserError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            yield file
    except OSError as error:
        raise UserError(f"output={path}: cannot be written ({error.strerror or error})") from None


def _explained(content: bytes, key: str) -> str:
    """Return the first line of what an endpoint says about an error, without the key in it."""
    try:
        said = json.loads(content)["error"]
        text = str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        text = content.decode("utf-8", "replace")
    line = (text.strip().splitlines() or [""])[0][:200]
    return line.replace(key, "…") if key else line


def _advice(config: Config, status: int) -> str:
    if status in (401, 403):
        return (
            f"; is the key in {config.key_variable} right?" if config.key_variable else "; it wants a key: key_variable"
        )
    if status == 404:
        return "; are base_url and model right?"
    return "; if it cannot keep to a JSON schema: --set schema=false" if config.schema else ""
