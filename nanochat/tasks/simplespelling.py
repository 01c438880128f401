"""SimpleSpelling: words spelled letter by letter, the easy half of SpellingBee.

Spell the word: apple  ->  apple:a,p,p,l,e
"""

import random
from pathlib import Path

from nanochat.data import Conversation
from nanochat.tasks import _generated
from nanochat.tasks.task import Task, plain_text, qa_conversation


def load(split: str = "train", *, source: str | Path | None = None, size: int | None = None) -> Task:
    """Return the task.

    Args:
        split: train or test; a word may occur in both.
        source: a text file of one word a line, or a folder with words.txt; None: the list that ships with the package.
        size: number of rows; None: 200,000 to train, 256 to test.

    Raises:
        UserError: there is no such split, the size makes no sense, or the words cannot be read.
    """
    seed = _generated.first_seed("simplespelling", split)
    rows = _generated.rows("simplespelling", split, size, train=200_000)
    words = _generated.words(source)

    def row(index: int) -> Conversation:
        word = random.Random(seed + rows[index]).choice(words)
        return qa_conversation(f"Spell the word: {word}", spelled(word))

    return Task("simplespelling", "generative", len(rows), row, right)


def spelled(word: str) -> str:
    """Return `word:w,o,r,d`."""
    return f"{word}:{','.join(word)}"


def right(row: Conversation, answer: str) -> bool:
    """Tell whether the answer is the spelling and nothing else."""
    return answer.strip() == plain_text(row["messages"][-1]["content"])
