"""Chat and plain completion in the terminal, typed, piped and given: the real engine, which draws what a test says."""

import codecs
import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_draws import script_draws
from tiny_run import TOK, save_run

import launch
from experiments import chat
from nanochat import checkpoint, distributed, infer
from nanochat.config import UserError, override
from nanochat.data import Piece, chat_format
from nanochat.infer import Request

ROOT = Path(__file__).resolve().parents[2]
PY, PY_END, OUT, OUT_END, BOT_END = (
    TOK.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end")
)
TOOL = [*b"It is ", PY, *b"12*3", PY_END, OUT, *b"36", OUT_END, *b".", BOT_END]


def script(request: Request) -> list[int]:
    """Return the tokens of an answer: an echo with the number of user messages, or something by name."""
    text = TOK.decode(request.prompt)
    if "<|assistant_start|>" not in text:  # plain text
        *_, last = text.removeprefix("<|bos|>").split() or [""]
        return [*f" …{last}{request.seed}".encode(), TOK.bos]
    message = text.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
    special = {"tool": TOOL, "escape": [*b"\x1b[31mred\x07\r", BOT_END], "long": [*b"word " * 100], "half": [0xC3] * 9}
    return special.get(message) or [*f"you said: {message} ({text.count('<|user_start|>')}). ✓".encode(), BOT_END]


def main(argv: list[str]) -> int:
    """Run launch.py's command line in this process, with the script at a visible pace."""
    patch, step = pytest.MonkeyPatch(), infer.step
    script_draws(patch, script)
    patch.setattr(infer, "step", lambda engine: (time.sleep(0.01), step(engine))[1])
    return launch.main(argv)


