"""Best-fit packing of documents into rows of a fixed number of tokens.

A row takes the longest document of a buffer that fits into its remaining space (of equals the earliest), again and
again. When none fits, the shortest is cropped to fill the row; with padding, the end of the row stays empty instead.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, ValuesView
from typing import Generic, NamedTuple, TypeVar

D = TypeVar("D")

NUMBER_BITS = 44
LAST = (1 << NUMBER_BITS) - 1


class Row(NamedTuple, Generic[D]):
    pieces: list[tuple[D, int, int]]  # (document, start, stop): its first tokens are the row's from start to stop
    cropped_tokens: int  # that the last piece's document loses
    waiting: ValuesView[D]  # the buffer, oldest document first; a view, valid until the next row is requested
    latest: D  # the last document that was read from the stream


def plan(
    documents: Iterable[tuple[int, D]], row_tokens: int, buffer_docs: int, *, pad: bool = False
) -> Iterator[Row[D]]:
    """Yield the rows that best fit makes of a stream of documents.

    The buffer is full before every choice, and nothing is read beyond that: a plan over the `waiting` documents and
    then the rest of the stream continues exactly where this one stopped. When a finite stream ends, the buffer is used
    up; a last row that cannot be filled is dropped (with padding, it is yielded).

    Args:
        documents: (length in tokens, document); lengths are at least 1 and, with padding, at most `row_tokens`.
        pad: leave the end of a row empty where no document fits, instead of cropping one.
    """
    stream = enumerate(documents)
    waiting: dict[int, D] = {}  # by number, in order of arrival
    sizes: list[int] = []  # sorted length << NUMBER_BITS | (LAST - number): within a length the earliest is the last
    latest: D = None  # type: ignore[assignment]
    while True:
        pieces: list[tuple[D, int, int]] = []
        start = cropped = 0
        while start < row_tokens:
            while len(sizes) < buffer_docs:
                number, (length, document) = next(stream, (0, (0, None)))
                if document is None:
                    break
                latest = waiting[number] = document
                insort(sizes, length << NUMBER_BITS | (LAST - number))
            if not sizes:
                if pad and pieces:
                    yield Row(pieces, 0, waiting.values(), latest)
                return
            room = row_tokens - start
            index = bisect_left(sizes, (room + 1) << NUMBER_BITS) - 1
            if index < 0 and pad:
                break
            if index < 0:  # none fits: crop the earliest of the shortest
                index = bisect_left(sizes, ((sizes[0] >> NUMBER_BITS) + 1) << NUMBER_BITS) - 1
            key = sizes.pop(index)
            length = key >> NUMBER_BITS
            stop = min(start + length, row_tokens)
            pieces.append((waiting.pop(LAST - (key & LAST)), start, stop))
            cropped = start + length - stop
            start = stop
        yield Row(pieces, cropped, waiting.values(), latest)
