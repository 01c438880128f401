"""Talk to a trained model in the terminal: the answer streams, with its tool calls, and the history is kept.

    python launch.py --experiment=chat                                  # the run that was saved last
    python launch.py --experiment=chat --set run=quickstart --set temperature=0.9
    python launch.py --experiment=chat --set prompt="Why is the sky blue?" > answer.txt
    python launch.py --experiment=chat < questions.txt                  # each line is a message

At the prompt, `clear` begins a new conversation, `quit` (or Ctrl-D) leaves, the arrow keys bring back what was typed;
Ctrl-C stops an answer, and at the prompt it leaves. A prompt on the command line is answered once (`-` reads it from
standard input). The answer goes to standard output; tool calls, notes and the model's name go to standard error. When
the conversation outgrows the model's context, its oldest exchanges are left out, and that is said.

The first word comes after about five seconds, most of them to import torch and to read the checkpoint. Hence
compile=false: compiling takes a good half minute more, and pays off after thousands of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from nanochat import checkpoint, data, infer
from nanochat.config import Device, Dtype, UserError
from nanochat.data import chat_format

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.data import Message, Piece
    from nanochat.distributed import Runtime

HELP = "`clear` begins a new conversation, `quit` or Ctrl-D leaves, Ctrl-C stops an answer"
PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model may say anything, but it shall not move the cursor or rename the window.
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclasses.dataclass(frozen=True)
class Config:
    """A chat.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. step: none: its newest.
        prompt: answer this alone, and end; `-` reads it from standard input.
        temperature, top_k: of the sampling; temperature 0 is greedy, top_k 0 takes all tokens in.
        max_tokens: of an answer. seed: of the first answer, the next one has the next; none draws one each time.
        compile: by torch.compile. verbose: tokens per second and seed after each answer.
        device, dtype: auto, or as in `runtime.create`.
    """

    run: str | None = None
    step: int | None = None
    prompt: str | None = None
    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    seed: int | None = None
    compile: bool = False
    verbose: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        check_settings(self, temperature=0, top_k=0, max_tokens=1)


class Answer(NamedTuple):
    """What the model said to a message.

    Attributes:
        tokens: all of them, those of tools and the one that ended it included.
        finish: "stop", "length", or "cancelled" by Ctrl-C.
        seconds: of all of it. first_seconds: until the first token.
    """

    tokens: list[int]
    finish: str
    seconds: float
    first_seconds: float


@dataclasses.dataclass
class Chat:
    """A conversation under way.

    Attributes:
        config, bot, decoder, screen: settings, the model, the engine with a single slot, where answers appear.
        messages: said so far, by both. answered: how many answers there were, in earlier conversations too.
    """

    config: Config
    bot: Pretrained
    decoder: infer.Engine
    screen: Screen
    messages: list[Message] = dataclasses.field(default_factory=list)
    answered: int = 0


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Load the model, then answer the prompt, or what is typed or piped in."""
    if runtime.world_size > 1:
        raise UserError("chat runs in one process: start it with python, not torchrun")
    forgive_encodings()
    prompt = read_prompt(config.prompt)
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: is empty; give it some text, or leave it out to type messages")
    screen = Screen(sys.stdout, sys.stderr)
    bot, decoder = load(config, runtime, slots=1)
    screen.note(checkpoint.describe_model(bot))
    if line := checkpoint.warning(bot):
        screen.note(line)
    chat = Chat(config, bot, decoder, screen)
    with quiet_pipe():
        if prompt is not None:
            say(chat, prompt)
        elif sys.stdin.isatty():
            screen.note(HELP)
            talk(chat, typed_lines(screen), person=True)
        else:
            talk(chat, sys.stdin, person=False)


def load(config: Any, runtime: Runtime, slots: int) -> tuple[Pretrained, infer.Engine]:
    """Return the model that `config` names (run, step, compile), and an engine for so many rows at once."""
    place: dict[str, Any] = {"device": runtime.device, "dtype": runtime.compute_dtype}
    bot = checkpoint.load(config.run, step=config.step, **place)
    decoder = infer.start(bot.params, bot.config, bot.tokenizer, slots=slots, compile=config.compile, **place)
    return bot, decoder


def talk(chat: Chat, lines: Iterable[str], *, person: bool) -> None:
    """Answer each line that is no command, until they end.

    Args:
        person: whether someone sits there, who may stop an answer and mend a message that is too long.
    """
    for line in lines:
        text = line.strip()
        word = text.lower().removeprefix("/")
        if word in ("quit", "exit"):
            return
        if word == "clear":
            chat.messages.clear()
            chat.screen.note("a new conversation")
        elif text and not person:
            say(chat, text)
        elif text:
            try:
                with stop_by_ctrl_c() as stop:
                    say(chat, text, stop)
            except UserError as error:
                chat.screen.note(f"error: {error}")