CODE = "import sys; from tests.experiments import test_chat; sys.exit(test_chat.main(['launch.py', *sys.argv[1:]]))"
COMMAND = [sys.executable, "-c", CODE, "--experiment=chat", "--set=run=sft"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("base")
    save_run(folder, "bot", steps=(3,))
    save_run(folder, "sft", stage="sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        yield folder


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the engine gets; it follows the script."""
    return script_draws(monkeypatch, script)


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the experiment in this process; returns (standard output, standard error)."""

    def run(*settings: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        chat.run(override(chat.config(), ["run=sft", *settings]), distributed.init("cpu"))
        return capsys.readouterr()

    return run


def environment(base: Path, **more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), env.get("PYTHONPATH", "")])
    return env | {"PYTHONPATH": path, "NANOCHAT_BASE_DIR": str(base), "TERM": "xterm", "OMP_NUM_THREADS": "1", **more}


def test_only_the_answer_goes_to_standard_output(run: Run, requests: list[Request]):
    out, err = run("prompt=why?")
    assert out == "you said: why? (1). ✓\n"
    assert err.startswith("sft, step 1 (sft): ") and err.count("\n") == 1
    (request,) = requests
    assert (request.temperature, request.top_k, request.max_tokens) == (0.6, 50, 512)
    assert list(request.prompt) == chat_format.prompt(TOK, [{"role": "user", "content": "why?"}])
    assert run("prompt=-", stdin="two\nlines\n")[0] == "you said: two\nlines (1). ✓\n"
    assert checkpoint.warning(checkpoint.load("bot")) in run("run=bot", "prompt=hi")[1].splitlines()


def test_piped_lines_are_messages_of_one_conversation(run: Run, requests: list[Request]):
    out, err = run(stdin="one\n\n  two  \nCLEAR\nthree\n/quit\nfour\n")
    assert out == "you said: one (1). ✓\nyou said: two (2). ✓\nyou said: three (1). ✓\n"
    assert "a new conversation" in err and chat.PROMPT not in err and "\x1b" not in err
    first, second, third = requests
    turns = [("user", "one"), ("assistant", "you said: one (1). ✓"), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert list(second.prompt) == chat_format.prompt(TOK, messages)
    assert list(third.prompt) == chat_format.prompt(TOK, [{"role": "user", "content": "three"}])
    assert len({first.seed, second.seed, third.seed}) == 3
    run("seed=7", stdin="a\nclear\nb\n")
    assert [request.seed for request in requests[3:]] == [7, 8]


def test_tool_calls_are_shown_separately_and_kept_in_the_history(run: Run, requests: list[Request]):
    out, err = run(stdin="tool\nand?\n")
    assert out == "It is .\nyou said: and? (2). ✓\n"
    assert err.splitlines()[1:] == ["[calculator: 12*3 = 36]"]
    prompt = list(requests[1].prompt)
    assert any(prompt[i : i + len(TOOL)] == TOOL for i in range(len(prompt))), "as the model generated it"


def test_cut_answer_shows_the_reason(run: Run, requests: list[Request]):
    out, err = run("max_tokens=7", "prompt=long")
    assert out == "word wo\n" and err.splitlines()[-1] == "[cut at max_tokens=7]"
    assert run("prompt=long")[1].splitlines()[-1] == "[cut at the end of the context, 64 tokens]"
    assert run("prompt=half", "max_tokens=1")[0] == "\ufffd\n"


def test_verbose_shows_the_speed(run: Run, requests: list[Request]):
    err = run("verbose=true", "seed=5", "prompt=hi")[1]
    assert "[22 tokens, " in err and "tokens/s, the first after 0.0" in err and "of 64 tokens; seed 5]" in err


def test_oldest_exchanges_are_dropped_beyond_the_context(run: Run, requests: list[Request]):
    messages = ["a" * 12, "b" * 12, "c" * 12]  # an exchange takes 47 of 64 tokens
    out, err = run(stdin="\n".join(messages))
    assert out == "".join(f"you said: {message} (1). ✓\n" for message in messages)
    assert err.count("longer than the context of 64 tokens: its first 2 messages are dropped") == 2
    with pytest.raises(UserError, match=r"the message has 84 tokens, the model's context holds 64: shorten it"):
        run(f"prompt={'x' * 80}")
    assert run(f"prompt={'x' * 55}")[0] == "you s\n"  # fits, with little room for an answer


def test_invalid_settings_are_refused_before_loading(run: Run):
    for setting in ("prompts=a", "output=b", "samples=2"):
        with pytest.raises(UserError, match="add --set complete=true"):
            override(chat.config(), [setting])
    with pytest.raises(UserError, match="top_k=-1: must be at least 0"):
        override(chat.config(), ["top_k=-1"])
    with pytest.raises(UserError, match="prompt: is empty"):
        run("prompt=-", stdin="\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colors_and_control_characters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pieces = [("python", "1+"), ("python", "1"), ("output", "2"), ("python", "x"), ("text", "a\x1bb")]

    def shown() -> tuple[str, str]:
        out, err = Terminal(), Terminal()
        screen = chat.Screen(out, err)
        screen.show(Piece(*piece) for piece in pieces)
        screen.end()
        screen.note("n")
        return out.getvalue(), err.getvalue()

    dim, plain = "\x1b[2m", "\x1b[0m"
    notes = f"{dim}[calculator: 1+1 = 2]{plain}{dim}[calculator: x]{plain}{dim}n{plain}\n"
    assert shown() == ("a\ufffdb\n", notes)
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == ("a\ufffdb\n", "[calculator: 1+1 = 2][calculator: x]n\n")
    assert chat.printable("\x1b[0m\r\n", io.StringIO()) == "\x1b[0m\r\n", "into a file goes what the model wrote"


@pytest.mark.slow
def test_answer_streams_and_a_closed_pipe_is_not_an_error(base: Path):
    command, pipe = [*COMMAND, "--set=prompt=long", "--set=max_tokens=40"], subprocess.PIPE
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
    with subprocess.Popen(command, env=environment(base), **streams) as process:
        assert process.stdout and process.stderr
        first = os.read(process.stdout.fileno(), 1000)
        assert 0 < len(first) < 20, "the answer comes while it is made"
        process.stdout.close()  # as `head` does
        err = process.stderr.read().decode()
        assert process.wait(20) == 0, err
    assert "Traceback" not in err and "rokenPipe" not in err


class Session:
    """The chat in a pseudo-terminal, and what it has shown."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process, self.terminal = process, terminal
        self.text, self.seen = "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def expect(self, text: str) -> str:
        """Read until `text` appears behind what was expected before; return what came up to its end."""
        assert self.shows(text, 100), f"no {text!r} in {self.text[self.seen :]!r}"
        begin, self.seen = self.seen, self.text.find(text, self.seen) + len(text)
        return self.text[begin : self.seen]

    def shows(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self.text[self.seen :] and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.5)[0]:
                try:
                    self.text += self.decoder.decode(os.read(self.terminal, 4096))
                except OSError:  # Linux's way to say that the other end is closed
                    break
        return text in self.text[self.seen :]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


@contextlib.contextmanager
def session(base: Path, **env: str) -> Iterator[Session]:
    terminal, slave = pty.openpty()
    command = ["setsid", "--ctty", *COMMAND, "--set=max_tokens=1000"]  # Ctrl-C interrupts who owns the terminal
    process = subprocess.Popen(command, env=environment(base, **env), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        session = Session(process, terminal)
        session.expect("> ")
        yield session
    finally:
        process.kill()
        process.wait(20)
        os.close(terminal)


@pytest.mark.slow
def test_conversation_at_a_terminal(base: Path):
    with session(base) as terminal:
        assert "Ctrl-C stops an answer\x1b[0m" in terminal.text
        for message, shown in (("hi", "hi (1). ✓"), ("more", "more (2). ✓")):
            terminal.type(f"{message}\r")
            terminal.expect(f"you said: {shown}")
        terminal.type("clear\r")
        terminal.expect("a new conversation")
        terminal.type("tool\r")
        assert "It is \x1b[2m[calculator: 12*3 = 36]\x1b[0m." in terminal.expect("36]\x1b[0m.")
        terminal.expect("> ")
        terminal.type("\x1b[A\x1b[A\x1b[A\r")  # the third line up
        terminal.expect("you said: more (2). ✓")
        terminal.type("escape\r")
        assert "\x1b[31m" not in terminal.expect("\ufffd[31mred\ufffd\ufffd")
        terminal.expect("> ")
        terminal.type("x" * 80 + "\r")
        terminal.expect("error: the message has 84 tokens")
        terminal.expect("> ")
        for _ in range(10):  # Python loses a SIGINT that comes after the prompt and before readline waits for a key
            terminal.type("\x03")
            if terminal.shows("left by Ctrl-C; `quit` or Ctrl-D leaves as well", 3):
                break
        else:
            pytest.fail(f"Ctrl-C did not end the chat: {terminal.text!r}")
        assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_chat_continues(base: Path):
    with session(base, NO_COLOR="1") as terminal:
        terminal.type("long\r")
        terminal.expect("word word")  # it would end after 0.6 s, at the end of the context
        terminal.type("\x03")
        before = terminal.expect("[stopped]")
        assert "cut" not in before and before.count("word") < 12
        terminal.expect("> ")
        terminal.type("on\r")
        terminal.expect("you said: on (")  # the engine's slot was free
        terminal.expect("> ")
        assert "\x1b[2m" not in terminal.text
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    assert "Traceback" not in terminal.text


def test_plain_text_is_completed_without_chat_tokens(run: Run, requests: list[Request]):
    out, err = run("complete=true", "run=bot", "prompt=once upon")
    assert out == " …upon42\n"
    assert err.startswith("bot, step 3 (base)") and err.count("\n") == 1
    run("complete=true", "prompt=-", stdin="line\n\n")
    prompts = [(TOK.bos, *TOK.encode(text)) for text in ("once upon", "line\n")]
    assert requests == [Request(ids, 256, temperature=0.8, top_k=50, seed=42) for ids in prompts]
    assert run("complete=true", "prompt=a b", "max_tokens=3")[0] == " \ufffd\n"  # cut within a character


def test_samples_of_a_prompt(run: Run, requests: list[Request]):
    out, _ = run("complete=true", "prompt=x", "samples=3", "seed=1", "slots=2")
    assert out == "".join(f"--- sample {i} of 3\n …x{i}\n" for i in (1, 2, 3))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_file_of_prompts(run: Run, requests: list[Request], tmp_path: Path, kind: str):
    prompts = ["short", "a much longer one", "é"]
    lines = [json.dumps({"id": i, "prompt": text} if i else text) for i, text in enumerate(prompts)]
    (tmp_path / f"in.{kind}").write_text("\n\n".join(lines if kind == "jsonl" else prompts) + "\n")
    settings, file = ("complete=true", f"prompts={tmp_path}/in.{kind}", "samples=2", "slots=3"), tmp_path / "out.jsonl"
    out, err = run(*settings, f"output={file}")
    assert out == "" and "complete" in err
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in prompts for _ in range(2)]
    assert [(row["sample"], row["seed"]) for row in rows] == [(i % 2, 42 + i) for i in range(6)]
    assert [row["completion"] for row in rows] == [f" …{r['prompt'].split()[-1]}{r['seed']}" for r in rows]
    assert rows[0]["finish"] == "stop" and rows[0]["tokens"] == len(" …short42".encode()) + 1
    assert [row.get("id") for row in rows] == ([None, None, 1, 1, 2, 2] if kind == "jsonl" else [None] * 6)
    assert list(tmp_path.glob("*.partial")) == []
    assert run(*settings)[0] == file.read_text("utf-8")


def test_interrupted_completions_are_kept(run: Run, tmp_path: Path, monkeypatch, capsys):
    def interrupted(request: Request) -> list[int]:
        if request.prompt[-1] == ord("c"):
            raise KeyboardInterrupt
        return script(request)

    script_draws(monkeypatch, interrupted)
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    with pytest.raises(KeyboardInterrupt):
        run("complete=true", f"prompts={tmp_path / 'in.txt'}", f"output={tmp_path / 'out.jsonl'}", "slots=2")
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl.partial"]
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 2
    assert f"completions so far: {tmp_path / 'out.jsonl.partial'}" in capsys.readouterr().err


def test_invalid_prompt_files_are_refused(run: Run, tmp_path: Path):
    def error(*settings: str) -> str:
        with pytest.raises(UserError) as caught:
            run("complete=true", *settings)
        return str(caught.value)

    both = "set either a prompt"
    assert error().startswith(both) and error("prompt=a", "prompts=b").startswith(both)
    assert error(f"prompts={tmp_path}/none") == f"{tmp_path}/none cannot be read: No such file or directory"
    file = tmp_path / "in.jsonl"
    for text, message in {
        "\n \n": "has no prompt in it",
        '"a"\n\nb': ":3: not valid JSON",
        '{"text": "a"}': ':1: expected a string, or an object with a "prompt"',
        json.dumps("x" * 99): "the prompt has 100 tokens, the model's context holds 64: shorten it",
        '"a"\n' + json.dumps("x" * 63): "prompt 2 of 2 has 64 tokens",
    }.items():
        file.write_text(text)
        assert message in error(f"prompts={file}")
    file.write_text('"a"')
    assert f"output={tmp_path}/no/out: cannot be written" in error(f"prompts={file}", f"output={tmp_path}/no/out")
