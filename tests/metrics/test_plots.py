"""Charts: the SVG is well-formed and draws what it is given; ticks; gaps; decimation; PNG; the terminal's curve."""

import itertools
import math
import re
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.metrics import plots

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")


def chart(folder: Path, series: plots.Series, title: str = "Loss", **options: Any) -> ET.Element:
    """Draw a chart and return its SVG, parsed."""
    plots.line_chart(folder / "chart.svg", series, title=title, x_label="step", y_label="loss", **options)
    return ET.parse(folder / "chart.svg").getroot()


def lines(root: ET.Element) -> list[list[tuple[float, float]]]:
    """Return the pixels of every curve's strokes, the legend's samples left out."""
    paths = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "line"]
    drawn = [d[1:].split() for d in paths if "h20" not in d]
    return [[(float(d[i]), float(d[i + 1])) for i in range(0, len(d), 2)] for d in drawn]


def dots(root: ET.Element) -> list[tuple[float, float]]:
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter(f"{SVG}circle")]


def texts(root: ET.Element) -> list[str]:
    return ["".join(t.itertext()) for t in root.iter(f"{SVG}text")]


def test_a_falling_curve_falls_on_the_picture(tmp_path: Path) -> None:
    root = chart(tmp_path, {"train": ([0, 10, 20], [3.0, 2.0, 1.0]), "val": ([10, 20], [2.5, 1.5])})
    train, val = lines(root)
    assert [x for x, _ in train] == sorted(x for x, _ in train)
    assert [y for _, y in train] == sorted(y for _, y in train)  # pixels grow downwards
    assert train[1][0] == val[0][0] and train[2][0] == val[1][0]
    assert train[2][1] > val[1][1] > train[1][1]  # 1.0 lies below 1.5, and that below 2.0
    assert train[1][0] == pytest.approx((train[0][0] + train[2][0]) / 2, abs=0.11)
    assert dots(root) == [train[-1], val[-1]]
    colours = [p.get("stroke") for p in root.iter(f"{SVG}path") if p.get("class") == "line"]
    assert len(set(colours)) == 2


def test_texts_and_legend(tmp_path: Path) -> None:
    root = chart(tmp_path, {"a < b & c": ([1, 2], [1.0, 0.12346])}, title='"Loss" <of> d4 & co')
    assert {'"Loss" <of> d4 & co', "step", "loss", "a < b & c0.1235"} <= set(texts(root))
    assert root.get("aria-label") == '"Loss" <of> d4 & co'
    style = next(root.iter(f"{SVG}style")).text or ""
    assert "prefers-color-scheme: dark" in style
    raw = (tmp_path / "chart.svg").read_text().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in raw and "href" not in raw  # self-contained


def test_everything_lies_inside_the_picture(tmp_path: Path) -> None:
    series = {f"series with a long name, number {i}": ([0, 1e6], [i * 1e5, -i]) for i in range(20)}
    root = chart(tmp_path, series)
    for x, y in [point for line in lines(root) for point in line] + dots(root):
        assert 0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT
    for text in root.iter(f"{SVG}text"):
        if text.get("x"):
            assert 0 < float(text.get("x", "")) < plots.WIDTH and 0 < float(text.get("y", "")) < plots.HEIGHT
    strokes = {(p.get("stroke"), p.get("stroke-dasharray")) for p in root.iter(f"{SVG}path") if p.get("stroke")}
    assert len(strokes) == 20  # told apart by dashes where colours run out


@pytest.mark.parametrize("missing", [NAN, float("inf"), -float("inf")])
def test_missing_values_are_gaps(tmp_path: Path, missing: float) -> None:
    root = chart(tmp_path, {"a": ([1, 2, 3, 4, 5, 6, 7], [5, 4, missing, 3, missing, 2, 1])})
    assert [len(line) for line in lines(root)] == [2, 2]
    assert len(dots(root)) == 2  # the lone point between two gaps, and the end


@pytest.mark.parametrize(
    ("xs", "ys"),
    [([5], [3.2]), ([1, 2, 3], [0.003] * 3), ([0, 0], [0, 0]), ([1, 2], [1e-300, 2e-300]), ([1, 2], [-1e20, 1e20])],
)
def test_one_point_and_constants_and_extremes_are_drawn(tmp_path: Path, xs: list[float], ys: list[float]) -> None:
    root = chart(tmp_path, {"a": (xs, ys)})
    drawn = [point for line in lines(root) for point in line] + dots(root)
    assert drawn and all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in drawn)


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1, 2], [NAN, NAN])}])
def test_nothing_to_draw_says_so(tmp_path: Path, series: plots.Series) -> None:
    assert "no data yet" in texts(chart(tmp_path, series))


