"""Progress: format of the line, frequency of log lines, the bar on a terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from nanochat.metrics import progress


class Clock:
    """A fake clock that tests advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.delenv("RANK", raising=False)
    return Clock(monkeypatch)


def run(clock: Clock, steps: int, seconds: float, first: float = 0.0, total: int | None = None) -> None:
    """Update `steps` times, `seconds` apart; the first step takes `first` seconds longer."""
    with progress.Bar(total or steps, label="train") as shown:
        for step in range(steps):
            clock.now += seconds + (first if step == 0 else 0)
            shown.update(loss=4.0 - step / steps)


def test_line_format(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(600, label="pretraining") as shown:
        for _ in range(120):
            clock.now += 0.4
            shown.update(loss=4.12345, speed="8.2k tok/s", mfu="mfu 41%", val_bpb=2.31)
        line = shown.line()
    expected = "pretraining: step 120/600 (20.0%) | loss 4.123 | 8.2k tok/s | mfu 41% | val bpb 2.31 | 3m12s left"
    assert line == expected
    assert len(line) <= 100
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_values_stay_until_replaced_and_numbers_are_short(clock: Clock) -> None:
    with progress.Bar(10, label="train") as shown:
        shown.update(loss=2.0, bpb=1.5)
        shown.update(loss=1.0, tokens=52_428_800, tiny=1.23456e-7, rows=7)
        assert "loss 1 | bpb 1.5 | tokens 52.4M | tiny 1.235e-07 | rows 7 | " in shown.line()


@pytest.mark.parametrize("columns", [100, 60, 45])
def test_line_fits_columns_and_keeps_time_left(clock: Clock, columns: int) -> None:
    with progress.Bar(1000, label="train") as shown:
        for step in range(10):
            clock.now += 1
            shown.update(1, **{f"value_{i}": step + i / 7 for i in range(20)})
        line = shown.line(columns)
    assert len(line) <= columns and line.endswith("| 16m30s left") and "step 10/1000 (1.0%)" in line
    assert ("value 0" in line) == (columns > 45)


def test_estimate_excludes_first_step(clock: Clock) -> None:
    with progress.Bar(101, label="train") as shown:
        clock.now += 60  # compiles
        shown.update()
        assert shown.line().endswith("| 1h40m left")
        clock.now += 1
        shown.update()
        assert shown.line().endswith("| 1m39s left")


def test_estimate_excludes_steps_of_an_earlier_process(clock: Clock) -> None:
    with progress.Bar(200, initial=100, label="train") as shown:
        for _ in range(10):
            clock.now += 2
            shown.update()
        assert shown.line() == "train: step 110/200 (55.0%) | 3m00s left"


def test_last_line_shows_elapsed_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, steps=5, seconds=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "train: step 5/5 (100.0%) | loss 3.2 | 10s"
    assert len(lines) == 2  # the first step and the last


@pytest.mark.parametrize(
    ("steps", "seconds", "least", "most"),
    [
        (600, 1.0, 20, 22),  # ten minutes: every 5%, which is 30 seconds
        (1000, 0.05, 5, 7),  # 50 seconds: every ten
        (100, 600.0, 100, 100),  # a step takes ten minutes: a line for each
        (7200, 1.0, 120, 122),  # two hours: a line a minute
    ],
)
def test_log_line_frequency(
    clock: Clock, capsys: pytest.CaptureFixture[str], steps: int, seconds: float, least: int, most: int
) -> None:
    run(clock, steps, seconds)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert least <= len(lines) <= most
    assert "step 1/" in lines[0] and f"step {steps}/{steps}" in lines[-1]
    assert "\r" not in err and "\x1b" not in err


def test_last_state_is_logged_after_an_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress.Bar(100, label="train") as shown:
        for _ in range(7):
            clock.now += 1
            shown.update()
        raise KeyError
    assert capsys.readouterr().err.splitlines()[-1].startswith("train: step 7/100 (7.0%)")


def test_unknown_total_shows_count_and_elapsed_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar(None, label="tokenizer", unit="docs") as shown:
        for _ in range(30):
            clock.now += 1
            shown.update(50_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "tokenizer: docs 1.5M | 30s"
    assert len(lines) == 4


def test_large_counts_are_short(clock: Clock) -> None:
    with progress.Bar(93_000_000, label="shard", unit="bytes") as shown:
        clock.now += 1
        shown.update(31_000_000)
        assert shown.line() == "shard: bytes 31M/93M (33.3%) | 2s left"


@pytest.mark.parametrize(("rank", "enabled", "speaks"), [("1", None, False), ("0", None, True), ("0", False, False)])
def test_other_ranks_are_silent(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    enabled: bool | None,
    speaks: bool,
) -> None:
    monkeypatch.setenv("RANK", rank)
    with progress.Bar(2, label="train", enabled=enabled) as shown:
        shown.update()
        shown.write("a sample")
        shown.update()
    out, err = capsys.readouterr()
    assert (out == "a sample\n") is speaks and (out == "") is not speaks
    assert bool(err) is speaks


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


def on_a_terminal(columns: int) -> str:
    """Return the output of a process with a progress bar on a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "RANK")} | {"TERM": "xterm"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ON_A_TERMINAL]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=root, env=env)
    os.close(follower)
    sent = io.BytesIO()
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the process has closed its end
            break
        if not piece:
            break
        sent.write(piece)
    os.close(leader)
    assert process.wait() == 0
    return sent.getvalue().decode()


@pytest.mark.parametrize("columns", [80, 140])
def test_terminal_redraws_a_single_line(columns: int) -> None:
    text = on_a_terminal(columns)
    drawn = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, drawn)) < columns
    assert "pretraining: step 20/60 (33.3%)" in drawn[0]
    assert len(drawn) >= 4
    assert drawn.count("evaluation: 2.31 bits per byte") == 1
    assert "step 60/60 (100.0%) | loss 4" in drawn[-1] and "█" in drawn[-1]
    # Two lines stay on the screen: the note, and the bar as it was left.
    assert text.rstrip("\r\n").count("\n") == 1
    assert ("mfu 41%" in drawn[-1]) == (columns > 80)
