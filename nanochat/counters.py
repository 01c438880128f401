"""Counters and histograms of the server, and Prometheus' text format of them."""

import bisect
import dataclasses
from collections.abc import Iterable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # a histogram's bounds


@dataclasses.dataclass
class Histogram:
    """Observations in seconds: how many in each of `SECONDS`' intervals (the last is open), and their sum."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


@dataclasses.dataclass
class Counters:
    """What has been counted: (name, label) -> number, and name -> histogram."""

    numbers: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)

    def add(self, name: str, label: str = "", number: int = 1) -> None:
        """Count up."""
        self.numbers[name, label] = self.numbers.get((name, label), 0) + number

    def observe(self, name: str, seconds: float) -> None:
        """Add an observation to a histogram."""
        histogram = self.histograms.setdefault(name, Histogram())
        histogram.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds

    def mean(self, name: str) -> float:
        """Return the mean of a histogram, 0 of an empty one."""
        histogram = self.histograms.get(name, Histogram())
        return histogram.total / max(1, sum(histogram.counts))

    def labelled(self, name: str) -> dict[str, int]:
        """Return {label: number} of a counter."""
        return {label: number for (counter, label), number in self.numbers.items() if counter == name}


def metric(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    """Return the lines of one metric.

    Args:
        kind: counter or gauge. samples: (labels as Prometheus writes them, or an empty string; value).
    """
    name = f"nanochat_{name}"
    return [
        f"# HELP {name} {about}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in samples),
    ]


def histogram(name: str, about: str, counters: Counters) -> list[str]:
    """Return the lines of a histogram; one that nothing was observed in has only zeros."""
    found = counters.histograms.get(name, Histogram())
    name, total = f"nanochat_{name}", 0
    lines = [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
    for bound, count in zip((*map(str, SECONDS), "+Inf"), found.counts):
        total += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {found.total}", f"{name}_count {total}"]
