"""Talk to a trained model in the terminal, or complete plain text with `complete=true`; answers stream.

    python launch.py --experiment=chat                                  # the run that was saved last
    python launch.py --experiment=chat --set run=quickstart --set temperature=0.9
    python launch.py --experiment=chat --set prompt="Why is the sky blue?" > answer.txt
    python launch.py --experiment=chat < questions.txt                  # each line is a message
    python launch.py --experiment=chat --set complete=true --set prompt="The capital of France is"
    python launch.py --experiment=chat --set complete=true --set prompts=prompts.jsonl --set output=out.jsonl

At the prompt, `clear` starts a new conversation, `quit` or Ctrl-D leaves, arrow keys recall the history; Ctrl-C stops
an answer, and leaves at the prompt. Text goes to standard output, tool calls and notes to standard error. When a
conversation outgrows the model's context, its oldest exchanges are dropped, with a note.

With `complete=true` the text follows <|bos|> as in pretraining, so this is the way to use a base model. A file of
prompts has one per line: JSON if its name ends in .jsonl (a string, or an object with "prompt"), else plain text. The
output has one JSON object per line, in the order of the prompts: what the prompt's object had, and prompt, sample,
completion, finish ("stop" or "length"), tokens, seed. A completion's seed is `seed` plus its number in the output: the
prompt alone with that seed gives it again, up to the rounding of matrix products, which depends on the load.

Takes about five seconds to start. compile=true takes up to a minute more, and pays off after thousands of tokens.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from nanochat import checkpoint, data, infer, jsonl
from nanochat.config import Device, Dtype, UserError
from nanochat.data import chat_format
from nanochat.metrics import progress

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.data import Message, Piece, Tokenizer
    from nanochat.distributed import Runtime

HELP = "`clear` starts a new conversation, `quit` or Ctrl-D leaves, Ctrl-C stops an answer"
PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model may write anything, but must not move the cursor or rename the window.
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclasses.dataclass(frozen=True)
class Config:
    """A chat, or completions of plain text.

    Attributes:
        run: a run's name, or the path of its folder; default: the run that was saved last.
        step: of the checkpoint; default: the newest.
        prompt: answer or complete this text only; `-` reads it from standard input.
        temperature: of sampling, 0 is greedy; default: 0.6, and 0.8 with complete.
        top_k: sample among the k most likely tokens; 0: among all.
        max_tokens: limit per answer; default: 512, and 256 with complete.
        seed: of the first answer, the next one has seed + 1; default: random, and 42 with complete.
        compile: with torch.compile.
        verbose: show tokens per second and the seed after each answer.
        device: auto, cuda, mps or cpu.
        dtype: auto, float32, bfloat16 or float16.
        complete: complete plain text instead of chatting.
        prompts: with complete, a file of prompts.
        output: with complete, the file for completions as JSON Lines; default: standard output.
        samples: with complete, completions per prompt.
        slots: with complete, completions computed at once.
    """

    run: str | None = None
    step: int | None = None
    prompt: str | None = None
    temperature: float | None = None
    top_k: int = 50
    max_tokens: int | None = None
    seed: int | None = None
    compile: bool = False
    verbose: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    complete: bool = False
    prompts: Path | None = None
    output: Path | None = None
    samples: int = 1
    slots: int = 16

    def __post_init__(self) -> None:
        check_settings(self, temperature=0, top_k=0, max_tokens=1, samples=1, slots=1)
        if not self.complete and (self.prompts or self.output or self.samples > 1):
            raise UserError("prompts, output and samples are for plain text: add --set complete=true")

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of an `infer.Request`."""
        defaults = (0.8, 256) if self.complete else (0.6, 512)
        temperature = defaults[0] if self.temperature is None else self.temperature
        return {"temperature": temperature, "top_k": self.top_k, "max_tokens": self.max_tokens or defaults[1]}


class Answer(NamedTuple):
    """All tokens of an answer, those of tools included; finish is "stop", "length" or "cancelled"."""

    tokens: list[int]
    finish: str
    seconds: float
    first_seconds: float


