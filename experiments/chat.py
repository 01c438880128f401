"""Talk to a trained model in the terminal, or complete plain text with `complete=true`; answers stream.

    python launch.py --experiment=chat                                  # the run that was saved last
    python launch.py --experiment=chat --set run=quickstart --set temperature=0.9
    python launch.py --experiment=chat --set prompt="Why is the sky blue?" > answer.txt
    python launch.py --experiment=chat < questions.txt                  # each line is a message
    python launch.py --experiment=chat --set complete=true --set prompt="The capital of France is"
    python launch.py --experiment=chat --set complete=true --set prompts=prompts.jsonl --set output=out.jsonl

Arrow keys recall the history. Text goes to standard output, tool calls and notes to standard error. When a conversation
outgrows the model's context, its oldest exchanges are dropped, with a note.

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
from typing import Any, TextIO

from nanochat import checkpoint, data, distributed, infer, jsonl
from nanochat.config import NonNegativeFloat, NonNegativeInt, PositiveInt, UserError
from nanochat.data import chat_format
from nanochat.metrics import progress
from nanochat.text import reason

HELP = "`clear` starts a new conversation, `quit` or Ctrl-D leaves, Ctrl-C stops an answer"
PROMPT = "> "
# A model may write anything, but must not move the cursor or rename the window.
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.LoadConfig):
    """A chat, or completions of plain text.

    Attributes:
        prompt: answer or complete this text only; `-` reads it from standard input.
        temperature: of sampling, 0 is greedy; default: 0.6, and 0.8 with complete.
        top_k: sample among the k most likely tokens; 0: among all.
        max_tokens: limit per answer; default: 512, and 256 with complete.
        seed: of the first answer, the next one has seed + 1; default: random, and 42 with complete.
        compile: with torch.compile.
        verbose: show tokens per second and the seed after each answer.
        complete: complete plain text instead of chatting.
        prompts: with complete, a file of prompts.
        output: with complete, the file for completions as JSON Lines; default: standard output.
        samples: with complete, completions per prompt.
        slots: with complete, completions computed at once.
    """

    prompt: str | None = None
    temperature: NonNegativeFloat | None = None
    top_k: NonNegativeInt = 50
    max_tokens: PositiveInt | None = None
    seed: int | None = None
    compile: bool = False
    verbose: bool = False
    complete: bool = False
    prompts: Path | None = None
    output: Path | None = None
    samples: PositiveInt = 1
    slots: PositiveInt = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.complete and (self.prompts or self.output or self.samples > 1):
            raise UserError("prompts, output and samples are for plain text: add --set complete=true")

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of an `infer.Request`."""
        defaults = (0.8, 256) if self.complete else (0.6, 512)
        temperature = defaults[0] if self.temperature is None else self.temperature
        return {"temperature": temperature, "top_k": self.top_k, "max_tokens": self.max_tokens or defaults[1]}


@dataclasses.dataclass
class Chat:
    """A conversation with a model."""

    config: Config
    model: checkpoint.Pretrained
    engine: infer.Engine
    screen: Screen
    messages: list[data.Message] = dataclasses.field(default_factory=list)
    n_answers: int = 0  # those of earlier conversations too


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    distributed.require_single(runtime, "chat")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for invalid bytes, and for what the terminal's encoding lacks
    with quiet_pipe():
        (complete if config.complete else chat)(config, runtime)


def load(config: Config, runtime: distributed.Runtime, slots: int) -> Chat:
    """Load the model that the settings name, and describe it on the screen."""
    device: dict[str, Any] = {"device": runtime.device, "dtype": runtime.compute_dtype}
    model = checkpoint.load(config.run, step=config.step, **device)
    engine = infer.start(model.params, model.config, model.tokenizer, slots=slots, compile=config.compile, **device)
    screen = Screen(sys.stdout, sys.stderr)
    screen.note(checkpoint.describe_model(model))
    return Chat(config, model, engine, screen)


# Conversations


