"""Numbers, durations, tables and errors as text for people."""

import math
from collections.abc import Sequence

_SUFFIXES = ("", "k", "M", "B", "T")


def format_count(number: float) -> str:
    """Return `number` with three significant digits and k, M, B or T: 1_234_567 is "1.23M", 8200 is "8.2k"."""
    if not math.isfinite(number):
        return str(float(number))
    # Rounding comes first, so that 999_999 becomes 1M and not 1000k.
    rounded = float(f"{number:.3g}")
    power = 0
    while abs(rounded) >= 1000 and power < len(_SUFFIXES) - 1:
        rounded, power = rounded / 1000, power + 1
    return f"{rounded:.3g}{_SUFFIXES[power]}"


def format_duration(seconds: float) -> str:
    """Return a span of time in its two largest units: 120ms, 3m12s, 1h02m, 2d05h; "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g}ms" if seconds else "0s"
    if seconds < 9.95:
        return f"{seconds:.2g}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text: the first column to the left, the others to the right, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(table_row(row, widths) for row in rows)


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row of a table whose other rows are not known yet."""
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
    return "  ".join(["", cells[0].ljust(widths[0]), *others]).rstrip()


def reason(error: BaseException) -> str:
    """Return why an error happened in one line: an OSError's reason, else the first line of its message."""
    message = str(getattr(error, "strerror", None) or error).strip()
    return message.splitlines()[0].strip().rstrip(".") if message else type(error).__name__
