"""ARC-Easy: school exams in science, multiple choice; the questions that simple methods answer."""

from pathlib import Path

from nanochat.tasks import _arc
from nanochat.tasks.task import Task


def load(split: str = "train", *, source: str | Path | None = None) -> Task:
    """Return the task. Args: split: train, validation or test. source: files to read instead of the hub."""
    return _arc.load("arc_easy", "ARC-Easy", split, source)