def chat(config: Config, runtime: distributed.Runtime) -> None:
    """Answer the prompt, or what is typed or piped in."""
    prompt = read_prompt(config.prompt)
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: is empty; give it some text, or omit it to type messages")
    chat = load(config, runtime, slots=1)
    if warning := checkpoint.warning(chat.model):
        chat.screen.note(warning)
    if prompt is not None:
        answer(chat, prompt)
    elif sys.stdin.isatty():
        chat.screen.note(HELP)
        talk(chat, typed_lines(chat.screen), interactive=True)
    else:
        talk(chat, sys.stdin, interactive=False)


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
    """Show the answer to a message as it comes, and add both to the history; `stop`, once set, ends the answer."""
    config, engine, screen, tok = chat.config, chat.engine, chat.screen, chat.model.tokenizer
    context, max_tokens = engine.context, config.sampling["max_tokens"]
    messages = [*chat.messages, {"role": "user", "content": text}]
    while True:
        prompt = chat_format.prompt(tok, messages)
        if len(prompt) + min(max_tokens, context // 4) <= context or len(messages) == 1:
            break
        messages = messages[2:]
    if len(prompt) >= context:
        raise UserError(f"the message has {len(prompt)} tokens, the model's context holds {context}: shorten it")
    if n_dropped := len(chat.messages) + 1 - len(messages):
        screen.note(
            f"the conversation is longer than the context of {context} tokens: its first {n_dropped} messages are "
            "dropped from here on; `clear` starts a new one"
        )
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed + chat.n_answers
    reader, tokens, finish = data.Reader(tok), [], None
    start, first_seconds = time.perf_counter(), 0.0
    infer.admit(engine, "chat", infer.Request(tuple(prompt), **config.sampling, seed=seed))
    while finish is None:
        for event in infer.step(engine):
            first_seconds = first_seconds or time.perf_counter() - start
            tokens.append(event.token)
            finish = event.finish
            screen.show(reader.feed(event.token))
        if finish is None and stop and stop.is_set():
            infer.cancel(engine, "chat")
            finish = "cancelled"
    seconds = time.perf_counter() - start
    screen.show(reader.close())
    screen.end()
    chat.messages[:] = [*messages, {"role": "assistant", "content": chat_format.content(tok, tokens)}]
    chat.n_answers += 1
    if finish == "cancelled":
        screen.note("[stopped]")
    elif finish == "length":
        full = len(tokens) < max_tokens
        screen.note(f"[cut at {f'the end of the context, {context} tokens' if full else f'max_tokens={max_tokens}'}]")
    if config.verbose:
        screen.note(
            f"[{len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s, the first after {first_seconds:.2f} s; "
            f"prompt {len(prompt)} of {context} tokens; seed {seed}]"
        )


# Plain text


def complete(config: Config, runtime: distributed.Runtime) -> None:
    """Complete the prompt, or every prompt of the file."""
    if (config.prompt is None) == (config.prompts is None):
        raise UserError('set either a prompt, --set prompt="Once upon a time", or a file of them, --set prompts=…')
    rows = read_prompts(config.prompts) if config.prompts else [{"prompt": read_prompt(config.prompt)}]
    chat = load(config, runtime, slots=min(config.slots, len(rows) * config.samples))
    tok, requests = chat.model.tokenizer, make_requests(chat, rows)
    if config.prompts is not None or config.output is not None:
        write_completions(chat, rows, requests)
    elif config.samples == 1:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for event in infer.run(chat.engine, requests):
            text = "" if event.finish == "stop" else decoder.decode(tok.decode_bytes([event.token]))
            text += decoder.decode(b"", final=True) if event.finish else ""
            print(printable(text, sys.stdout), end="\n" if event.finish else "", flush=True)
    else:
        for i, completion in enumerate(infer.complete(chat.engine, requests)):
            text = printable(tok.decode(completion.content), sys.stdout)
            print(f"--- sample {i + 1} of {config.samples}\n{text}", flush=True)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return [{"prompt": text, …}] of a file's lines."""
    rows: list[dict[str, Any]] = []
    if path.suffix == ".jsonl":
        for number, value in jsonl.read(path):
            row = {"prompt": value} if isinstance(value, str) else value
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f'{path}:{number}: expected a string, or an object with a "prompt"')
            rows.append(row)
    else:
        lines = jsonl.read_text(path).split("\n")
        rows = [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"prompts={path}: has no prompt in it")
    return rows


