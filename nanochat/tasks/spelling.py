"""SimpleSpelling and SpellingBee: a model reads tokens and sees no letters, so it has to learn how words are spelled.

Spell the word: apple  ->  apple:a,p,p,l,e
How many r are in strawberry?  ->  strawberry:s,t,r, … Counting r: s 0, t 0, r 1, … Check: (a tool call) #### 3
"""

import random
import string
from pathlib import Path

from nanochat import jsonl
from nanochat.config import UserError
from nanochat.data import Conversation
from nanochat.tasks.task import Task, data_file, generated, match_final_number, plain_text, qa_conversation

QUOTES = ("{}", "{}", "'{}'", '"{}"')


def simplespelling(split: str = "train", *, source: str | Path | None = None, size: int | None = None) -> Task:
    """SimpleSpelling: words spelled letter by letter, the easy half of SpellingBee; generated, no download.

    Args:
        split: train or test; a word may occur in both. source: as for `load_words`.
        size: number of rows; None: 200,000 of train, 256 of test.
    """
    words = load_words(source)

    def make_row(rng: random.Random) -> Conversation:
        word = rng.choice(words)
        return qa_conversation(f"Spell the word: {word}", _spelled(word))

    def is_correct(row: Conversation, answer: str) -> bool:
        return answer.strip() == plain_text(row["messages"][-1]["content"])

    return generated("simplespelling", split, size, train_rows=200_000, make_row=make_row, is_correct=is_correct)


def spellingbee(split: str = "train", *, source: str | Path | None = None, size: int | None = None) -> Task:
    """SpellingBee: how often a letter occurs in a word, asked in many ways and seven languages; no download.

    Args:
        split: train or test; a word may occur in both. source: as for `load_words`.
        size: number of rows; None: 80,000 of train, 256 of test.
    """
    words = load_words(source)
    lines = data_file("spelling_questions.txt", None).read_text("utf-8").splitlines()
    questions = [line for line in lines if not line.startswith("# ")]

    def make_row(rng: random.Random) -> Conversation:
        word = rng.choice(words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        question = rng.choice(questions)
        # Sometimes without capitals, a question mark or quotes, as people write.
        if rng.random() < 0.2:
            question = question.lower()
        if rng.random() < 0.3:
            question = question.rstrip("?. ")
        question = question.format(letter=rng.choice(QUOTES).format(letter), word=rng.choice(QUOTES).format(word))
        return qa_conversation(question, counting_answer(word, letter))

    return generated("spellingbee", split, size, train_rows=80_000, make_row=make_row, is_correct=match_final_number)


def counting_answer(word: str, letter: str) -> list[dict[str, str]]:
    """Return the answer as message parts: the word spelled, a running count, and a tool call to check it."""
    counts = [f"{char} {word[: index + 1].count(letter)}\n" for index, char in enumerate(word)]
    total = word.count(letter)
    return [
        {"type": "text", "text": f"{_spelled(word)}\n\nCounting {letter}:\n{''.join(counts)}Check: "},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": f"{total}"},
        {"type": "text", "text": f"\n\n#### {total}"},
    ]


def _spelled(word: str) -> str:
    return f"{word}:{','.join(word)}"


def load_words(source: str | Path | None) -> tuple[str, ...]:
    """Return the words to spell: of a text file with one word a line, of words.txt in a folder, or the shipped list."""
    path = data_file("words.txt", source)
    lines = [line.strip() for line in jsonl.read_text(path, f"source={path}").splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not line.isalpha():
            raise UserError(f"source={path} line {number}: expected one word of letters, got {line[:40]!r}")
    words = tuple(line for line in lines if line)
    if not words:
        raise UserError(f"source={path}: contains no words")
    return words
