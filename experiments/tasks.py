"""Look at the rows of a task as a model gets them: the tokens, and which of them are learned.

    python launch.py --experiment=tasks --set task=spellingbee
    python launch.py --experiment=tasks --set task=gsm8k:test --set source=/my/files --set start=10 --set count=5
    python launch.py --experiment=tasks --set task=customjson:/my/conversations.jsonl --set tokens=true
    python launch.py --experiment=tasks                                         # the list of all tasks

What the loss counts is green on a terminal and in [[brackets]] elsewhere; special tokens are dim. With tokens=true a
bar stands between tokens. A row needs a tokenizer: that of a run, of a folder, or the default one. Takes seconds, but
for the first time that a data set is downloaded. Writes nothing.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

from experiments import chat
from nanochat import checkpoint, tasks
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, tokenizer
from nanochat.distributed import Runtime
from nanochat.tasks import Task

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to look at.

    Attributes:
        task: name[:split][:source][:option=value]…, as in mmlu:auxiliary_train or arithmetic:digits=2; none: list them.
        split: train or test, or as the task's data set calls it. source: a file or folder instead of the hub.
        start: the first row. count: how many.
        max_tokens: of a row, as a fine-tuning cuts it; none: all. tokens: show where a token ends.
        run: whose tokenizer to use, a name or a folder. tokenizer: its folder, if no run is given; none: the default.
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
        chat.check_settings(self, start=0, count=1, **({} if self.max_tokens is None else {"max_tokens": 1}))


def config() -> Config:
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    if not runtime.is_main:
        return
    if config.task is None:
        print("\n".join(listed()))
        return
    tok = load_tokenizer(config)
    task = tasks.from_text(config.task, config.split, source=config.source)
    if config.start >= task.size:
        raise UserError(f"start={config.start}: {task.name} has {task.size} rows")
    colour = bool(chat.colours(sys.stdout))
    with chat.quiet_pipe():
        print(f"{task.name}: {task.size:,} rows, {task.kind}")
        for index in range(config.start, min(task.size, config.start + config.count)):
            print("\n".join(["", *shown(tok, task, index, config, colour)]))


def listed() -> Iterator[str]:
    """Yield a line for each task: its name, what it is, and its options."""
    for name in tasks.names():
        options = ", ".join(tasks.options_of(name))
        yield f"  {name:<16}{tasks.about(name)}{f' ({options})' if options else ''}"


def load_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer that the settings name. Raises: UserError."""
    if config.run is None:
        return tokenizer.load(config.tokenizer or tokenizer.default_dir())
    checkpoints = checkpoint.find_run(config.run) / "checkpoints"
    return tokenizer.load(checkpoints / str(checkpoint.latest_step(checkpoints)) / "files")


def shown(tok: Tokenizer, task: Task, index: int, config: Config, colour: bool) -> list[str]:
    """Return the lines that show a row: how long it is, what else it has, and its text with what is learned."""
    row = task.row(index)
    ids, mask = chat_format.render(tok, row, config.max_tokens)
    others = [f"{key}: {value!r}" for key, value in row.items() if key != "messages"]
    text = painted(tok, ids, mask, "|" if config.tokens else "", colour)
    return [f"--- row {index}: {len(ids)} tokens, {sum(mask)} learned", *others, text]


def painted(tok: Tokenizer, ids: Sequence[int], mask: Sequence[int], bar: str, colour: bool) -> str:
    """Return tokens as text, the learned ones marked.

    Args:
        ids, mask: as `conversation.render` returns them. bar: what stands between tokens.
        colour: mark by colour, not by brackets; control characters are replaced then.
    """
    marks = {"learned": (GREEN, PLAIN), "special": (DIM, PLAIN)} if colour else {"learned": ("[[", "]]")}
    first = tok.special(tok.specials[0])

    def kind(pair: tuple[int, int]) -> str:
        return "learned" if pair[1] else "special" if pair[0] >= first else "text"

    pieces = []
    for name, pairs in itertools.groupby(zip(ids, mask), kind):
        run = [token for token, _ in pairs]
        text = bar.join(tok.decode([token]) for token in run) if bar else tok.decode(run)
        before, after = marks.get(name, ("", ""))
        pieces.append(before + (text.translate(chat.CONTROL) if colour else text) + after)
    return bar.join(pieces)
