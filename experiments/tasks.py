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
from typing import TYPE_CHECKING

from experiments import chat
from nanochat import checkpoint, tasks
from nanochat.config import UserError, require_at_least
from nanochat.data import chat_format, tokenizer

if TYPE_CHECKING:
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to show.

    Attributes:
        task: name[:split][:source][:option=value]..., e.g. mmlu:auxiliary_train, arithmetic:digits=2; none: list all.
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
    start: int = 0
    count: int = 3
    max_tokens: int | None = None
    tokens: bool = False
    run: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, start=0, count=1, max_tokens=1)


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    if config.task is None:
        print("\n".join(list_tasks()))
        return
    tok = load_tokenizer(config)
    task = tasks.from_text(config.task, config.split, source=config.source)
    if config.start >= task.size:
        raise UserError(f"start={config.start}: {task.name} has {task.size} rows")
    color = chat.has_colors(sys.stdout)
    with chat.quiet_pipe():
        print(f"{task.name}: {task.size:,} rows, {task.kind}")
        for index in range(config.start, min(task.size, config.start + config.count)):
            row = task.row(index)
            ids, mask = chat_format.render(tok, row, config.max_tokens)
            print(f"\n--- row {index}: {len(ids)} tokens, {sum(mask)} supervised")
            for key in [key for key in row if key != "messages"]:
                print(f"{key}: {row[key]!r}")
            print(format_tokens(tok, ids, mask, "|" if config.tokens else "", color))


def list_tasks() -> Iterator[str]:
    """Yield a line for each task: its name, description and options."""
    for name in tasks.names():
        options = ", ".join(tasks.options_of(name))
        yield f"  {name:<16}{tasks.about(name)}{f' ({options})' if options else ''}"


def load_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer that the settings name."""
    if config.run is None:
        return tokenizer.load(config.tokenizer or tokenizer.default_dir())
    return checkpoint.load_tokenizer(checkpoint.inspect(config.run))


def format_tokens(tok: Tokenizer, ids: Sequence[int], mask: Sequence[int], separator: str, color: bool) -> str:
    """Return tokens as text with the supervised ones marked: by color, then without control characters, or [[…]]."""
    marks = {"supervised": (GREEN, RESET), "special": (DIM, RESET)} if color else {"supervised": ("[[", "]]")}
    first_special = tok.special(tok.specials[0])

    def kind(pair: tuple[int, int]) -> str:
        return "supervised" if pair[1] else "special" if pair[0] >= first_special else "text"

    spans = []
    for name, pairs in itertools.groupby(zip(ids, mask), kind):
        span = [token for token, _ in pairs]
        text = separator.join(tok.decode([token]) for token in span) if separator else tok.decode(span)
        before, after = marks.get(name, ("", ""))
        spans.append(before + (text.translate(chat.CONTROL) if color else text) + after)
    return separator.join(spans)
