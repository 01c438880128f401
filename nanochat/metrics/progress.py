"""Progress on standard error: a bar on a terminal, occasional plain lines in a log."""

import os
import shutil
import sys
import time
from typing import Self

from tqdm import tqdm

from nanochat.text import format_count, format_duration

MAX_COLUMNS = 100
BAR_COLUMNS = 14
TERMINAL_SECONDS = 0.1
# Log a line after LOG_SECONDS, if LOG_FRACTION of the work is done since the last line or LOG_MAX_SECONDS have passed.
LOG_SECONDS, LOG_FRACTION, LOG_MAX_SECONDS = 10.0, 0.05, 60.0


class Bar:
    """A progress bar, as a context manager: `pretraining: step 120/600 (20.0%) | loss 4.123 | 3m12s left`.

    Args:
        total: units of work including `initial`; None if unknown.
        initial: units done by an earlier process, which the estimate of the time left ignores.
        enabled: default: on rank 0 only.
    """

    def __init__(
        self, total: int | None, *, initial: int = 0, label: str, unit: str = "step", enabled: bool | None = None
    ) -> None:
        self.total, self.done, self.label, self.unit = total, initial, label, unit
        self.enabled = os.environ.get("RANK", "0") == "0" if enabled is None else enabled
        self._values: dict[str, float | str] = {}
        self._start = self._rate_start = (time.monotonic(), initial)
        self._shown = (-float("inf"), initial)
        self._terminal: tqdm | None = None

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            bar_format = f"|{{bar:{BAR_COLUMNS - 3}}}| {{desc}}" if self.total else "{desc}"
            text = self.line(self._columns())
            self._terminal = tqdm(None, text, self.total, initial=self.done, bar_format=bar_format, file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self.enabled and (self._terminal is not None or self._shown[1] != self.done):
            self._show(time.monotonic())
        if self._terminal is not None:
            self._terminal.close()

    def update(self, n: int = 1, **values: float | str) -> None:
        """Count `n` more units, and show `values` until they are replaced: `name number`, or a string by itself."""
        now = time.monotonic()
        if self.done == self._start[1]:
            self._rate_start = (now, self.done + n)  # the first step compiles: the rate is that of the later ones
        self.done += n
        self._values |= values
        if self.enabled and self._is_due(now):
            self._show(now)

    def write(self, text: str) -> None:
        """Print to standard output without breaking the bar."""
        if self._terminal is not None:
            tqdm.write(text, file=sys.stdout)
        elif self.enabled:
            print(text, flush=True)

    def line(self, columns: int = MAX_COLUMNS) -> str:
        """Return one line of at most `columns` characters, without the values that do not fit."""
        count = f"{_number(self.done)}/{_number(self.total)}" if self.total else _number(self.done)
        percent = f" ({100 * self.done / self.total:.1f}%)" if self.total else ""
        head, tail = f"{self.label}: {self.unit} {count}{percent}", self._time()
        for name, value in self._values.items():
            part = value if isinstance(value, str) else f"{name.replace('_', ' ')} {_number(value)}"
            if len(f"{head} | {part} | {tail}") <= columns:
                head = f"{head} | {part}"
        return f"{head} | {tail}"[:columns]

    def _time(self) -> str:
        now = time.monotonic()
        since, done = self._rate_start if self.done > self._rate_start[1] else self._start
        if self.total is None or self.done >= self.total or self.done <= done:
            return format_duration(now - self._start[0])
        return f"{format_duration((self.total - self.done) * (now - since) / (self.done - done))} left"

    def _is_due(self, now: float) -> bool:
        seconds = now - self._shown[0]
        if self._terminal is not None:
            return seconds >= TERMINAL_SECONDS
        fraction = (self.done - self._shown[1]) / self.total if self.total else 1.0
        return seconds >= LOG_SECONDS and (fraction >= LOG_FRACTION or seconds >= LOG_MAX_SECONDS)

    def _show(self, now: float) -> None:
        self._shown = (now, self.done)
        if self._terminal is None:
            print(self.line(), file=sys.stderr, flush=True)
        else:
            self._terminal.n = self.done
            self._terminal.set_description_str(self.line(self._columns()))

    def _columns(self) -> int:
        # One column stays free, because some terminals wrap a full line.
        return min(MAX_COLUMNS, shutil.get_terminal_size().columns - 1 - (BAR_COLUMNS if self.total else 0))


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value) if abs(value) < 100_000 else format_count(value)
    return f"{value:.4g}" if not abs(value) >= 10_000 else format_count(value)
