"""Chat and plain completion in the terminal: typed, piped and given; with a scripted engine, and with the real one."""

import dataclasses
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TOK, save_run

import launch
from experiments import chat
from nanochat import checkpoint, distributed
from nanochat.config import UserError, override
from nanochat.data import Piece, chat_format
from nanochat.infer import engine

ROOT = Path(__file__).resolve().parents[2]
PY, PY_END, OUT, OUT_END, BOT_END = (
    TOK.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
)
TOOL = [*b"It is ", PY, *b"12*3", PY_END, OUT, *b"36", OUT_END, *b".", BOT_END]


# ---------------------------------------------------------------------------------------------------------------
# An engine that says what the message asks for


@dataclasses.dataclass
class Decoder:
    context: int
    slots: int
    rows: dict[Any, tuple[engine.Request, list[int]]] = dataclasses.field(default_factory=dict)
    asked: list[engine.Request] = dataclasses.field(default_factory=list)


def script(request: engine.Request) -> list[int]:
    """Return the tokens of an answer: an echo with the number of user messages, or something by name."""
    text = TOK.decode(request.prompt)
    if "<|assistant_start|>" not in text:  # plain text
        *_, last = text.removeprefix("<|bos|>").split() or [""]
        return [*f" …{last}{request.seed}".encode(), TOK.bos]
    said = text.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
    special = {"tool": TOOL, "escape": [*b"\x1b[31mred\x07\r", BOT_END], "long": [*b"word " * 10_000], "half": [0xC3]}
    return special.get(said) or [*f"you said: {said} ({text.count('<|user_start|>')}). ✓".encode(), BOT_END]


class Scripted:
    """Stands in for nanochat.infer.engine; `pace` is the seconds of a step."""

    Request, Event = engine.Request, engine.Event
    pace = 0.0
    started: Decoder

    @classmethod
    def start(cls, params: Any, config: Any, tokenizer: Any, *, slots: int, context: int | None = None, **how: Any):
        assert set(how) == {"device", "dtype", "compile"}
        cls.started = Decoder(context or config.sequence_len, slots)
        return cls.started

    @staticmethod
    def admit(decoder: Decoder, key: Any, request: engine.Request) -> None:
        assert 0 < len(request.prompt) < decoder.context and len(decoder.rows) < decoder.slots
        decoder.asked.append(request)
        length = min(request.max_tokens, decoder.context - len(request.prompt))
        decoder.rows[key] = request, script(request)[:length]

    @classmethod
    def step(cls, decoder: Decoder) -> list[engine.Event]:
        time.sleep(cls.pace)
        events = []
        for key, (_, tokens) in list(decoder.rows.items()):
            token = tokens.pop(0)
            finish = "stop" if token in (BOT_END, TOK.bos) else None if tokens else "length"
            events.append(engine.Event(key, token, True, finish))
            if finish:
                del decoder.rows[key]
        return events

    @staticmethod
    def cancel(decoder: Decoder, key: Any) -> None:
        del decoder.rows[key]

    @classmethod
    def run(cls, decoder: Decoder, requests: Sequence[engine.Request]) -> Iterator[engine.Event]:
        waiting = list(enumerate(requests))
        while waiting or decoder.rows:
            while waiting and len(decoder.rows) < decoder.slots:
                cls.admit(decoder, *waiting.pop(0))
            yield from cls.step(decoder)


def main(argv: list[str]) -> int:
    """Run launch.py's command line in this process, with the scripted engine at a visible pace."""
    chat.infer = Scripted  # type: ignore[assignment]
    Scripted.pace = 0.01
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # for Ctrl-C to become a signal
    return launch.main(argv)


