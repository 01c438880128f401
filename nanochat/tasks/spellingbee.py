"""SpellingBee: how often a letter occurs in a word, asked in many ways and seven languages.

    How many r are in strawberry?  ->  strawberry:s,t,r,a,w,b,e,r,r,y

                                       Counting r:
                                       s 0
                                       t 0
                                       r 1
                                       …
                                       Check: <python>'strawberry'.count('r')</python><output>3</output>

                                       #### 3

A model reads tokens and sees no letters. So the answer takes the word apart first, then counts with one letter and the
number so far a line, and lets the python tool have the last word.
"""

import random
import string
from pathlib import Path

from nanochat.data import Conversation
from nanochat.tasks import _generated
from nanochat.tasks.simplespelling import spelled
from nanochat.tasks.task import Task, match_final_number, qa_conversation

PHRASINGS = (
    # English
    "How many {letter} are in {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter}s are in {word}?",
    "How many {letter}s does {word} have?",
    "How many times does {letter} occur in {word}?",
    "How many times do you find {letter} in {word}?",
    "How often does {letter} appear in {word}?",
    "How often is {letter} used to write {word}?",
    "How often do I write {letter} when I spell {word}?",
    "Count the {letter}s in {word}.",
    "Count how often {letter} is in {word}.",
    "Can you count the letter {letter} in the word {word}?",
    "Tell me the number of {letter}s in {word}.",
    "What is the number of {letter} in {word}?",
    "In the word {word}, how many letters are {letter}?",
    "The word {word} has how many {letter}?",
    "Look at {word}: how many {letter} do you see?",
    "Number of {letter} in {word}",
    "{word}: how many {letter}?",
    "Please count: {letter} in {word}",
    # Spanish
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece {letter} en {word}?",
    "¿Cuántas letras {letter} tiene la palabra {word}?",
    "Cuenta las {letter} de {word}.",
    # French
    "Combien de {letter} y a-t-il dans {word} ?",
    "Combien de fois trouve-t-on {letter} dans {word} ?",
    "Combien de lettres {letter} compte le mot {word} ?",
    "Compte les {letter} dans {word}.",
    # German
    "Wie viele {letter} sind in {word}?",
    "Wie oft kommt {letter} in {word} vor?",
    "Wie oft steht {letter} in dem Wort {word}?",
    "Zähle die {letter} in {word}.",
    # Italian
    "Quante {letter} ci sono in {word}?",
    "Quante volte compare {letter} in {word}?",
    # Portuguese
    "Quantas letras {letter} tem a palavra {word}?",
    "Quantas vezes {letter} aparece em {word}?",
    # Chinese
    "{word}里有几个{letter}?",
    "单词{word}中{letter}出现了多少次?",
)
QUOTES = ("{}", "{}", "'{}'", '"{}"')


def load(split: str = "train", *, source: str | Path | None = None, size: int | None = None) -> Task:
    """Return the task.

    Args:
        split: train or test; made from seeds apart, a word may occur in both.
        source: a text file of one word a line, or a folder with words.txt; None: the list that ships with the package.
        size: number of rows; None: 80,000 to train, 256 to test.

    Raises:
        UserError: there is no such split, the size makes no sense, or the words cannot be read.
    """
    seed = _generated.first_seed("spellingbee", split)
    rows = _generated.rows("spellingbee", split, size, train=80_000)
    words = _generated.words(source)

    def row(index: int) -> Conversation:
        rng = random.Random(seed + rows[index])
        word = rng.choice(words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(string.ascii_lowercase)
        return qa_conversation(question(rng, word, letter), answer(word, letter))

    return Task("spellingbee", "generative", len(rows), row, match_final_number)


def question(rng: random.Random, word: str, letter: str) -> str:
    """Return one of many ways to ask; people write without capitals, quotes and question marks as well."""
    text = rng.choice(PHRASINGS)
    if rng.random() < 0.2:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip("?. ")
    return text.format(letter=rng.choice(QUOTES).format(letter), word=rng.choice(QUOTES).format(word))


def answer(word: str, letter: str) -> list[dict[str, str]]:
    """Return the parts of the answer."""
    lines, count = [], 0
    for char in word:
        count += char == letter
        lines.append(f"{char} {count}\n")
    return [
        {"type": "text", "text": f"{spelled(word)}\n\nCounting {letter}:\n{''.join(lines)}Check: "},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\n#### {count}"},
    ]
