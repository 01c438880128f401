"""Progress of long work: a bar on a terminal, a plain line now and then in a log; both on standard error."""

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
# A log gets a line once this much time has passed since the last one, and this share of the work or a minute.
LOG_SECONDS, LOG_SHARE, LOG_MAX_SECONDS = 10.0, 0.05, 60.0


def bar(total: int | None, *, initial: int = 0, label: str, unit: str = "step", enabled: bool | None = None) -> "Bar":
    """Return a progress bar, to be used in a `with` statement.

        with progress.bar(600, label="pretraining") as shown:
            for _ in range(600):
                shown.update(loss=4.123, speed="8.2k tok/s")

    shows `pretraining: step 120/600 (20.0%) | loss 4.123 | 8.2k tok/s | 3m12s left`.

    Args:
        total: units of work in all, those of `initial` included; None where nobody knows.
        initial: units done by an earlier process; they do not count in the estimate of the time left.
        unit: what is counted.
        enabled: False shows nothing; None shows on rank 0 of a torchrun job only.
    """
    return Bar(total, initial, label, unit, os.environ.get("RANK", "0") == "0" if enabled is None else enabled)


class Bar:
    """What `bar` returns: counts, and shows the count."""

    def __init__(self, total: int | None, initial: int, label: str, unit: str, enabled: bool) -> None:
        self.total, self.done, self.label, self.unit, self.enabled = total, initial, label, unit, enabled
        self._values: dict[str, float | str] = {}
        self._started = self._rate_from = time.monotonic()
        self._started_done = self._rate_from_done = initial
        self._shown_at, self._shown_done = -float("inf"), initial
        self._terminal: tqdm | None = None

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            bar_format = f"|{{bar:{BAR_COLUMNS - 3}}}| {{desc}}" if self.total else "{desc}"
            self._terminal = tqdm(
                desc=self.line(self._columns()),
                total=self.total,
                initial=self.done,
                bar_format=bar_format,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.enabled and (self._terminal is not None or self._shown_done != self.done):
            self._show(time.monotonic())
        if self._terminal is not None:
            self._terminal.close()

    def update(self, n: int = 1, **values: float | str) -> None:
        """Count `n` more units.

        Args:
            values: shown until replaced; a number as `name number`, a string just so.
        """
        now = time.monotonic()
        if self.done == self._started_done:
            # The first step compiles: where there are more, the rate is that of the others.
            self._rate_from, self._rate_from_done = now, self.done + n
        self.done += n
        self._values |= values
        if self.enabled and self._due(now):
            self._show(now)

    def write(self, text: str) -> None:
        """Print `text` to standard output without tearing the bar (`print` would)."""
        if self._terminal is not None:
            tqdm.write(text, file=sys.stdout)
        elif self.enabled:
            print(text, flush=True)

    def line(self, columns: int = MAX_COLUMNS) -> str:
        """Return the state as one line of at most `columns` characters; values that do not fit are left out."""
        count = f"{_number(self.done)}/{_number(self.total)}" if self.total else _number(self.done)
        share = f" ({100 * self.done / self.total:.1f}%)" if self.total else ""
        head, tail = f"{self.label}: {self.unit} {count}{share}", self._time()
        for name, value in self._values.items():
            part = value if isinstance(value, str) else f"{name.replace('_', ' ')} {_number(value)}"
            if len(f"{head} | {part} | {tail}") <= columns:
                head = f"{head} | {part}"
        return f"{head} | {tail}"[:columns]

    def _time(self) -> str:
        now = time.monotonic()
        counted, since = self.done - self._rate_from_done, self._rate_from
        if counted <= 0:
            counted, since = self.done - self._started_done, self._started
        if self.total is None or self.done >= self.total or counted <= 0:
            return format_duration(now - self._started)
        return f"{format_duration((self.total - self.done) * (now - since) / counted)} left"

    def _due(self, now: float) -> bool:
        waited = now - self._shown_at
        if self._terminal is not None:
            return waited >= TERMINAL_SECONDS
        share = (self.done - self._shown_done) / self.total if self.total else 1.0
        return waited >= LOG_SECONDS and (share >= LOG_SHARE or waited >= LOG_MAX_SECONDS)

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_done = now, self.done
        if self._terminal is None:
            print(self.line(), file=sys.stderr, flush=True)
            return
        self._terminal.n = self.done
        self._terminal.set_description_str(self.line(self._columns()))

    def _columns(self) -> int:
        # One column stays free: a full line makes some terminals wrap.
        free = shutil.get_terminal_size().columns - 1 - (BAR_COLUMNS if self.total else 0)
        return min(MAX_COLUMNS, free)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value) if abs(value) < 100_000 else format_count(value)
    return f"{value:.4g}" if not abs(value) >= 10_000 else format_count(value)
