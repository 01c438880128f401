r"""Weighted mixtures of sources of documents: data.source=0.8*climbmix,0.2*/my/texts (a comma in a path is written \,).

Each row of tokens is of one source: of the one that is furthest behind its share. So the shares are exact to a row, and
the order does not depend on the number of ranks. Every source has its own order, epochs, packing buffer and position.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nanochat.config import UserError

PART = re.compile(r"\s*(\d+\.?\d*|\.\d+)\*(.+)")
State = Mapping[str, Any]  # a LoaderState


def parse(source: str) -> list[tuple[float, str]]:
    """Return (share, source) of each source that `data.source` names; the shares add up to 1."""
    if not PART.match(source):
        return [(1.0, source)]
    texts = re.split(r"(?<!\\),", source)
    matches = [PART.fullmatch(text) for text in texts]
    for text, match in zip(texts, matches):
        if not match or not 0 < float(match[1]) < math.inf:
            raise UserError(
                f"data.source={source}: {text!r} is no weight above 0 and a source, as in 0.8*climbmix,0.2*/my/texts"
                r"; a comma within a path is written \,"
            )
    names = [match[2].strip().replace("\\,", ",") for match in matches if match]
    if len(set(names)) < len(names):
        raise UserError(f"data.source={source}: a source is named twice")
    weights = [float(match[1]) for match in matches if match]
    return [(weight / sum(weights), name) for weight, name in zip(weights, names)]


def next_source(shares: Sequence[float], amounts: Sequence[int]) -> int:
    """Return the source that is furthest behind its share, given what each has had; of equals the first."""
    total = sum(amounts) + 1
    return max(range(len(shares)), key=lambda i: shares[i] * total - amounts[i])


def interleave(shares: Sequence[float], sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """Yield the texts of all sources, by their shares of characters until the first of them ends."""
    left, chars = list(range(len(shares))), [0] * len(shares)
    while left:
        turn = left[next_source([shares[i] for i in left], [chars[i] for i in left])]
        text = next(sources[turn], None)
        if text is None:
            left.remove(turn)
        else:
            chars[turn] += len(text)
            yield text


def join(states: Sequence[Any], shares: Sequence[float], names: Sequence[str]) -> Any:
    """Return one loader state for those of all sources; that of a single source as it is."""
    if len(states) == 1:
        return states[0]
    positions = [
        {**s["position"], "source": name, "share": share, "buffered": [len(s["tokens"]), len(s["lengths"])]}
        for s, share, name in zip(states, shares, names)
    ]
    skipped = [text for position in positions for text in position.get("skipped", [])]
    position = {"version": positions[0]["version"], "sources": positions} | ({"skipped": skipped} if skipped else {})
    return {"position": position} | {name: np.concatenate([s[name] for s in states]) for name in ("tokens", "lengths")}


def split(state: State) -> list[Any]:
    """Return the loader states that `join` joined."""
    positions = state["position"].get("sources")
    if positions is None:
        return [state]
    ends = np.cumsum([position["buffered"] for position in positions], axis=0)[:-1]
    arrays = (np.split(np.asarray(state[name]), ends[:, i]) for i, name in enumerate(("tokens", "lengths")))
    return [{"position": p, "tokens": tokens, "lengths": n} for p, tokens, n in zip(positions, *arrays)]


def label(source: str) -> str:
    """Return a short name of a source, for metrics."""
    return re.sub(r"[^\w.-]+", "_", source.rstrip("/").rpartition("/")[2])


def notes(position: Mapping[str, Any]) -> list[str]:
    """Return what is worth saying of a loader's position at the end of a run: shares of a mixture, what was skipped."""
    lines, sources = [f"skipped: {text}" for text in position.get("skipped", [])], position.get("sources", [])
    total = sum(source["rows"] for source in sources)
    for source in sources if total else []:
        share, docs = source["rows"] / total, f"{source['docs']:,} documents"
        lines.append(f"{share:.2%} of the tokens from {source['source']}: {docs}, reading epoch {source['epoch'] + 1}")
    return lines
