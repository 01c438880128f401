"""Show rows of a task as tokens, with the supervised ones marked.

    python launch.py --experiment=tasks                                         # list all tasks
    python launch.py --experiment=tasks --set task=spellingbee
    python launch.py --experiment=tasks --set task=gsm8k:test --set source=/my/files --set start=10 --set count=5
    python launch.py --experiment=tasks --set task=customjson:/my/conversations.jsonl --set tokens=true

Tokens that the loss counts are green on a terminal and in [[brackets]] elsewhere; special tokens are dim. Takes
seconds, except for the first download of a data set. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from experiments import chat
from nanochat import checkpoint, tasks
from nanochat.config import NonNegativeInt, PositiveInt, Settings, UserError
from nanochat.data import chat_format, tokenizer

if TYPE_CHECKING:
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to show.

    Attributes:
        task: name[:split][:source][:option=value]..., e.g. mmlu:auxiliary_train, arithmetic:digits=2, gsm8k:start=10;
            none: list all.
        split: train or test, or another split of the data set.
        source: a local file or folder to read in place of the hub.
        start: index of the first row.
        count: number of rows.
        max_tokens: truncate rows to so many tokens, as fine-tuning does; none: show all.
        tokens: separate tokens by a bar.
        run: name or folder of a run whose tokenizer is used.
        tokenizer: folder of the tokenizer if no run is given; none: the default one.
    """

    task: str | None = None
    split: str = "train"
    source: str | None = None
    start: NonNegativeInt = 0
    count: PositiveInt = 3
    max_tokens: PositiveInt | None = None
    tokens: bool = False
    run: str | None = None
    tokenizer: str | None = None


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    with chat.quiet_pipe():
        if config.task is None:
            for name in tasks.names():
                options = ", ".join(tasks.options_of(name))
                print(f"  {name:<16}{tasks.about(name)}{f' ({options})' if options else ''}")
        else:
            show_rows(config, config.task)


def show_rows(config: Config, task_text: str) -> None:
    if config.run is None:
        tok = tokenizer.load(config.tokenizer or tokenizer.default_dir())
    else:
        tok = checkpoint.load_tokenizer(checkpoint.inspect(config.run))
    task = tasks.from_text(task_text, config.split, source=config.source)
    if config.start >= task.size:
        raise UserError(f"start={config.start}: {task.name} has {task.size} rows")
    print(f"{task.name}: {task.size:,} rows, {task.kind}")
    for index in range(config.start, min(task.size, config.start + config.count)):
        row = task.row(index)
        ids, mask = chat_format.render(tok, row, config.max_tokens)
        print(f"\n--- row {index}: {len(ids)} tokens, {sum(mask)} supervised")
        for key in [key for key in row if key != "messages"]:
            print(f"{key}: {row[key]!r}")
        separator = "|" if config.tokens else ""
        print(separator.join(mark(*piece, sys.stdout) for piece in pieces(tok, ids, mask, separator)))


def pieces(tok: Tokenizer, ids: Sequence[int], mask: Sequence[int], separator: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of each span of tokens; the kind is supervised, special or text."""

    def kind(token_and_mask: tuple[int, int]) -> str:
        token, supervised = token_and_mask
        return "supervised" if supervised else "special" if token >= len(tok.tokens) else "text"

    for name, pairs in itertools.groupby(zip(ids, mask), kind):
        span = [token for token, _ in pairs]
        yield name, separator.join(tok.decode([token]) for token in span) if separator else tok.decode(span)


def mark(kind: str, text: str, stream: TextIO) -> str:
    """Return the text of a piece with what shows its kind, without control characters of its own on a terminal."""
    marks = {"supervised": (GREEN, RESET), "special": (DIM, RESET)}
    if not chat.has_colors(stream):
        marks = {"supervised": ("[[", "]]")}
    before, after = marks.get(kind, ("", ""))
    return f"{before}{chat.printable(text, stream)}{after}"
