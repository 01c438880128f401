"""What generated tasks share: seeds of their splits, numbers of rows, and the list of words."""

import functools
from pathlib import Path

from nanochat.config import UserError

TEST_SEED = 10_000_000
"""Row i of a training split is made from seed i, row i of a test split from this plus i."""
TEST_ROWS = 256
DATA = Path(__file__).parent / "data"


def first_seed(name: str, split: str) -> int:
    """Return the seed of a split's first row; each other row has the next.

    Raises:
        UserError: there is no such split.
    """
    if split not in ("train", "test"):
        raise UserError(f"task {name} has no split {split}; it has train and test")
    return TEST_SEED if split == "test" else 0


def rows(name: str, split: str, size: int | None, train: int) -> range:
    """Return the indices of a split: `size` of them, or `train` or TEST_ROWS if that is None.

    Raises:
        UserError: there are none, or so many that training seeds would reach those of the test.
    """
    size = (TEST_ROWS if split == "test" else train) if size is None else size
    if not 1 <= size <= TEST_SEED:
        raise UserError(f"task {name}: size={size}: expected 1 to {TEST_SEED:,}")
    return range(size)


def words(source: str | Path | None) -> tuple[str, ...]:
    """Return the words to spell.

    Args:
        source: a text file with one word a line, or a folder; a folder without words.txt, and None, give the list that
            ships with the package.

    Raises:
        UserError: there is no such file, or a line of it is not one word.
    """
    path = DATA / "words.txt" if source is None else Path(source).expanduser()
    if path.is_dir():
        path = path / "words.txt" if (path / "words.txt").exists() else DATA / "words.txt"
    return _words(path)


@functools.cache
def _words(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if word and not word.isalpha():
            raise UserError(f"source={path} line {number}: expected one word of letters, got {word[:40]!r}")
        if word:
            found.append(word)
    if not found:
        raise UserError(f"source={path}: has no word in it")
    return tuple(found)
