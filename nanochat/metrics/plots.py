"""Charts of a run: SVG or PNG files by matplotlib, and a curve for the terminal."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.config import UserError
from nanochat.metrics import logger
from nanochat.text import reason

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# What a run may have recorded: file -> (title, y label, {curve: metric}).
RUN_CHARTS = {
    "loss": ("training loss", "nats per token", {"each step": "train/loss", "smoothed": "train/loss_ema"}),
    "bpb": ("validation", "bits per byte", {"validation": "val/bpb", "average of the weights": "val/bpb_ema"}),
    "noise_scale": ("gradient noise scale", "tokens", {"critical batch": "noise_scale/tokens"}),
    "preference": ("held-out pairs", "fraction", {"chosen is preferred": "val/preference_accuracy"}),
    "reward": ("reward", "mean reward", {"each step": "rl/reward"}),
    "length": ("length of answers", "tokens", {"answers": "rl/answer_tokens"}),
    "pass": ("pass@k on test problems", "fraction solved", {f"pass@{k}": f"rl/pass_at_{k}" for k in (1, 2, 4, 8)}),
}

# Distinct for most color vision deficiencies.
COLORS = ("#3b7dd8", "#e0752d", "#2a9d6f", "#c2478f", "#8b6fd0", "#b08a1e", "#17a2b8", "#d0483f")
LINE_STYLES = ("-", "--", ":")


class HeatMap(NamedTuple):
    """Values over two settings, the mean where a point is there twice; a value that is not finite is an empty cell."""

    x_label: str
    y_label: str
    points: Sequence[tuple[Any, Any, float]]  # x, y, value
    title: str


def draw_run(rows: Sequence[logger.Row], folder: Path, *, title: str, prefix: str = "") -> dict[str, Path]:
    """Draw the charts of metrics.jsonl that have data into `folder`; return {title: file}."""
    tasks = dict.fromkeys(name for row in rows for name in row if name.startswith("chat/"))
    scores = {name.removeprefix("chat/"): name for name in tasks if len(logger.curve(rows, name)[0]) > 1}
    charts = {}
    for file, (subject, y_label, names) in {
        **RUN_CHARTS,
        "chat": ("tasks during training", "accuracy", scores),
    }.items():
        curves = {label: logger.curve(rows, name) for label, name in names.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if file == "reward" and curves:
            steps, rewards = curves["each step"]
            curves["smoothed"] = steps, logger.smoothed(rewards)
        if curves:
            path = charts[f"{title}: {subject}"] = folder / f"{prefix}{file}.svg"
            line_chart(path, curves, title=f"{title}: {subject}", x_label="step", y_label=y_label)
    return charts


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
    heat: HeatMap | None = None,
) -> None:
    """Draw curves into a .svg or .png file; the same data give the same bytes.

    Args:
        series: name -> (x values, y values). A y that is not finite (or not positive, on a log axis) makes a gap.
        marks: name of a curve -> points drawn as dots in its color.
        heat: drawn to the right of the curves.
    """
    import matplotlib  # 0.3 s: not at import
    from matplotlib.figure import Figure

    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path}: charts are written as .svg or .png")
    figure = Figure(figsize=(7.6 if heat is None else 11.4, 4.4), layout="constrained")  # not pyplot: no global state
    axes, *right = figure.subplots(1, 1 if heat is None else 2, squeeze=False).flat
    if heat is not None:
        _draw_heat_map(figure, right[0], heat)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        points = _sorted_points(xs, ys)
        known = [y for _, y in points if math.isfinite(y)]
        style = {"color": COLORS[index % len(COLORS)], "markersize": 4}
        label = f"{name}  {known[-1]:.4g}" if known else name
        line = LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]
        axes.plot(*zip(*points), **style, linestyle=line, marker="o" if len(known) == 1 else None, label=label)
        if marks and name in marks:
            axes.plot(*marks[name], **style, linestyle="", marker="o")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if series:
        axes.legend(frameon=False, fontsize="medium" if len(series) <= 4 else "x-small")
    part = path.with_name(f"{path.name}.part")
    # Neither the date nor random ids: the same data give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "nanochat", "svg.fonttype": "none"}):
            figure.savefig(part, format=path.suffix[1:], dpi=160, metadata=metadata)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the chart: {reason(error)}") from None


def _draw_heat_map(figure: Any, axes: Any, heat: HeatMap) -> None:
    """Draw a grid, or where most cells would be empty, dots."""
    points = [(x, y, value) for x, y, value in heat.points if math.isfinite(value)]
    xs, ys = (sorted({point[axis] for point in heat.points}) for axis in (0, 1))
    if len(xs) * len(ys) <= 2 * len(heat.points):
        cells = [[[v for px, py, v in points if (px, py) == (x, y)] for x in xs] for y in ys]
        means = [[sum(values) / len(values) if values else math.nan for values in row] for row in cells]
        colors = axes.imshow(means, cmap="Blues_r", origin="lower", aspect="auto")
        axes.set_xticks(range(len(xs)), map(str, xs))
        axes.set_yticks(range(len(ys)), map(str, ys))
        for i, row in enumerate(means):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    ink = "black" if colors.norm(value) > 0.6 else "white"
                    axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=ink, fontsize="small")
    else:
        colors = axes.scatter(*zip(*[point[:2] for point in points]), c=[v for *_, v in points], cmap="Blues_r")
        for axis, values in ((axes.set_xscale, xs), (axes.set_yscale, ys)):
            axis("log" if isinstance(values[0], int | float) and values[0] > 0 else "linear")
    axes.set_xlabel(heat.x_label)
    axes.set_ylabel(heat.y_label)
    axes.set_title(heat.title, loc="left", fontweight="bold")
    figure.colorbar(colors, ax=axes)


def _sorted_points(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    return sorted(points, key=lambda point: point[0])


# The dots of a Braille character, U+2800 and on: one bit each, by column and row.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
UPPER_HALF = 0x01 | 0x02 | 0x08 | 0x10
ASCII = {0x2800 + dots: " '.:"[bool(dots & UPPER_HALF) + 2 * bool(dots & ~UPPER_HALF)] for dots in range(256)}
WIDTH, HEIGHT = 64, 12


def ascii_chart(steps: Sequence[float], values: Sequence[float], *, title: str, encoding: str | None = None) -> str:
    """Return a curve as text: HEIGHT lines of at most WIDTH columns, without the non-finite values.

    Args:
        encoding: of the output; None: that of sys.stdout. One without Braille characters gets plain ASCII.
    """
    points = [(x, y) for x, y in _sorted_points(steps, values) if math.isfinite(y)]
    if not points:
        return f"{title}: no data yet"
    (low_x, high_x), (low, high) = ((min(axis), max(axis)) for axis in zip(*points))
    labels = {0: f"{high:.4g}", (HEIGHT - 3) // 2: f"{(low + high) / 2:.4g}", HEIGHT - 4: f"{low:.4g}"}
    gutter = max(map(len, labels.values())) + 1
    columns, rows = WIDTH - gutter - 1, HEIGHT - 3
    dots = [
        (
            round((2 * columns - 1) * (x - low_x) / (high_x - low_x or 1)),
            round((4 * rows - 1) * (high - y) / (high - low or 1)),
        )
        for x, y in points
    ]
    cells = [[0] * columns for _ in range(rows)]
    for (x0, y0), (x1, y1) in zip(dots, [*dots[1:], dots[-1]]):
        pieces = max(abs(x1 - x0), abs(y1 - y0), 1)
        for piece in range(pieces + 1):
            x, y = x0 + (x1 - x0) * piece // pieces, y0 + (y1 - y0) * piece // pieces
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
    lines = [title[:WIDTH]]
    for i, row in enumerate(cells):
        curve = "".join(chr(0x2800 + cell) if cell else " " for cell in row)
        lines.append(f"{labels.get(i, ''):>{gutter}}|{curve}")
    lines.append(" " * gutter + "+" + "-" * columns)
    lines.append(" " * (gutter + 1) + f"{low_x:g}" + f"{high_x:g}".rjust(columns - len(f"{low_x:g}")))
    text = "\n".join(line.rstrip() for line in lines)
    try:
        text.encode(encoding or sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(ASCII)
    return text