@dataclasses.dataclass
class Chat:
    """A conversation; `n_answers` counts those of earlier conversations too."""

    config: Config
    model: Pretrained
    engine: infer.Engine
    screen: Screen
    messages: list[Message] = dataclasses.field(default_factory=list)
    n_answers: int = 0


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if runtime.world_size > 1:
        raise UserError("chat runs in a single process: start it with python, not torchrun")
    replace_encoding_errors()
    (complete if config.complete else chat)(config, runtime)


def load(config: Config, runtime: Runtime, slots: int) -> tuple[Pretrained, infer.Engine, Screen]:
    """Return the model that the settings name, and an engine for it; the model is described on the screen."""
    device: dict[str, Any] = {"device": runtime.device, "dtype": runtime.compute_dtype}
    model = checkpoint.load(config.run, step=config.step, **device)
    engine = infer.start(model.params, model.config, model.tokenizer, slots=slots, compile=config.compile, **device)
    screen = Screen(sys.stdout, sys.stderr)
    screen.note(checkpoint.describe_model(model))
    return model, engine, screen


# Conversations


def chat(config: Config, runtime: Runtime) -> None:
    """Answer the prompt, or what is typed or piped in."""
    prompt = read_prompt(config.prompt)
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: is empty; give it some text, or omit it to type messages")
    model, engine, screen = load(config, runtime, slots=1)
    if warning := checkpoint.warning(model):
        screen.note(warning)
    state = Chat(config, model, engine, screen)
    with quiet_pipe():
        if prompt is not None:
            answer(state, prompt)
        elif sys.stdin.isatty():
            screen.note(HELP)
            talk(state, typed_lines(screen), interactive=True)
        else:
            talk(state, sys.stdin, interactive=False)


def talk(chat: Chat, lines: Iterable[str], *, interactive: bool) -> None:
    """Answer each line that is not a command; interactively, Ctrl-C stops an answer and errors are only shown."""
    for line in lines:
        text = line.strip()
        word = text.lower().removeprefix("/")
        if word in ("quit", "exit"):
            return
        if word == "clear":
            chat.messages.clear()
            chat.screen.note("a new conversation")
        elif text and not interactive:
            answer(chat, text)
        elif text:
            try:
                with stop_by_ctrl_c() as stop:
                    answer(chat, text, stop)
            except UserError as error:
                chat.screen.note(f"error: {error}")


