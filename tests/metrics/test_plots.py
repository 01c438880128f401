"""Charts: files that open and do not change without a reason, gaps, the terminal's curve."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from nanochat.config import UserError
from nanochat.metrics import plots

NAN = float("nan")


def draw(path: Path, series: plots.Series, **options: Any) -> bytes:
    plots.line_chart(path, series, title="Loss <of> d4", x_label="step", y_label="nats", **options)
    return path.read_bytes()


def test_svg_is_well_formed_self_contained_and_deterministic(tmp_path: Path) -> None:
    series = {"a < b": ([1, 2, 3], [3.0, 2.0, 0.12346]), "one": ([2], [1.0]), "empty": ([], [])}
    svg = draw(tmp_path / "new" / "a.svg", series)
    texts = ["".join(text.itertext()) for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss <of> d4", "step", "nats", "a < b  0.1235"} <= set(texts)
    assert b"<script" not in svg and svg == draw(tmp_path / "b.svg", series)
    assert draw(tmp_path / "a.png", series).startswith(b"\x89PNG")


@pytest.mark.parametrize("log_y", [False, True])
def test_missing_values_make_gaps(tmp_path: Path, log_y: bool) -> None:
    missing = draw(tmp_path / "a.svg", {"a": ([1, 2, 3, 4, 5], [1, 2, NAN, 4, 5])}, log_y=log_y)
    assert missing != draw(tmp_path / "b.svg", {"a": ([1, 2, 4, 5], [1, 2, 4, 5])}, log_y=log_y)


def test_unwritable_charts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.svg or \.png"):
        draw(tmp_path / "a.gif", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the chart"):
        draw(tmp_path / "file" / "a.svg", {})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_curve_falls_and_keeps_its_size(encoding: str) -> None:
    xs = list(range(0, 101, 10))
    ys = [math.nan if x == 50 else 10 - x / 10 for x in xs]
    lines = plots.ascii_chart(xs, ys, title="loss", encoding=encoding).splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 64
    assert lines[0] == "loss" and lines[1].lstrip().startswith("10|") and lines[9].lstrip().startswith("0|")
    assert lines[-1].split() == ["0", "100"]
    starts = [len(line.partition("|")[2]) - len(line.partition("|")[2].lstrip()) for line in lines[1:10]]
    assert starts == sorted(starts) and all(line.isascii() for line in lines) == (encoding == "ascii")


def test_terminal_curve_of_no_and_of_one_point() -> None:
    assert plots.ascii_chart([], [], title="bpb") == "bpb: no data yet"
    assert len(plots.ascii_chart([5], [2.0], title="bpb").splitlines()) == 12
