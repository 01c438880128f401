"""Run launch.py and record the rows that its training steps are given."""

import contextlib
from collections.abc import Iterator

import launch
from nanochat.train import step

Rows = list[list[int]]  # token ids


@contextlib.contextmanager
def recorded() -> Iterator[list[Rows]]:
    """Yield a list to which each training step within appends its rows of inputs."""
    rows: list[Rows] = []
    split_batch = step.split_batch

    def record(batch: step.Batch, micro_rows: int) -> list[step.Batch]:
        rows.append(batch["inputs"].tolist())
        return split_batch(batch, micro_rows)

    step.split_batch = record
    try:
        yield rows
    finally:
        step.split_batch = split_batch


def launch_recorded(*words: str) -> list[Rows]:
    """Run launch.py; return this rank's rows of inputs of each training step."""
    with recorded() as rows:
        assert launch.main(["launch.py", *words]) == 0
    return rows
