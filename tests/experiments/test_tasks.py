"""The viewer of tasks: supervised tokens, token borders, colors, the list of tasks."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from task_rows import ROWS, TOKENIZER

from experiments import tasks as viewer
from nanochat import distributed, tasks
from nanochat.config import UserError
from nanochat.data import chat_format, tokenizer


@pytest.fixture
def folder(base: Path) -> str:
    """Return the folder of a tokenizer."""
    tokenizer.save(TOKENIZER, base / "tok")
    return str(base / "tok")


def show(**settings: Any) -> None:
    viewer.run(viewer.Config(**settings), distributed.init("cpu"))


def test_supervised_tokens_are_marked(folder: str, capsys: pytest.CaptureFixture[str]):
    show(task="arithmetic:train", start=1, count=1, tokenizer=folder)
    assert capsys.readouterr().out.splitlines() == [
        "arithmetic: 20,000 rows, generative",
        "",
        "--- row 1: 73 tokens, 36 supervised",
        "<|bos|><|user_start|>Compute the sum of 361 and 1<|user_end|><|assistant_start|>[[Let me calculate: "
        "<|python_start|>361+1<|python_end|>]]<|output_start|>362<|output_end|>[[",
        "",
        "#### 362<|assistant_end|>]]",
    ]


def test_tokens_letters_and_truncation(folder: str, capsys: pytest.CaptureFixture[str]):
    show(task="arc_easy", split="test", source=str(ROWS), count=1, tokens=True, max_tokens=5, tokenizer=folder)
    assert capsys.readouterr().out.splitlines() == [
        "arc_easy: 4 rows, multiple_choice",
        "",
        "--- row 0: 5 tokens, 0 supervised",
        "letters: ['A', 'B', 'C', 'D']",
        "<|bos|>|<|user_start|>|M|u|l",
    ]


def test_colors_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    row = tasks.qa_conversation("é\x1b[5m", "b")
    pieces = viewer.pieces(TOKENIZER, *chat_format.render(TOKENIZER, row), "")
    terminal = mock.Mock(isatty=lambda: True)
    assert "".join(viewer.mark(*piece, terminal) for piece in pieces) == (
        "\x1b[2m<|bos|><|user_start|>\x1b[0mé\ufffd[5m\x1b[2m<|user_end|><|assistant_start|>\x1b[0m"
        "\x1b[32mb<|assistant_end|>\x1b[0m"
    )


def test_list_of_tasks_and_wrong_settings(folder: str, capsys: pytest.CaptureFixture[str]):
    show()
    out = capsys.readouterr().out
    assert [
        line.split()[0] for line in out.splitlines()
    ] == tasks.names() and "(size, digits, product_digits, start, stop)" in out
    with pytest.raises(UserError, match="start=300: arithmetic has 256 rows"):
        show(task="arithmetic:test", start=300, tokenizer=folder)
    with pytest.raises(UserError, match="train a tokenizer"):
        show(task="arithmetic")
