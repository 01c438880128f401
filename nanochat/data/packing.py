"""Best-fit packing of documents into rows of a fixed number of tokens, planned from lengths alone.

A buffer holds the next documents. A row takes the longest of them that fits what is left of it, again and again;
when none fits, the shortest is cut to fill the row exactly and the rest of it is lost. Or, with padding, the rest of
the row stays empty and nothing is lost. Among documents of one length the earliest goes first. The buffer is filled up
before every choice, so that each choice is among `buffer_docs` documents for as long as there are any to load.

The plan says which documents go where and needs no tokens: whoever holds them copies only the rows it wants.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

# A document in the buffer is one integer, length << SERIAL_BITS | (LAST - its number): in order of size these are in
# order of length, and within a length from the latest to the earliest document.
SERIAL_BITS = 44
LAST = (1 << SERIAL_BITS) - 1


def plan(
    lengths: Iterable[int], row_tokens: int, buffer_docs: int, *, pad: bool = False
) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
    """Yield the rows that best fit makes of a stream of documents.

    The generator reads ahead as far as the rows yielded so far required, no further: a plan over the documents left in
    the buffer, oldest first, and then the rest of the stream goes on exactly where this one stopped. When a finite
    stream ends, the buffer is used up; a last row that cannot be filled is not yielded, its documents are lost (with
    padding, it is yielded as it is).

    Args:
        lengths: tokens of each document, at least 1; with padding, at most `row_tokens`.
        row_tokens: tokens of a row.
        buffer_docs: documents to choose from, at least 1.
        pad: leave the end of a row empty where no document fits, instead of cutting one.

    Yields:
        (pieces, lost): pieces are (document, start, stop), its index in `lengths` and the tokens of the row that its
        first `stop - start` tokens take; lost is the number of tokens cut off the last piece's document.
    """
    stream = enumerate(lengths)
    buffer: list[int] = []
    while True:
        pieces: list[tuple[int, int, int]] = []
        start = lost = 0
        while start < row_tokens:
            while len(buffer) < buffer_docs:
                document, length = next(stream, (0, 0))
                if not length:
                    break
                insort(buffer, length << SERIAL_BITS | (LAST - document))
            if not buffer:
                if pad and pieces:
                    yield pieces, 0
                return
            room = row_tokens - start
            at = bisect_left(buffer, (room + 1) << SERIAL_BITS) - 1
            if at < 0 and pad:
                break
            if at < 0:  # none fits: cut the earliest of the shortest
                at = bisect_left(buffer, ((buffer[0] >> SERIAL_BITS) + 1) << SERIAL_BITS) - 1
            key = buffer.pop(at)
            length = key >> SERIAL_BITS
            stop = min(start + length, row_tokens)
            pieces.append((LAST - (key & LAST), start, stop))
            lost = start + length - stop
            start = stop
        yield pieces, lost
