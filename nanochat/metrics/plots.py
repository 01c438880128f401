"""Curves as pictures: an SVG writer without dependencies, PNG where matplotlib is installed, and one for terminals."""

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from nanochat.config import UserError
from nanochat.text import format_count

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Point = tuple[float, float]
Curves = Mapping[str, list[list[Point]]]  # name -> runs of points, with gaps between them
Dots = Mapping[str, list[Point]]

# Told apart by most eyes with a colour vision deficiency, legible on white and on near-black alike.
COLOURS = ("#3b7dd8", "#e0752d", "#2a9d6f", "#c2478f", "#8b6fd0", "#b08a1e", "#17a2b8", "#d0483f")
DASHES = ("", "7 4", "2 3")
WIDTH, HEIGHT = 760, 440
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
  .title { fill: #1f2328; font-size: 17px; font-weight: 600 }
  .value { fill: #1f2328; font-weight: 600 }
  .page { fill: #ffffff }
  .grid { stroke: #d8dee4; stroke-width: 1 }
  .axis { stroke: #8c959f; stroke-width: 1 }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
  @media (prefers-color-scheme: dark) {
    text { fill: #9198a1 }
    .title, .value { fill: #f0f6fc }
    .page { fill: #0d1117 }
    .grid { stroke: #262c36 }
    .axis { stroke: #59636e }
  }
"""


class Axis(NamedTuple):
    """Where data lie along one direction: `low` … `high` (log10 of them if `log`) is `start` … `end` in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    path: Path,
    series: Series,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Series | None = None,
) -> None:
    """Draw curves into a file: .svg by our own writer, .png by matplotlib (`pip install -e ".[plots]"`).

    Args:
        series: name -> (x values, y values), of one length each. A y that is not finite (or, on a log axis, not
            positive) makes a gap. Any number of points may be given: what a pixel column cannot show is left out,
            its extremes never.
        marks: name -> points that are drawn as dots and not joined, in the colour of the curve of that name.

    Raises:
        UserError: another ending than .svg or .png, .png without matplotlib, or the file cannot be written.
        ValueError: a curve has more x than y values, or fewer, or marks have the name of no curve.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path}: pictures are written as .svg or .png")
    if strange := set(marks or {}) - set(series):
        raise ValueError(f"marks of {min(strange)}, which is no curve")
    curves = {name: _segments(name, xs, ys, log_x, log_y) for name, (xs, ys) in series.items()}
    dots = {
        name: list(itertools.chain(*_segments(name, xs, ys, log_x, log_y))) for name, (xs, ys) in (marks or {}).items()
    }
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            _write_png(part, curves, dots, (title, x_label, y_label), log_x, log_y)
        else:
            part.write_text(_svg(curves, dots, (title, x_label, y_label), log_x, log_y), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error.strerror}") from None


def _segments(
    name: str, xs: Sequence[float], ys: Sequence[float], log_x: bool = False, log_y: bool = False
) -> list[list[Point]]:
    """Return the drawable runs of points, by rising x, split where a value is missing."""
    if len(xs) != len(ys):
        raise ValueError(f"{name}: {len(xs)} x values and {len(ys)} y values")
    runs: list[list[Point]] = [[]]
    for x, y in sorted(((float(x), float(y)) for x, y in zip(xs, ys)), key=lambda point: point[0]):
        drawable = math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
        if drawable:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _axis(values: list[float], start: float, end: float, log: bool) -> Axis:
    """Fit an axis around `values`, with room for a constant and for no value at all."""
    values = [math.log10(v) for v in values] if log else values
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = 0.5 if log else 0.05 * abs(low) or 1.0
        low, high = low - room, high + room
    return Axis(low, high, start, end, log)


def _padded(axis: Axis, share: float = 0.05) -> Axis:
    room = share * (axis.high - axis.low)
    return axis._replace(low=axis.low - room, high=axis.high + room)


def ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """Return at most about `count` round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        whole: nothing between whole numbers, as for steps.
    """
    if not high > low:
        return [low]
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    nices = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    step = next(nice * power for nice in nices if nice * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers in [10^low, 10^high]: powers of ten, with 2 and 5 between them where these are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    stride = max(1, math.ceil(len(decades) / 8))
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [d * 10.0**e for e in decades if e % stride == 0 for d in digits]
        found = [v for v in found if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        if len(found) >= 3:
            return found
    return ticks(10.0**low, 10.0**high)


def _ticks(axis: Axis, count: int, whole: bool = False) -> list[tuple[float, str]]:
    """Return (value, label) of an axis's ticks; a linear axis has labels of one unit and one number of digits."""
    if axis.log:
        return [(v, _large(v) if v >= 1000 else f"{v:g}") for v in log_ticks(axis.low, axis.high)]
    values = ticks(axis.low, axis.high, count, whole)
    largest, step = max(map(abs, values)), abs(values[-1] - values[0]) / max(len(values) - 1, 1)
    if largest >= 1e13 or largest < 1e-4 or step < 1e-7 * largest:
        return [(v, f"{v:.9g}".replace("e+", "e")) for v in values]
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit or (largest >= unit >= 1e6):
            return [(v, f"{v / unit:.9g}{suffix}" if v else "0") for v in values]
    decimals = max(len(f"{v:.9f}".rstrip("0").partition(".")[2]) for v in values)
    return [(v, f"{v:.{decimals}f}") for v in values]


def _large(value: float) -> str:
    # FLOPs of a run are far beyond the suffixes that people know.
    return format_count(value) if value < 1e15 else f"{value:.3g}".replace("e+", "e")


def _decimate(points: list[Point]) -> list[Point]:
    """Keep of every pixel column the first, lowest, highest and last point, in their order."""
    if len(points) <= 4 * WIDTH:
        return points
    kept, column = [], [points[0]]

    def flush() -> None:
        extremes = {0, len(column) - 1}
        extremes.add(min(range(len(column)), key=lambda i: column[i][1]))
        extremes.add(max(range(len(column)), key=lambda i: column[i][1]))
        kept.extend(column[i] for i in sorted(extremes))

    for point in points[1:]:
        if int(point[0]) != int(column[0][0]):
            flush()
            column = []
        column.append(point)
    flush()
    return kept


def _text_width(text: str) -> float:
    # Widths of a proportional font are not known here; this is on the generous side for 13px.
    return sum(9.5 if c in "mwMW@%" else 4.0 if c in "iljt.,:|' " else 7.4 for c in text)


def _svg(curves: Curves, dots: Dots, texts: tuple[str, str, str], log_x: bool, log_y: bool) -> str:
    title, x_label, y_label = texts
    points = [point for run in [*itertools.chain(*curves.values()), *dots.values()] for point in run]
    legend_rows = list(_legend(curves, left=24, top=62))
    top = 82 + 22 * (max((row for _, row, *_ in legend_rows), default=0))
    y_axis = _padded(_axis([y for _, y in points], HEIGHT - 56, top, log_y))
    y_ticks = _ticks(y_axis, 6)
    left = 50 + max(_text_width(name) for _, name in y_ticks)
    x_axis = _axis([x for x, _ in points], left, WIDTH - 24, log_x)
    x_ticks = _ticks(x_axis, 8, whole=all(x.is_integer() for x, _ in points))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
    ]
    for value, name in y_ticks:
        y = y_axis.place(value)
        out.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - 24}"/>')
        out.append(f'<text x="{left - 8:.1f}" y="{y + 4.5:.1f}" text-anchor="end">{name}</text>')
    out.append(f'<path class="axis" d="M{left:.1f} {HEIGHT - 56}H{WIDTH - 24}"/>')
    for value, name in x_ticks:
        x = x_axis.place(value)
        out.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - 56}v5"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - 36}" text-anchor="middle">{name}</text>')
    middle = (left + WIDTH - 24) / 2, (top + HEIGHT - 56) / 2
    out.append(f'<text x="{middle[0]:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(26 {middle[1]:.1f}) rotate(-90)"'
    out.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    if not points:
        out.append(f'<text x="{middle[0]:.1f}" y="{middle[1]:.1f}" text-anchor="middle">no data yet</text>')
    for index, (name, runs) in enumerate(curves.items()):
        out.extend(_strokes(runs, x_axis, y_axis, _stroke(index), end=name not in dots))
        out.extend(_dot(x_axis.place(x), y_axis.place(y), COLOURS[index % len(COLOURS)]) for x, y in dots.get(name, []))
    for index, _, x, y, name, value in legend_rows:
        out.append(f'<path class="line" d="M{x} {y - 4}h20" {_stroke(index)}/>')
        last = f'<tspan class="value" dx="8">{value}</tspan>'
        out.append(f'<text x="{x + 28}" y="{y}">{escape(name)}{last}</text>')
    return "\n".join([*out, "</svg>", ""])


def _stroke(index: int) -> str:
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def _strokes(runs: list[list[Point]], x_axis: Axis, y_axis: Axis, stroke: str, end: bool) -> Iterator[str]:
    colour = stroke.split('"')[1]
    for run in runs:
        placed = _decimate([(x_axis.place(x), y_axis.place(y)) for x, y in run])
        if len(placed) == 1:
            yield _dot(*placed[0], colour)
        else:
            yield f'<path class="line" {stroke} d="M{" ".join(f"{x:.1f} {y:.1f}" for x, y in placed)}"/>'
    if end and runs and len(runs[-1]) > 1:
        x, y = runs[-1][-1]
        yield _dot(x_axis.place(x), y_axis.place(y), colour)


def _legend(curves: Curves, left: int, top: int) -> Iterator[tuple[int, int, int, int, str, str]]:
    """Yield (index, row, x, y, name, last value) for every curve, from left to right in as many rows as it takes."""
    x, row = left, 0
    for index, (name, runs) in enumerate(curves.items()):
        value = f"{runs[-1][-1][1]:.4g}" if runs else "-"
        width = math.ceil(28 + _text_width(name) + 8 + 1.1 * _text_width(value) + 22)
        if x > left and x + width > WIDTH - 24:
            x, row = left, row + 1
        yield index, row, x, top + 22 * row, name, value
        x += width


def _write_png(path: Path, curves: Curves, dots: Dots, texts: tuple[str, str, str], log_x: bool, log_y: bool) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError(f'{path.stem}: needs matplotlib: pip install -e ".[plots]", or write .svg') from None
    # The figure's own objects, not pyplot: no global state, no window.
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for index, (name, runs) in enumerate(curves.items()):
        colour, dash = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
        for number, run in enumerate(runs):
            label = f"{name}  {runs[-1][-1][1]:.4g}" if number == 0 else None
            marker = "o" if len(run) == 1 else None
            axes.plot(*zip(*run), color=colour, linestyle=dash, marker=marker, markersize=4, label=label)
        if dots.get(name):
            axes.plot(*zip(*dots[name]), color=colour, linestyle="", marker="o", markersize=4)
    axes.set_title(texts[0], loc="left", fontweight="bold")
    axes.set_xlabel(texts[1])
    axes.set_ylabel(texts[2])
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if any(curves.values()):
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


# The dots of a Braille character, U+2800 and on: one bit each, by column and row.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_UPPER_HALF = 0x01 | 0x02 | 0x08 | 0x10


def ascii_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    title: str = "",
    width: int = 64,
    height: int = 12,
    encoding: str | None = None,
) -> str:
    """Return a curve as text: `height` lines (11 with no title) of at most `width` columns.

    Args:
        steps, values: the curve; values that are not finite make gaps.
        width: at least 24. height: at least 6.
        encoding: of the place it is printed to; None is sys.stdout's. Where it has no Braille characters (which have
            eight dots each), plain ASCII is used.
    """
    runs = _segments("the curve", steps, values)
    points = [point for run in runs for point in run]
    if not points:
        return f"{title}: no data yet" if title else "no data yet"
    names = [f"{v:.4g}" for v in _ends([y for _, y in points])]
    gutter = max(map(len, names)) + 1
    columns, rows = width - gutter - 1, height - 3
    x_axis = _axis([x for x, _ in points], 0, 2 * columns - 1, False)
    y_axis = _axis([y for _, y in points], 4 * rows - 1, 0, False)
    cells = [[0] * columns for _ in range(rows)]
    for run in runs:
        dots = [(x_axis.place(x), y_axis.place(y)) for x, y in run]
        for (x0, y0), (x1, y1) in zip(dots, [*dots[1:], dots[-1]]):
            pieces = math.ceil(max(abs(x1 - x0), abs(y1 - y0), 1))
            for piece in range(pieces + 1):
                x, y = round(x0 + (x1 - x0) * piece / pieces), round(y0 + (y1 - y0) * piece / pieces)
                cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    draw = _braille if _can_encode(encoding or sys.stdout.encoding) else _plain
    margins = {rows // 2: f"{(y_axis.low + y_axis.high) / 2:.4g}"}
    if names[0] != names[1]:
        margins |= {0: names[1], rows - 1: names[0]}
    lines = [title[:width]] if title else []
    lines += [f"{margins.get(i, '')[: gutter - 1]:>{gutter}}|{''.join(map(draw, row))}" for i, row in enumerate(cells)]
    lines.append(" " * gutter + "+" + "-" * columns)
    first, last = (f"{v:g}" for v in _ends([x for x, _ in points]))
    lines.append(" " * (gutter + 1) + first + last.rjust(columns - len(first)))
    return "\n".join(line.rstrip() for line in lines)


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _can_encode(encoding: str | None) -> bool:
    try:
        chr(0x28FF).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _braille(dots: int) -> str:
    return chr(0x2800 + dots) if dots else " "


def _plain(dots: int) -> str:
    upper, lower = bool(dots & _UPPER_HALF), bool(dots & ~_UPPER_HALF)
    return " '.:"[upper + 2 * lower]