def answer(chat: Chat, text: str, stop: threading.Event | None = None) -> None:
    """Show the answer to a message, and add both to the history.

    Raises:
        UserError: the message alone is too long; the history is unchanged.
    """
    config, screen, context = chat.config, chat.screen, chat.engine.context
    max_tokens = config.sampling["max_tokens"]
    messages = [*chat.messages, {"role": "user", "content": text}]
    messages, prompt = fit(chat.model, messages, context, reserve=min(max_tokens, context // 4))
    if n_dropped := len(chat.messages) + 1 - len(messages):
        screen.note(
            f"the conversation is longer than the context of {context} tokens: its first {n_dropped} messages are "
            "dropped from here on; `clear` starts a new one"
        )
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed + chat.n_answers
    result = stream_answer(chat, infer.Request(tuple(prompt), **config.sampling, seed=seed), stop)
    content = chat_format.content(chat.model.tokenizer, result.tokens)
    chat.messages[:] = [*messages, {"role": "assistant", "content": content}]
    chat.n_answers += 1
    if result.finish == "cancelled":
        screen.note("[stopped]")
    elif result.finish != "stop":
        full = len(result.tokens) < max_tokens
        screen.note(f"[cut at {f'the end of the context, {context} tokens' if full else f'max_tokens={max_tokens}'}]")
    if config.verbose:
        screen.note(
            f"[{len(result.tokens)} tokens, {len(result.tokens) / result.seconds:.1f} tokens/s, the first after "
            f"{result.first_seconds:.2f} s; prompt {len(prompt)} of {context} tokens; seed {seed}]"
        )


def fit(model: Pretrained, messages: list[Message], context: int, reserve: int) -> tuple[list[Message], list[int]]:
    """Return the messages that fit into the context, and their prompt; the oldest exchanges are dropped.

    Args:
        reserve: tokens to leave free for the answer, if dropping helps.

    Raises:
        UserError: the last message does not fit alone.
    """
    while True:
        prompt = chat_format.prompt(model.tokenizer, messages)
        if len(prompt) + reserve <= context or len(messages) == 1:
            break
        messages = messages[2:]
    if len(prompt) >= context:
        raise UserError(f"the message has {len(prompt)} tokens, the model's context holds {context}: shorten it")
    return messages, prompt


def stream_answer(chat: Chat, request: infer.Request, stop: threading.Event | None) -> Answer:
    """Show an answer as it comes; `stop`, once set, ends it after the current step."""
    start, first, finish = time.perf_counter(), 0.0, None
    reader, tokens = data.Reader(chat.model.tokenizer), []
    infer.admit(chat.engine, "chat", request)
    while finish is None:
        for event in infer.step(chat.engine):
            first = first or time.perf_counter() - start
            tokens.append(event.token)
            finish = event.finish
            chat.screen.show(reader.feed(event.token))
        if finish is None and stop and stop.is_set():
            infer.cancel(chat.engine, "chat")
            finish = "cancelled"
    chat.screen.show(reader.close())
    chat.screen.end()
    return Answer(tokens, finish, time.perf_counter() - start, first)


# Plain text


def complete(config: Config, runtime: Runtime) -> None:
    """Complete the prompt, or every prompt of the file."""
    if (config.prompt is None) == (config.prompts is None):
        raise UserError('set either a prompt, --set prompt="Once upon a time", or a file of them, --set prompts=…')
    rows = read_prompts(config.prompts) if config.prompts else [{"prompt": read_prompt(config.prompt)}]
    model, engine, _ = load(config, runtime, slots=min(config.slots, len(rows) * config.samples))
    tok, requests = model.tokenizer, make_requests(config, model.tokenizer, rows, engine.context)
    events = infer.run(engine, requests)
    with quiet_pipe():
        if config.prompts is not None or config.output is not None:
            write_completions(config, tok, rows, requests, events)
        elif config.samples == 1:
            stream_completion(tok, events)
        else:
            for i, ids, finish in in_order(events):
                text = printable(completion(tok, ids, finish), sys.stdout)
                print(f"--- sample {i + 1} of {config.samples}\n{text}", flush=True)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return [{"prompt": text, …}] of a file's lines.

    Raises:
        UserError: the file cannot be read, has no prompt, or has an invalid line (with its number).
    """
    rows: list[dict[str, Any]] = []
    if path.suffix == ".jsonl":
        for number, value in jsonl.read(path):
            row = {"prompt": value} if isinstance(value, str) else value
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f'{path}:{number}: expected a string, or an object with a "prompt"')
            rows.append(row)
    else:
        try:
            lines = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        rows = [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"prompts={path}: has no prompt in it")
    return rows


def make_requests(config: Config, tok: Tokenizer, rows: Sequence[dict[str, Any]], context: int) -> list[infer.Request]:
    """Return a request per sample, the samples of a prompt side by side.

    Raises:
        UserError: a prompt does not fit into the context.
    """
    requests: list[infer.Request] = []
    for number, ids in enumerate(tok.encode_batch([row["prompt"] for row in rows]), start=1):
        if len(ids) + 1 >= context:
            name = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            raise UserError(f"{name} has {len(ids) + 1} tokens, the model's context holds {context}: shorten it")
        for _ in range(config.samples):
            seed = (42 if config.seed is None else config.seed) + len(requests)
            requests.append(infer.Request((tok.bos, *ids), **config.sampling, seed=seed))
    return requests


def stream_completion(tok: Tokenizer, events: Iterable[infer.Event]) -> None:
    """Print a single completion as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for event in events:
        text = "" if event.finish == "stop" else decoder.decode(tok.decode_bytes([event.token]))
        text += decoder.decode(b"", final=True) if event.finish else ""
        print(printable(text, sys.stdout), end="\n" if event.finish else "", flush=True)


def in_order(events: Iterable[infer.Event]) -> Iterator[tuple[int, list[int], str]]:
    """Yield (index, tokens, finish) of each request in the order of the requests, as early as possible."""
    tokens: dict[Any, list[int]] = {}
    finished: dict[Any, str] = {}
    following = 0
    for event in events:
        tokens.setdefault(event.key, []).append(event.token)
        if event.finish:
            finished[event.key] = event.finish
        while following in finished:
            yield following, tokens.pop(following), finished.pop(following)
            following += 1


def completion(tok: Tokenizer, ids: Sequence[int], finish: str) -> str:
    """Return a completion's text without the token that ended it."""
    return tok.decode(ids[:-1] if finish == "stop" else ids)


def write_completions(
    config: Config,
    tok: Tokenizer,
    rows: Sequence[dict[str, Any]],
    requests: Sequence[infer.Request],
    events: Iterable[infer.Event],
) -> None:
    """Write a JSON line per completion, in the order of the requests."""
    with open_output(config.output) as file, progress.Bar(len(requests), label="complete", unit="completion") as bar:
        for i, ids, finish in in_order(events):
            row = rows[i // config.samples] | {
                "sample": i % config.samples,
                "completion": completion(tok, ids, finish),
                "finish": finish,
                "tokens": len(ids),
                "seed": requests[i].seed,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(1)


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Open a file that gets its name when it is complete; standard output for None.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise UserError(f"output={path}: cannot be written ({error.strerror}); completions so far: {partial}") from None
    except KeyboardInterrupt:
        print(f"completions so far: {partial}", file=sys.stderr)
        raise


# The terminal


class Screen:
    """Shows answers on one stream and everything else on another, dim if that is a terminal."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out, self.err = out, err
        self._dim = dim_code(err)
        self._open = ""  # the kind of text in the open bracket

    def show(self, pieces: Iterable[Piece]) -> None:
        """Show pieces of an answer; a tool call and its result share a bracket: `[calculator: 12*3 = 36]`."""
        for kind, text in pieces:
            if kind == "text":
                self._close()
                self._write(self.out, printable(text, self.out))
                continue
            if self._open == "output" and kind == "python":
                self._close()
            prefix = "" if self._open == kind else " = " if self._open else "[calculator: "
            self._write(self.err, self._dim * (not self._open) + prefix + printable(text, self.err))
            self._open = kind

    def end(self) -> None:
        """End the line of an answer."""
        self._close()
        self._write(self.out, "\n")

    def note(self, line: str) -> None:
        """Show a line that is not from the model."""
        self._write(self.err, f"{self._dim}{line}{PLAIN if self._dim else ''}\n")

    def _close(self) -> None:
        if self._open:
            self._write(self.err, "]" + (PLAIN if self._dim else "") + "\n" * (not self.err.isatty()))
            self._open = ""

    def _write(self, to: TextIO, text: str) -> None:
        to.write(text)
        to.flush()


def dim_code(stream: TextIO) -> str:
    """Return the escape code for dim text, or nothing if the stream is not a terminal or colors are disabled."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return "" if plain else DIM


def printable(text: str, stream: TextIO) -> str:
    """Return text without control characters if the stream is a terminal."""
    return text.translate(CONTROL) if stream.isatty() else text


def typed_lines(screen: Screen) -> Iterator[str]:
    """Yield what is typed at the prompt, with a history on the arrow keys, until Ctrl-D or Ctrl-C."""
    terminal = sys.stdout.isatty()  # else the prompt would be among the answers
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none, and a line editor of its own
            import readline  # noqa: F401 (importing it makes `input` use it)
    while True:
        try:
            if not terminal:
                screen.err.write(PROMPT)
                screen.err.flush()
            yield input(PROMPT if terminal else "")
        except EOFError:
            screen.err.write("\n")
            return
        except KeyboardInterrupt:
            screen.note("\nleft by Ctrl-C; `quit` or Ctrl-D leaves as well")
            return


@contextlib.contextmanager
def stop_by_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets, instead of an exception in the middle of a step; a second Ctrl-C raises."""
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ignore that the reader of standard output, such as `head`, has gone."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at exit fails


def replace_encoding_errors() -> None:
    """Read invalid bytes as U+FFFD, and print what the terminal's encoding lacks as `?`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def read_prompt(prompt: str | None) -> str | None:
    """Return the prompt, or for `-` all of standard input without its last line break."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def check_settings(config: Any, **minimum: float) -> None:
    """Raise UserError if a setting is below its minimum."""
    for name, number in minimum.items():
        value = getattr(config, name)
        if value is not None and value < number:
            raise UserError(f"{name}={value}: must be at least {number}")