COMMAND = [
    sys.executable,
    "-c",
    "import sys; from tests.experiments import test_chat; sys.exit(test_chat.main(['launch.py', *sys.argv[1:]]))",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("base")
    save_run(folder, "bot", steps=(3,))
    save_run(folder, "sft", stage="sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        yield folder


@pytest.fixture
def scripted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "infer", Scripted)


Ran = Callable[..., tuple[str, str]]


@pytest.fixture
def ran(scripted: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Run an experiment in this process; returns (standard output, standard error)."""

    def run(experiment: Any, *settings: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        experiment.run(override(experiment.config(), ["run=sft", *settings]), distributed.init("cpu"))
        return capsys.readouterr()

    return run


def environment(base: Path, **more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), env.get("PYTHONPATH", "")])
    return env | {"PYTHONPATH": path, "NANOCHAT_BASE_DIR": str(base), "TERM": "xterm", "OMP_NUM_THREADS": "1", **more}


# ---------------------------------------------------------------------------------------------------------------
# A prompt, and piped messages


def test_only_the_answer_goes_to_standard_output(ran: Ran):
    out, err = ran(chat, "prompt=why?")
    assert out == "you said: why? (1). ✓\n"
    assert err.startswith("sft, step 1 (sft): ") and err.count("\n") == 1
    request = Scripted.started.asked[0]
    assert (request.temperature, request.top_k, request.max_tokens) == (0.6, 50, 512)
    assert list(request.prompt) == chat_format.prompt(TOK, [{"role": "user", "content": "why?"}])


def test_prompt_from_standard_input_is_one_message(ran: Ran):
    assert ran(chat, "prompt=-", stdin="two\nlines\n")[0] == "you said: two\nlines (1). ✓\n"


def test_base_model_shows_a_warning(ran: Ran):
    out, err = ran(chat, "run=bot", "prompt=hi")
    lines = err.splitlines()
    assert lines[1] == checkpoint.warning(checkpoint.load("bot")) and len(lines) == 2
    assert out == "you said: hi (1). ✓\n"


def test_piped_lines_are_messages_of_one_conversation(ran: Ran):
    out, err = ran(chat, stdin="one\n\n  two  \nCLEAR\nthree\n/quit\nfour\n")
    assert out == "you said: one (1). ✓\nyou said: two (2). ✓\nyou said: three (1). ✓\n"
    assert "a new conversation" in err and chat.PROMPT not in err and "\x1b" not in err
    first, second, third = Scripted.started.asked
    said = [("user", "one"), ("assistant", "you said: one (1). ✓"), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert list(second.prompt) == chat_format.prompt(TOK, messages)
    assert list(third.prompt) == chat_format.prompt(TOK, [{"role": "user", "content": "three"}])
    assert len({first.seed, second.seed, third.seed}) == 3


def test_tool_calls_are_shown_separately_and_kept_in_the_history(ran: Ran):
    out, err = ran(chat, stdin="tool\nand?\n")
    assert out == "It is .\nyou said: and? (2). ✓\n"
    assert err.splitlines()[1:] == ["[calculator: 12*3 = 36]"]
    prompt = list(Scripted.started.asked[1].prompt)
    assert any(prompt[i : i + len(TOOL)] == TOOL for i in range(len(prompt))), "as the model said it"


def test_seeds_count_from_the_setting(ran: Ran):
    ran(chat, "seed=7", stdin="a\nclear\nb\n")
    assert [request.seed for request in Scripted.started.asked] == [7, 8]


def test_cut_answer_shows_the_reason(ran: Ran):
    out, err = ran(chat, "max_tokens=7", "prompt=long")
    assert out == "word wo\n" and err.splitlines()[-1] == "[cut at max_tokens=7]"
    out, err = ran(chat, "prompt=long")
    assert err.splitlines()[-1] == "[cut at the end of the context, 64 tokens]"
    assert ran(chat, "prompt=half")[0] == "\ufffd\n"


def test_verbose_shows_the_speed(ran: Ran):
    err = ran(chat, "verbose=true", "seed=5", "prompt=hi")[1]
    assert "[22 tokens, " in err and "tokens/s, the first after 0.0" in err and "of 64 tokens; seed 5]" in err


def test_oldest_exchanges_are_dropped_beyond_the_context(ran: Ran):
    messages = ["a" * 12, "b" * 12, "c" * 12]  # an exchange takes 47 of 64 tokens
    out, err = ran(chat, stdin="\n".join(messages))
    assert out == "".join(f"you said: {message} (1). ✓\n" for message in messages)
    assert err.count("longer than the context of 64 tokens: its first 2 messages are dropped") == 2
    assert "`clear`" in err


def test_message_longer_than_the_context_is_refused(ran: Ran):
    with pytest.raises(UserError, match=r"the message has 84 tokens, the model's context holds 64: shorten it"):
        ran(chat, f"prompt={'x' * 80}")
    assert ran(chat, f"prompt={'x' * 55}")[0] == "you s\n"  # fits, with little room for an answer


def test_invalid_settings_are_refused_before_loading(ran: Ran):
    several = dataclasses.replace(distributed.init("cpu"), world_size=2)
    with pytest.raises(UserError, match="in a single process: start it with python, not torchrun"):
        chat.run(chat.config(), several)
    for setting in ("temperature=-1", "top_k=-1", "max_tokens=0", "samples=0", "slots=0"):
        with pytest.raises(UserError, match=f"{setting}.*must be at least"):
            override(chat.config(), [setting])
    for setting in ("prompts=a", "output=b", "samples=2"):
        with pytest.raises(UserError, match="add --set complete=true"):
            override(chat.config(), [setting])
    with pytest.raises(UserError, match="prompt: is empty"):
        ran(chat, "prompt=-", stdin="\n")


def test_missing_run_is_a_one_line_error(
    tmp_path: Path, scripted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for more in (["--experiment=chat"], ["--experiment=chat", "--set", "complete=true", "--set", "prompt=x"]):
        assert launch.main(["launch.py", *more]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith(f"error: no trained model in {tmp_path / 'runs'}: `python launch.py --experiment=quickst")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colors_and_control_characters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    calls = [
        Piece("python", "1+"),
        Piece("python", "1"),
        Piece("output", "2"),
        Piece("python", "x"),
        Piece("text", "a\x1bb"),
    ]

    def shown() -> tuple[str, str]:
        out, err = Terminal(), Terminal()
        screen = chat.Screen(out, err)
        screen.show(calls)
        screen.end()
        screen.note("n")
        return out.getvalue(), err.getvalue()

    assert shown() == (
        "a\ufffdb\n",
        "\x1b[2m[calculator: 1+1 = 2]\x1b[0m\x1b[2m[calculator: x]\x1b[0m\x1b[2mn\x1b[0m\n",
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == ("a\ufffdb\n", "[calculator: 1+1 = 2][calculator: x]n\n")
    assert chat.printable("\x1b[0m\r\n", io.StringIO()) == "\x1b[0m\r\n", "into a file goes what the model said"


@pytest.mark.slow
def test_answer_streams_and_a_closed_pipe_is_not_an_error(base: Path):
    command = [*COMMAND, "--experiment=chat", "--set", "run=sft", "--set", "prompt=long", "--set", "max_tokens=40"]
    with subprocess.Popen(
        command, env=environment(base), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        first = os.read(process.stdout.fileno(), 1000)
        assert 0 < len(first) < 20, "the answer comes while it is made"
        process.stdout.close()  # as `head` does
        err = process.stderr.read().decode()
        assert process.wait(20) == 0, err
    assert "Traceback" not in err and "rokenPipe" not in err


# ---------------------------------------------------------------------------------------------------------------
# At a terminal


class Session:
    """The chat in a pseudo-terminal, and what it has shown."""

    def __init__(self, base: Path, *settings: str, **env: str) -> None:
        self.master, slave = pty.openpty()
        words = [word for setting in settings for word in ("--set", setting)]
        command = ["setsid", "--ctty", *COMMAND, "--experiment=chat", *words]  # Ctrl-C interrupts who owns the terminal
        env = environment(base, **env)
        self.process = subprocess.Popen(command, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.text, self.seen = "", 0
        self._raw = b""

    def expect(self, wanted: str, seconds: float = 30) -> str:
        """Read until `wanted` appears behind what was expected before; return what came up to its end."""
        end = time.monotonic() + seconds
        while (at := self.text.find(wanted, self.seen)) < 0:
            assert time.monotonic() < end, f"no {wanted!r} in {self.text[self.seen :]!r}"
            assert self.read(), f"ended without {wanted!r}: {self.text!r}"
        begin, self.seen = self.seen, at + len(wanted)
        return self.text[begin : self.seen]

    def shows(self, wanted: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while wanted not in self.text and time.monotonic() < end and self.read():
            pass
        return wanted in self.text

    def read(self) -> bool:
        if select.select([self.master], [], [], 1)[0]:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                return False
            if not data:
                return False
            self._raw += data
            self.text = self._raw.decode("utf-8", "replace")
        return True

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        while self.read() and self.process.poll() is None:
            pass
        return self.process.wait(20)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(20)
        os.close(self.master)


@pytest.mark.slow
def test_conversation_at_a_terminal(base: Path):
    with Session(base, "run=sft", "max_tokens=1000") as session:
        session.expect("Ctrl-C stops an answer\x1b[0m")
        session.expect("> ")
        session.type("hi\r")
        session.expect("you said: hi (1). ✓")
        session.type("more\r")
        session.expect("you said: more (2). ✓")
        session.type("clear\r")
        session.expect("a new conversation")
        session.type("tool\r")
        assert "It is \x1b[2m[calculator: 12*3 = 36]\x1b[0m." in session.expect("36]\x1b[0m.")
        session.expect("> ")
        session.type("\x1b[A\x1b[A\x1b[A\r")  # the third line up
        session.expect("you said: more (2). ✓")
        session.type("escape\r")
        assert "\x1b[31m" not in session.expect("\ufffd[31mred\ufffd\ufffd")
        session.expect("> ")
        session.type("x" * 80 + "\r")
        session.expect("error: the message has 84 tokens")
        session.expect("> ")
        for _ in range(10):  # Python loses a SIGINT that comes after the prompt and before readline waits for a key
            session.type("\x03")
            if session.shows("left by Ctrl-C; `quit` or Ctrl-D leaves as well", 3):
                break
        else:
            pytest.fail(f"Ctrl-C did not end the chat: {session.text!r}")
        assert session.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_chat_continues(base: Path):
    with Session(base, "run=sft", "max_tokens=1000", NO_COLOR="1") as session:
        session.expect("> ")
        session.type("long\r")
        session.expect("word word")  # it would end after 0.6 s, at the end of the context
        session.type("\x03")
        before = session.expect("[stopped]")
        assert "cut" not in before and before.count("word") < 12
        session.expect("> ")
        session.type("on\r")
        session.expect("you said: on (")  # the place in the engine was free
        session.expect("> ")
        assert "\x1b[2m" not in session.text
        session.type("\x04")
        assert session.end() == 0
    assert "Traceback" not in session.text


# ---------------------------------------------------------------------------------------------------------------
# Plain text


def test_plain_text_is_completed_without_chat_tokens(ran: Ran):
    out, err = ran(chat, "complete=true", "run=bot", "prompt=once upon")
    assert out == " …upon42\n"
    assert err.startswith("bot, step 3 (base)") and err.count("\n") == 1
    assert Scripted.started.asked == [engine.Request((TOK.bos, *TOK.encode("once upon")), 256, 0.8, 50, 42)]
    ran(chat, "complete=true", "prompt=-")
    assert Scripted.started.asked[0].prompt == (TOK.bos,)
    ran(chat, "complete=true", "prompt=-", stdin="line\n\n")
    assert Scripted.started.asked[0].prompt == (TOK.bos, *TOK.encode("line\n"))
    assert ran(chat, "complete=true", "prompt=a b", "max_tokens=3")[0] == " \ufffd\n"  # cut within a character


def test_samples_of_a_prompt(ran: Ran):
    out, _ = ran(chat, "complete=true", "prompt=x", "samples=3", "seed=1", "slots=2")
    assert out == "".join(f"--- sample {i} of 3\n …x{i}\n" for i in (1, 2, 3))
    assert Scripted.started.slots == 2


PROMPTS = ["short", "a much longer one", "é"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_file_of_prompts(ran: Ran, tmp_path: Path, kind: str):
    lines = [json.dumps({"id": i, "prompt": text} if i else text) for i, text in enumerate(PROMPTS)]
    (tmp_path / f"in.{kind}").write_text("\n\n".join(lines if kind == "jsonl" else PROMPTS) + "\n")
    out, err = ran(
        chat, "complete=true", f"prompts={tmp_path}/in.{kind}", f"output={tmp_path}/out.jsonl", "samples=2", "slots=3"
    )
    assert out == "" and "complete" in err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in PROMPTS for _ in range(2)]
    assert [(row["sample"], row["seed"]) for row in rows] == [(i % 2, 42 + i) for i in range(6)]
    assert [row["completion"] for row in rows] == [f" …{r['prompt'].split()[-1]}{r['seed']}" for r in rows]
    assert rows[0]["finish"] == "stop" and rows[0]["tokens"] == len(" …short42".encode()) + 1
    assert [row.get("id") for row in rows] == ([None, None, 1, 1, 2, 2] if kind == "jsonl" else [None] * 6)
    assert list(tmp_path.glob("*.partial")) == []
    assert ran(chat, "complete=true", f"prompts={tmp_path}/in.{kind}", "samples=2")[0] == (
        tmp_path / "out.jsonl"
    ).read_text("utf-8")


def test_interrupted_completions_are_kept(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in.txt").write_text("a\nb\nc\n")

    def stopped(decoder: Decoder, requests: Sequence[engine.Request]) -> Iterator[engine.Event]:
        yield from Scripted.run(decoder, requests[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "infer", type("Stopped", (Scripted,), {"run": staticmethod(stopped)}))
    with pytest.raises(KeyboardInterrupt):
        ran(chat, "complete=true", f"prompts={tmp_path / 'in.txt'}", f"output={tmp_path / 'out.jsonl'}")
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl.partial"]
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 2
    assert f"completions so far: {tmp_path / 'out.jsonl.partial'}" in capsys.readouterr().err


def test_invalid_prompt_files_are_refused(ran: Ran, tmp_path: Path):
    def refused(*settings: str) -> str:
        with pytest.raises(UserError) as caught:
            ran(chat, "complete=true", *settings)
        return str(caught.value)

    both = "set either a prompt"
    assert refused().startswith(both) and refused("prompt=a", "prompts=b").startswith(both)
    assert refused(f"prompts={tmp_path}/none") == f"{tmp_path}/none cannot be read: No such file or directory"
    file = tmp_path / "in.jsonl"
    for text, wanted in {
        "\n \n": "has no prompt in it",
        '"a"\n\nb': ":3: not valid JSON",
        '{"text": "a"}': ':1: expected a string, or an object with a "prompt"',
        "3": ":1: expected a string",
        json.dumps("x" * 99): "the prompt has 100 tokens, the model's context holds 64: shorten it",
        '"a"\n' + json.dumps("x" * 63): "prompt 2 of 2 has 64 tokens",
    }.items():
        file.write_text(text)
        assert wanted in refused(f"prompts={file}")
    file.write_bytes(b"\xff")
    assert "not valid JSON ('utf-8'" in refused(f"prompts={file}")
    file.write_text('"a"')
    assert f"output={tmp_path}/no/out: cannot be written" in refused(f"prompts={file}", f"output={tmp_path}/no/out")


# ---------------------------------------------------------------------------------------------------------------
# The real engine


def test_with_the_real_engine(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def run(experiment: Any, *settings: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("and you?\n"))
        experiment.run(override(experiment.config(), ["run=bot", "max_tokens=12", *settings]), distributed.init("cpu"))
        return capsys.readouterr().out

    with torch.random.fork_rng():
        (tmp_path / "in.txt").write_text("the\na cat\n")
        together = run(chat, "complete=true", f"prompts={tmp_path / 'in.txt'}", "samples=2", "slots=3", "seed=3")
        rows = [json.loads(line) for line in together.splitlines()]
        assert len({row["completion"] for row in rows}) == 4 and all(0 < row["tokens"] <= 12 for row in rows)
        for row in rows:
            assert (
                run(chat, "complete=true", f"prompt={row['prompt']}", f"seed={row['seed']}") == row["completion"] + "\n"
            )
        said = run(chat, "prompt=hello", "seed=1")
        assert said == run(chat, "prompt=hello", "seed=1") and said.endswith("\n")
        assert run(chat, "seed=1").endswith("\n")  # the piped message
