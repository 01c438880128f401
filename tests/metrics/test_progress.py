"""Progress: format of the line, frequency of log lines, the bar on a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat.metrics import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_line_format(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(600, label="pretraining") as shown:
        for _ in range(120):
            clock.now += 0.4
            shown.update(loss=4.12345, speed="8.2k tok/s", mfu="mfu 41%")
        shown.update(0, val_bpb=2.31, tokens=52_428_800, tiny=1.23456e-7)
        start = "pretraining: step 120/600 (20.0%) | loss 4.123 | 8.2k tok/s | mfu 41% | val bpb 2.31"
        assert shown.line(130) == f"{start} | tokens 52.4M | tiny 1.235e-07 | 3m12s left"
        # Values that do not fit are skipped.
        assert shown.line() == f"{start} | 3m12s left"
        assert shown.line(60) == "pretraining: step 120/600 (20.0%) | loss 4.123 | 3m12s left"
    assert capsys.readouterr().err.splitlines()[-1] == f"{start} | 3m12s left"


def test_estimate_excludes_the_first_step_and_an_earlier_process(clock: SimpleNamespace) -> None:
    with progress.Bar(201, initial=100, label="train") as shown:
        clock.now += 60  # compiles
        shown.update()
        assert shown.line().endswith("| 1h40m left")
        clock.now += 1
        shown.update()
        assert shown.line() == "train: step 102/201 (50.7%) | 1m39s left"


@pytest.mark.parametrize(
    ("steps", "seconds", "least", "most"),
    [
        (5, 2.0, 2, 2),  # the first step and the last
        (600, 1.0, 20, 22),  # ten minutes: every 5%, which is 30 seconds
        (1000, 0.05, 5, 7),  # 50 seconds: every ten
        (7200, 1.0, 120, 122),  # two hours: a line a minute
    ],
)
def test_log_line_frequency(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], steps: int, seconds: float, least: int, most: int
) -> None:
    with progress.Bar(steps, label="train") as shown:
        for _ in range(steps):
            clock.now += seconds
            shown.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and least <= len(lines) <= most
    assert "step 1/" in lines[0] and f"step {steps}/{steps}" in lines[-1]
    assert "left" not in lines[-1], "the last line has the time that all took"
    assert "\r" not in err and "\x1b" not in err


@pytest.mark.parametrize(
    ("total", "label", "last"),
    [(100, "train", "train: step 7/100 (7.0%) | 1m33s left"), (None, "tokenizer", "tokenizer: step 7 | 7s")],
)
def test_last_state_is_logged_after_an_error(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], total: int | None, label: str, last: str
) -> None:
    with pytest.raises(KeyError), progress.Bar(total, label=label) as shown:
        for _ in range(7):
            clock.now += 1
            shown.update()
        raise KeyError
    assert capsys.readouterr().err.splitlines()[-1] == last


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, enabled, speaks in (("1", None, False), ("0", None, True), ("0", False, False)):
        monkeypatch.setenv("RANK", rank)
        with progress.Bar(2, label="train", enabled=enabled) as shown:
            shown.update()
            shown.write("a sample")
        out, err = capsys.readouterr()
        assert out == ("a sample\n" if speaks else "") and bool(err) is speaks


ON_A_TERMINAL = """
import sys, time
from nanochat.metrics import progress
with progress.Bar(60, initial=20, label="pretraining") as shown:
    for step in range(40):
        time.sleep(0.01)
        shown.update(loss=4.0, speed="8.2k tok/s", mfu="mfu 41%")
        if step == 10:
            shown.write("evaluation: 2.31 bits per byte")
"""


@pytest.mark.parametrize("columns", [80, 140])
def test_terminal_redraws_a_single_line(columns: int) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "RANK")} | {"TERM": "xterm"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], cwd=Path(__file__).parents[2], env=env, **streams)
    os.close(follower)
    content = b""
    with contextlib.suppress(OSError):  # the process has closed its end
        while piece := os.read(leader, 65536):
            content += piece
    os.close(leader)
    assert process.wait() == 0
    text = content.decode()
    drawn = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, drawn)) < columns and len(drawn) >= 4
    assert "pretraining: step 20/60 (33.3%)" in drawn[0]
    assert drawn.count("evaluation: 2.31 bits per byte") == 1
    assert "step 60/60 (100.0%) | loss 4" in drawn[-1] and "█" in drawn[-1]
    # Two lines stay on the screen: the note, and the bar as it was left.
    assert text.rstrip("\r\n").count("\n") == 1
    assert ("mfu 41%" in drawn[-1]) == (columns > 80)
