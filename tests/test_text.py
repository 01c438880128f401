"""Numbers and errors for people."""

import pytest

from nanochat.text import format_count, format_duration, reason


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999.6, "1k"),
        (1_234_567, "1.23M"),
        (999_999, "1M"),
        (-45_600, "-45.6k"),
        (float("nan"), "nan"),
        (4.33e19, "4.33e+07T"),
    ],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0123, "12ms"),
        (0.25, "0.25s"),
        (59.6, "1m00s"),
        (3599.9, "1h00m"),
        (86399, "1d00h"),
        (190_800, "2d05h"),
        (-192, "-3m12s"),
        (float("inf"), "?"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory"),
        (ValueError("bad magic.\nmore"), "bad magic"),
        (OSError("no errno here"), "no errno here"),
        (KeyError(), "KeyError"),
    ],
)
def test_reason(error: Exception, text: str) -> None:
    assert reason(error) == text
