"""Identity: conversations about who the assistant is, what it can do and what it cannot; a small set ships with us.

`--experiment=synthesize` makes more, with the help of a large model: pass the file as `source`.
"""

from pathlib import Path

from nanochat.config import UserError
from nanochat.tasks import _generated, customjson, hub_table
from nanochat.tasks.task import Task

TEST_SHARE = 10
"""One conversation of so many tests."""


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task.

    Args:
        split: train, test (every tenth line), or all.
        source: a jsonl file as for customjson; None, and a folder without identity.jsonl: what ships with the package.

    Raises:
        UserError: there is no such split, or the file is not of the right form.
    """
    path = _generated.DATA / "identity.jsonl" if source is None else Path(source).expanduser()
    if path.is_dir():
        path = path / "identity.jsonl" if (path / "identity.jsonl").exists() else _generated.DATA / "identity.jsonl"
    if split not in ("train", "test", "all"):
        raise UserError(f"task identity has no split {split}; it has train, test and all")
    found = [
        row
        for number, row in enumerate(customjson.read(path), start=1)
        if split == "all" or (number % TEST_SHARE == 0) == (split == "test")
    ]
    if not found:
        raise UserError(f"source={path}: has too few conversations for a split test: {TEST_SHARE} are needed")
    order = hub_table.order(len(found))
    return Task("identity", "chat", len(found), lambda index: found[order[index]])
