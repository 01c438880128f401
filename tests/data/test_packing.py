"""Best-fit packing against a plain reference, and the promises that the loader builds on."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import packing

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def plan(lengths: Iterable[int], row_tokens: int, buffer_docs: int) -> Iterator[tuple[list, int]]:
    """The plan over documents that are their own numbers: (pieces, cropped tokens) of each row."""
    documents = ((length, number) for number, length in enumerate(lengths))
    return ((row.pieces, row.cropped_tokens) for row in packing.plan(documents, row_tokens, buffer_docs))


def reference(lengths: Sequence[int], row_tokens: int, buffer_docs: int) -> Iterator[tuple[list, int]]:
    """The rules word for word, looking at the whole buffer for every choice."""
    waiting = list(enumerate(lengths))
    buffer: list[tuple[int, int]] = []
    while True:
        pieces, used = [], 0
        while used < row_tokens:
            while waiting and len(buffer) < buffer_docs:
                buffer.append(waiting.pop(0))
            if not buffer:
                return
            fitting = [doc for doc in buffer if doc[1] <= row_tokens - used]
            if fitting:
                longest = max(length for _, length in fitting)
                choice = next(doc for doc in fitting if doc[1] == longest)
            else:
                shortest = min(length for _, length in buffer)
                choice = next(doc for doc in buffer if doc[1] == shortest)
            buffer.remove(choice)
            taken = min(choice[1], row_tokens - used)
            pieces.append((choice[0], used, used + taken))
            used += taken
        yield pieces, sum(lengths[doc] for doc, _, _ in pieces) - row_tokens


@given(LENGTHS, st.integers(1, 50), st.integers(1, 20))
def test_rows_equal_a_plain_reference(lengths: list[int], row_tokens: int, buffer_docs: int) -> None:
    assert list(plan(lengths, row_tokens, buffer_docs)) == list(reference(lengths, row_tokens, buffer_docs))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 30), st.integers(1, 10), st.data())
def test_continues_from_the_waiting_documents(
    lengths: list[int], row_tokens: int, buffer_docs: int, data: st.DataObject
) -> None:
    rows = list(plan(lengths, row_tokens, buffer_docs))
    done = data.draw(st.integers(0, len(rows)))
    documents = iter([(length, number) for number, length in enumerate(lengths)])
    waiting: list[int] = []
    first = []
    for row in itertools.islice(packing.plan(documents, row_tokens, buffer_docs), done):
        first.append((row.pieces, row.cropped_tokens))
        waiting = list(row.waiting)
        assert waiting == sorted(waiting) and len(waiting) <= buffer_docs - 1
        assert row.latest == max([*waiting, *(number for pieces, _ in first for number, *_ in pieces)])
    rest = itertools.chain([(lengths[number], number) for number in waiting], documents)
    continued = [(row.pieces, row.cropped_tokens) for row in packing.plan(rest, row_tokens, buffer_docs)]
    assert first + continued == rows


def test_padding_leaves_the_end_of_a_row_empty() -> None:
    documents = zip([5, 4, 4, 9, 3], range(5))
    rows = [(row.pieces, row.cropped_tokens) for row in packing.plan(documents, 10, 3, pad=True)]
    assert rows == [([(0, 0, 5), (1, 5, 9)], 0), ([(3, 0, 9)], 0), ([(2, 0, 4), (4, 4, 7)], 0)]