def test_log_axes_are_even_in_ratios_and_skip_what_has_no_logarithm(tmp_path: Path) -> None:
    root = chart(tmp_path, {"a": ([0, 1, 10, 100], [1, 1000, 100, 10])}, log_x=True, log_y=True)
    ((x0, y0), (x1, y1), (x2, y2)) = lines(root)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert {"1", "10", "100", "1k"} <= set(texts(root))


def test_many_points_are_thinned_but_never_a_spike(tmp_path: Path) -> None:
    steps = list(range(100_000))
    values = [2 + math.sin(step / 7000) for step in steps]
    values[77_777], values[33_333] = 9.0, -5.0
    started = time.process_time()
    root = chart(tmp_path, {"a": (steps, values)})
    assert time.process_time() - started < 5
    (line,) = lines(root)
    assert len(line) <= 4 * plots.WIDTH and (tmp_path / "chart.svg").stat().st_size < 100_000
    left, right = line[0][0], line[-1][0]
    for step, value_at in ((77_777, min), (33_333, max)):
        x, _ = value_at(line, key=lambda point: point[1])
        assert x == pytest.approx(left + (right - left) * step / 99_999, abs=0.2)


def test_points_are_drawn_by_rising_x(tmp_path: Path) -> None:
    straight = chart(tmp_path, {"a": ([1, 2, 3], [5, 1, 4])})
    mixed = chart(tmp_path, {"a": ([3, 1, 2], [4, 5, 1])})
    assert lines(straight) == lines(mixed)


def test_steps_have_whole_ticks(tmp_path: Path) -> None:
    labels = texts(chart(tmp_path, {"a": ([1, 2, 3], [0.5, 0.6, 0.7])}))
    assert {"1", "2", "3"} <= set(labels) and "1.5" not in labels and "1.0" not in labels


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 12))
def test_ticks_are_round_evenly_spaced_and_inside(low: float, span: float, count: int) -> None:
    high = low + span
    if high - low <= 1e-9 * abs(low):
        return  # beyond what floats tell apart
    found = plots.ticks(low, high, count)
    assert 1 <= len(found) <= count + 1
    room = 1e-6 * (high - low)
    assert all(low - room <= value <= high + room for value in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-5) for gap in gaps)
    for gap in gaps[:1]:
        mantissa = gap / 10.0 ** math.floor(math.log10(gap) + 1e-6)
        assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-4


@given(st.floats(-12, 12), st.floats(0.01, 12))
def test_log_ticks_lie_inside_and_rise(low: float, decades: float) -> None:
    found = plots.log_ticks(low, low + decades)
    assert 1 <= len(found) <= 20 and found == sorted(set(found))
    assert all(low - 1e-6 <= math.log10(value) <= low + decades + 1e-6 for value in found)


def test_labels_of_large_numbers_are_short(tmp_path: Path) -> None:
    assert {"0", "20k", "100k"} <= set(texts(chart(tmp_path, {"a": ([0, 100_000], [1, 2])})))
    assert {"1M", "2M"} <= set(texts(chart(tmp_path, {"a": ([0, 2_000_000], [1, 2])})))


def test_flops_are_written_with_an_exponent(tmp_path: Path) -> None:
    root = chart(tmp_path, {"a": ([1e18, 1e19, 1e20], [1.0, 2.0, 3.0])}, log_x=True)
    assert {"1e18", "1e19", "1e20"} <= set(texts(root))


@pytest.mark.parametrize("last", [3, 10, 22, 30, 99])
def test_no_tick_lies_between_two_steps(last: int) -> None:
    assert all(tick.is_integer() for tick in plots.ticks(1, last, 8, whole=True))


def test_marks_are_dots_in_the_colour_of_their_curve(tmp_path: Path) -> None:
    curves = {"fit": ([1, 2, 3], [2.0, 1.0, 2.0]), "other": ([1, 3], [1.0, 1.0])}
    path = tmp_path / "chart.svg"
    marks = {"fit": ([1.5, 2.5, 3.5], [1.4, 1.6, NAN])}
    plots.line_chart(path, curves, title="t", x_label="x", y_label="y", marks=marks)
    root = ET.parse(path).getroot()
    circles = [(c.get("fill"), c.get("cx")) for c in root.iter(f"{SVG}circle")]
    assert [fill for fill, _ in circles] == [plots.COLOURS[0]] * 2 + [plots.COLOURS[1]]  # the last is the curve's end
    plots.line_chart(path, {"fit": ([], [])}, title="t", x_label="x", y_label="y", marks={"fit": ([0, 9], [1, 3])})
    assert len(dots(ET.parse(path).getroot())) == 2 and "no data yet" not in path.read_text()
    with pytest.raises(ValueError, match="no curve"):
        plots.line_chart(path, curves, title="t", x_label="x", y_label="y", marks={"strange": ([1], [1])})