def say(chat: Chat, text: str, stop: threading.Event | None = None) -> None:
    """Show the answer to a message, and keep both in the history.

    Raises:
        UserError: the message alone is too long for the model; the history is as it was.
    """
    config, screen, context = chat.config, chat.screen, chat.decoder.context
    messages = [*chat.messages, {"role": "user", "content": text}]
    messages, prompt = fit(chat.bot, messages, context, reserve=min(config.max_tokens, context // 4))
    if left_out := len(chat.messages) + 1 - len(messages):
        screen.note(
            f"the conversation is longer than the context of {context} tokens: its first {left_out} messages are left "
            "out from here on; `clear` begins a new one"
        )
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed + chat.answered
    request = infer.Request(tuple(prompt), config.max_tokens, config.temperature, config.top_k, seed)
    answer = stream(chat, request, stop)
    said = chat_format.content(chat.bot.tokenizer, answer.tokens)
    chat.messages[:] = [*messages, {"role": "assistant", "content": said}]
    chat.answered += 1
    if answer.finish != "stop":
        full = len(answer.tokens) < config.max_tokens
        cut = f"cut at the end of the context, {context} tokens" if full else f"cut at max_tokens={config.max_tokens}"
        screen.note(f"[{'stopped' if answer.finish == 'cancelled' else cut}]")
    if config.verbose:
        speed = len(answer.tokens) / answer.seconds
        screen.note(
            f"[{len(answer.tokens)} tokens, {speed:.1f} tokens/s, the first after {answer.first_seconds:.2f} s; "
            f"prompt {len(prompt)} of {context} tokens; seed {seed}]"
        )


def fit(bot: Pretrained, messages: list[Message], context: int, reserve: int) -> tuple[list[Message], list[int]]:
    """Return the messages without as many of the oldest exchanges as it takes, and their prompt.

    Args:
        context: tokens that the engine holds. reserve: so many are to stay free for the answer, if leaving out helps.

    Raises:
        UserError: the last message does not fit alone.
    """
    while True:
        prompt = chat_format.prompt(bot.tokenizer, messages)
        if len(prompt) + reserve <= context or len(messages) == 1:
            break
        messages = messages[2:]
    if len(prompt) >= context:
        raise UserError(f"the message has {len(prompt)} tokens, the model's context holds {context}: shorten it")
    return messages, prompt


def stream(chat: Chat, request: infer.Request, stop: threading.Event | None) -> Answer:
    """Show an answer as it comes; `stop`, once set, ends it after the step under way."""
    start, first, finish = time.perf_counter(), 0.0, None
    reader, tokens = data.Reader(chat.bot.tokenizer), []
    infer.admit(chat.decoder, "chat", request)
    while finish is None:
        for event in infer.step(chat.decoder):
            first = first or time.perf_counter() - start
            tokens.append(event.token)
            finish = event.finish
            chat.screen.show(reader.feed(event.token))
        if finish is None and stop and stop.is_set():
            infer.cancel(chat.decoder, "chat")
            finish = "cancelled"
    chat.screen.show(reader.close())
    chat.screen.end()
    return Answer(tokens, finish, time.perf_counter() - start, first)


class Screen:
    """Where answers appear: text on one stream, all else on the other, dim where that is a terminal."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out, self.err = out, err
        self._dim = colours(err)
        self._open = ""  # the kind that a bracket is open with

    def show(self, pieces: Iterable[Piece]) -> None:
        """Show pieces of an answer; a tool call and its result share a bracket: `[calculator: 12*3 = 36]`."""
        for kind, text in pieces:
            if kind == "text":
                self._close()
                self._write(self.out, printable(text, self.out))
                continue
            if self._open == "output" and kind == "python":
                self._close()
            before = "" if self._open == kind else " = " if self._open else "[calculator: "
            self._write(self.err, self._dim * (not self._open) + before + printable(text, self.err))
            self._open = kind

    def end(self) -> None:
        """End the line of an answer."""
        self._close()
        self._write(self.out, "\n")

    def note(self, line: str) -> None:
        """Show a line that is not the model's."""
        self._write(self.err, f"{self._dim}{line}{PLAIN if self._dim else ''}\n")

    def _close(self) -> None:
        if self._open:
            self._write(self.err, "]" + (PLAIN if self._dim else "") + "\n" * (not self.err.isatty()))
            self._open = ""

    def _write(self, to: TextIO, text: str) -> None:
        to.write(text)
        to.flush()


def colours(stream: TextIO) -> str:
    """Return what makes a stream's text dim, or nothing where it is no terminal or colours are not wanted."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return "" if plain else DIM


def printable(text: str, stream: TextIO) -> str:
    """Return text that is safe to show: on a terminal, without control characters."""
    return text.translate(CONTROL) if stream.isatty() else text


def typed_lines(screen: Screen) -> Iterator[str]:
    """Yield what is typed at the prompt, with the arrow keys' history, until Ctrl-D or Ctrl-C."""
    whole = sys.stdout.isatty()  # else the prompt would be in among the answers
    if whole:
        with contextlib.suppress(ImportError):  # Windows has none, and a line editor of its own
            import readline  # noqa: F401 (its import makes `input` use it)
    while True:
        try:
            if not whole:
                screen.err.write(PROMPT)
                screen.err.flush()
            yield input(PROMPT if whole else "")
        except EOFError:
            screen.err.write("\n")
            return
        except KeyboardInterrupt:
            screen.note("\nleft by Ctrl-C; `quit` or Ctrl-D leaves as well")
            return


@contextlib.contextmanager
def stop_by_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets, in place of an exception in the middle of a step; a second one raises it."""
    stop = threading.Event()

    def asked(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Within, it is no error when the program that reads our output, `head` say, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush fails at the end


def forgive_encodings() -> None:
    """Read bytes that are no text as U+FFFD, and print what the terminal's encoding lacks as `?`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def read_prompt(prompt: str | None) -> str | None:
    """Return the prompt, or all of standard input, without its last line break, for `-`."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def check_settings(config: Any, **least: float) -> None:
    """Check that settings are at least so large. Raises: UserError."""
    for name, number in least.items():
        if getattr(config, name) < number:
            raise UserError(f"{name}={getattr(config, name)}: must be at least {number}")
