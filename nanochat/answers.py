"""The HTTP API's answers: pieces of text as server-sent events and as OpenAI's objects. Pure, as `nanochat.api`.

What a tool was asked and what it answered is no part of OpenAI's `content`; it goes into a field of our own,
`nanochat_parts`: the parts of a message (of a delta: the new ones), as conversations have them. A client that sends a
message back as it got it thereby gives the model its own tool calls again.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PART_TYPES = {"text": "text", "python": "python", "output": "python_output"}  # a piece's kind -> a part's type
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # str.splitlines() cuts here
END_OF_STREAM = b"data: [DONE]\n\n"


class Piece(NamedTuple):
    """A bit of an answer: as `conversation.Piece`."""

    kind: str
    text: str


class Header(NamedTuple):
    """What all objects of one of OpenAI's answers share."""

    id: str
    created: int
    model: str


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event that carries `value`: one line, whatever the client takes for a line end."""
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + line.translate(LINE_ENDS).encode() + b"\n\n"


def merge(pieces: Iterable[tuple[str, str]]) -> list[Piece]:
    """Return the pieces with neighbours of one kind joined."""
    merged: list[tuple[str, list[str]]] = []
    for kind, text in pieces:
        if not merged or merged[-1][0] != kind:
            merged.append((kind, []))
        merged[-1][1].append(text)
    return [Piece(kind, "".join(texts)) for kind, texts in merged]


def token(piece: tuple[str, str], gpu: int) -> dict[str, Any]:
    """Return a piece in our own dialect; the kind of plain text is left out."""
    kind, text = piece
    return {"token": text, "gpu": gpu} | ({} if kind == "text" else {"kind": kind})


def parts(pieces: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return pieces as parts of a message."""
    return [{"type": PART_TYPES[kind], "text": text} for kind, text in pieces]


def delta(piece: tuple[str, str]) -> dict[str, Any]:
    """Return a piece as the delta of one of OpenAI's chunks."""
    kind, text = piece
    return {"content": text} if kind == "text" else {"nanochat_parts": parts([piece])}


def chunk(header: Header, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of a streamed answer: of the `index`-th choice, with `finish` on its last."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_common(header, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(header: Header, usage: dict[str, int]) -> dict[str, Any]:
    """Return the chunk that ends a stream for which the client asked for token counts."""
    return {**_common(header, "chat.completion.chunk"), "choices": [], "usage": usage}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return token counts as OpenAI words them. The tokens of tools and of the end of an answer count as well."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def whole(
    header: Header, choices: Sequence[tuple[Sequence[tuple[str, str]], str]], usage: dict[str, int]
) -> dict[str, Any]:
    """Return a whole answer: of each choice its pieces and the reason why it ended."""
    listed = []
    for index, (pieces, finish) in enumerate(choices):
        merged = merge(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        message["content"] = "".join(piece.text for piece in merged if piece.kind == "text")
        if any(piece.kind != "text" for piece in merged):
            message["nanochat_parts"] = parts(merged)
        listed.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
    return {**_common(header, "chat.completion"), "choices": listed, "usage": usage}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the list of models."""
    listed = [{"id": name, "object": "model", "created": created, "owned_by": "nanochat"} for name in names]
    return {"object": "list", "data": listed}


def _common(header: Header, kind: str) -> dict[str, Any]:
    return {"id": header.id, "object": kind, "created": header.created, "model": header.model}


class Stopper:
    """Ends an answer before the first of some texts, which may come in bits: what may become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, pieces: Sequence[tuple[str, str]]) -> list[Piece]:
        """Return what of these pieces can go out; nothing once `stopped`. A tool's pieces are not looked into."""
        found: list[Piece] = []
        for kind, text in pieces:
            if self.stopped:
                break
            if kind != "text":
                found += [*self.close(), Piece(kind, text)]
                continue
            text = self._held + text
            at = min((i for i in map(text.find, self._stops) if i >= 0), default=None)
            self.stopped = at is not None
            keep = at if at is not None else len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = "" if self.stopped else text[keep:]
            found += [Piece("text", text[:keep])] if keep else []
        return found

    def close(self) -> list[Piece]:
        """Return what was held back: no stop came of it."""
        held, self._held = self._held, ""
        return [Piece("text", held)] if held and not self.stopped else []


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