def test_x_and_y_of_different_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val: 2 x values and 1 y values"):
        chart(tmp_path, {"val": ([1, 2], [1])})
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_no_half_picture_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "run" / "loss.svg"
    plots.line_chart(target, {"a": ([1, 2], [2, 1])}, title="t", x_label="x", y_label="y")
    assert [path.name for path in target.parent.iterdir()] == ["loss.svg"]


def test_what_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"loss\.svg: cannot write the picture: "):
        plots.line_chart(tmp_path / "file" / "loss.svg", {}, title="t", x_label="x", y_label="y")
    with pytest.raises(UserError, match=r"loss\.pdf: pictures are written as \.svg or \.png"):
        plots.line_chart(tmp_path / "loss.pdf", {}, title="t", x_label="x", y_label="y")


def test_png_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'loss\.png: needs matplotlib: pip install -e "\.\[plots\]", or write \.svg'):
        plots.line_chart(tmp_path / "loss.png", {"a": ([1], [1])}, title="t", x_label="x", y_label="y")
    assert not list(tmp_path.iterdir())


def test_png_with_matplotlib(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    series = {"a": ([1, 2, 3, 4], [3, NAN, 2, 1]), "b": ([1], [2]), "empty": ([], [])}
    plots.line_chart(tmp_path / "loss.png", series, title="t $x_1$", x_label="x", y_label="y", log_y=True)
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    blue = tuple(int(plots.COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5))
    near = (abs(pixels[:, :, :3] - blue).sum(axis=2) < 0.05).sum()
    assert near > 500  # the first curve is there, in its colour


def test_the_terminal_curve_falls() -> None:
    text = plots.ascii_chart([0, 50, 100], [4.0, 3.0, 2.0], title="bits per byte", encoding="utf-8")
    rows = text.splitlines()
    assert len(rows) == 12 and max(map(len, rows)) <= 64
    assert rows[0] == "bits per byte"
    assert re.match(r" +4\|", rows[1]) and re.match(r" +2\|", rows[9]) and re.match(r" +3\|", rows[5])
    assert rows[11].split() == ["0", "100"]
    ends = [[i for i, c in enumerate(row) if ord(c) > 0x2800] for row in rows[1:10]]
    assert all(ends) and [row[0] for row in ends] == sorted(row[0] for row in ends)
    assert ends[0][0] == rows[1].index("|") + 1 and ends[-1][-1] == 63


def test_the_terminal_curve_in_plain_ascii() -> None:
    text = plots.ascii_chart([1, 2, 3, 4, 5], [3, 1, NAN, 1, 3], encoding="ascii")
    assert text.isascii() and len(text.splitlines()) == 11
    body = [row.partition("|")[2] for row in text.splitlines()[:9]]
    assert any(set(row) & set("'.:") for row in body)
    columns = max(map(len, body))
    middle = {row[columns // 2 : columns // 2 + 1].strip() for row in body}
    assert middle == {""}  # the gap


@pytest.mark.parametrize(("encoding", "ascii_only"), [("latin-1", True), ("no-such", True), ("utf-8", False)])
def test_the_terminal_decides_on_the_characters(
    monkeypatch: pytest.MonkeyPatch, encoding: str, ascii_only: bool
) -> None:
    class Terminal:
        pass

    terminal = Terminal()
    terminal.encoding = encoding  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", terminal)
    assert plots.ascii_chart([1, 2], [2, 1]).isascii() is ascii_only


def test_the_terminal_curve_of_one_point_and_of_none() -> None:
    text = plots.ascii_chart([5], [0.25], encoding="utf-8")
    assert sum(ord(c) > 0x2800 for c in text) == 1 and text.count("0.25|") == 1
    assert plots.ascii_chart([], [], title="loss") == "loss: no data yet"
    assert plots.ascii_chart([1], [NAN]) == "no data yet"


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_the_terminal_curve_always_fits(points: list[tuple[float, float]]) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    rows = plots.ascii_chart(xs, ys, title="t" * 99, encoding="utf-8").splitlines()
    assert len(rows) == 12 and max(map(len, rows)) <= 64