def make_requests(chat: Chat, rows: Sequence[dict[str, Any]]) -> list[infer.Request]:
    """Return a request per sample, the samples of a prompt side by side."""
    config, tok, context = chat.config, chat.model.tokenizer, chat.engine.context
    requests: list[infer.Request] = []
    for number, ids in enumerate(tok.encode_batch([row["prompt"] for row in rows]), start=1):
        if len(ids) + 1 >= context:
            name = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            raise UserError(f"{name} has {len(ids) + 1} tokens, the model's context holds {context}: shorten it")
        for _ in range(config.samples):
            seed = (42 if config.seed is None else config.seed) + len(requests)
            requests.append(infer.Request((tok.bos, *ids), **config.sampling, seed=seed))
    return requests


def write_completions(chat: Chat, rows: Sequence[dict[str, Any]], requests: Sequence[infer.Request]) -> None:
    """Write a JSON line per completion, in the order of the requests."""
    n_samples, completions = chat.config.samples, infer.complete(chat.engine, requests)
    with (
        open_output(chat.config.output) as file,
        progress.Bar(len(requests), label="complete", unit="completion") as bar,
    ):
        for i, (request, completion) in enumerate(zip(requests, completions)):
            row = rows[i // n_samples] | {
                "sample": i % n_samples,
                "completion": chat.model.tokenizer.decode(completion.content),
                "finish": completion.finish,
                "tokens": len(completion.tokens),
                "seed": request.seed,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(1)


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Open a file that gets its name when it is complete; standard output for None."""
    if path is None:
        yield sys.stdout
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise UserError(f"output={path}: cannot be written ({reason(error)}); completions so far: {partial}") from None
    except KeyboardInterrupt:
        print(f"completions so far: {partial}", file=sys.stderr)
        raise


# The terminal


class Screen:
    """Shows answers on one stream and everything else on another, dim if that is a terminal."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out, self.err = out, err
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if has_colors(err) else ("", "")
        self._open = ""  # the kind of text in the open bracket

    def show(self, pieces: Iterable[data.Piece]) -> None:
        """Show pieces of an answer; a tool call and its result share a bracket: `[calculator: 12*3 = 36]`."""
        for kind, text in pieces:
            if kind == "text" or (kind == "python" and self._open == "output"):
                self._close_bracket()
            if kind == "text":
                print(printable(text, self.out), end="", file=self.out, flush=True)
            else:
                prefix = f"{self._dim}[calculator: " if not self._open else " = " if self._open != kind else ""
                print(prefix + printable(text, self.err), end="", file=self.err, flush=True)
                self._open = kind

    def end(self) -> None:
        """End the line of an answer."""
        self._close_bracket()
        print(file=self.out, flush=True)

    def note(self, text: str) -> None:
        """Show a line that is not from the model."""
        print(f"{self._dim}{text}{self._plain}", file=self.err, flush=True)

    def _close_bracket(self) -> None:
        if self._open:
            print(f"]{self._plain}", end="" if self.err.isatty() else "\n", file=self.err, flush=True)
            self._open = ""


def has_colors(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str, stream: TextIO) -> str:
    """Return text without control characters if the stream is a terminal."""
    return text.translate(CONTROL) if stream.isatty() else text


def typed_lines(screen: Screen) -> Iterator[str]:
    """Yield what is typed at the prompt, with a history on the arrow keys, until Ctrl-D or Ctrl-C."""
    is_terminal = sys.stdout.isatty()  # else the prompt would be among the answers
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none, and a line editor of its own
            import readline  # noqa: F401 (importing it makes `input` use it)
    while True:
        try:
            if not is_terminal:
                print(PROMPT, end="", file=screen.err, flush=True)
            yield input(PROMPT if is_terminal else "")
        except EOFError:
            print(file=screen.err)
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


def read_prompt(prompt: str | None) -> str | None:
    """Return the prompt, or for `-` all of standard input without its last line break."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
