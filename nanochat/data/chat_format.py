"""The chat format: conversations to tokens with a loss mask, prompts, and tokens back to text, also while streaming.

A conversation is {"messages": [...]}: an optional system message, then user and assistant in turn. It becomes

    <|bos|> (<|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|>)*

The system message is merged into the first user message, with a blank line between. An assistant's content is text, or
a list of parts {"type": …, "text": …}: `text`, `python` (a tool call, between <|python_start|> and <|python_end|>) or
`python_output` (its result, between <|output_start|> and <|output_end|>). Text never becomes a special token.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat.config import UserError
from nanochat.data.tokenizer import Tokenizer

MARKERS = {"python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}
PART_TYPES = ("text", *MARKERS)
# The type of the part that follows a marker in an answer; streamed, a "python_output" is a Piece of kind "output".
PART_AFTER = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}

Conversation = Mapping[str, Any]
Message = Mapping[str, Any]


class ConversationError(UserError, ValueError):
    """An invalid conversation; names the message (counted from 1), the problem and the fix."""


class Piece(NamedTuple):
    """Streamed text of an answer, whole characters; kind is "text", "python" (a tool call) or "output" (its result)."""

    kind: str
    text: str


def check(conversation: Conversation) -> None:
    """Raise a ConversationError if `conversation` is invalid."""
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("messages"), list | tuple):
        raise ConversationError('expected a conversation {"messages": [{"role": …, "content": …}, …]}')
    messages = conversation["messages"]
    system = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    if len(messages) <= system:
        raise ConversationError("the conversation has no user message: add one" + " after the system's" * system)
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ConversationError(f'{where}: expected an object {{"role": …, "content": …}}, got {_short(message)}')
        expected = "system" if system and number == 1 else ("assistant", "user")[(number - system) % 2]
        if message["role"] != expected:
            rule = f"{expected}: user and assistant take turns, and a system message may only come first"
            if number == 1:
                rule = "user (or system): a conversation starts with one of them"
            raise ConversationError(f"{where}: role {_short(message['role'])}, expected {rule}")
        _check_content(where, message["role"], message["content"])


def _check_content(where: str, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if role != "assistant":
        raise ConversationError(f"{where}: content of the {role} must be a string, got {_short(content)}")
    if not isinstance(content, list | tuple):
        raise ConversationError(f"{where}: content must be a string or a list of parts, got {_short(content)}")
    for number, part in enumerate(content, start=1):
        if not isinstance(part, Mapping) or part.get("type") not in PART_TYPES or not isinstance(part.get("text"), str):
            form = f'{{"type": {" | ".join(PART_TYPES)}, "text": string}}'
            raise ConversationError(f"{where}, part {number}: expected {form}, got {_short(part)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def render(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Return a valid conversation's (ids, loss mask), of equal length, truncated to `max_tokens`.

    The mask is 1 on the assistant's text, its tool calls with both markers, and <|assistant_end|>. It is 0 on all
    else, tool outputs with their markers included.
    """
    check(conversation)
    ids, mask = [tokenizer.bos], [0]

    def add(supervised: int, *pieces: str | int) -> None:
        for piece in pieces:
            tokens = tokenizer.encode(piece) if isinstance(piece, str) else [piece]
            ids.extend(tokens)
            mask.extend([supervised] * len(tokens))

    special = tokenizer.special
    messages = conversation["messages"]
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    for message in messages:
        if message["role"] == "user":
            add(0, special("<|user_start|>"), message["content"], special("<|user_end|>"))
            continue
        add(0, special("<|assistant_start|>"))
        for kind, text in _parts(message["content"]):
            if kind == "text":
                add(1, text)
            else:
                start, end = MARKERS[kind]
                add(int(kind == "python"), special(start), text, special(end))
        add(1, special("<|assistant_end|>"))
    return ids[:max_tokens], mask[:max_tokens]


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the tokens that precede an answer to the last message, the user's, up to <|assistant_start|>."""
    ids, _ = render(tokenizer, {"messages": messages})
    if messages[-1]["role"] != "user":
        raise ConversationError(f"message {len(messages)}: the last message must be the user's")
    return [*ids, tokenizer.special("<|assistant_start|>")]


def content(tokenizer: Tokenizer, ids: Sequence[int]) -> str | list[dict[str, str]]:
    """Return the tokens after <|assistant_start|> as the content of an assistant message, the inverse of `render`.

    It is the text, or a list of parts if there are tool calls; an unclosed one ends with the tokens. Special tokens
    other than the tools' markers are ignored.
    """
    first = len(tokenizer.tokens)
    spans: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids:
        if token < first:
            spans[-1][1].append(token)
        elif (name := tokenizer.specials[token - first]) in PART_AFTER:
            spans.append((PART_AFTER[name], []))
    parts = [{"type": kind, "text": tokenizer.decode(span)} for kind, span in spans if span or kind != "text"]
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return an answer's tokens as readable text, with [call → result] for tool calls."""
    templates = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    return "".join(templates[kind].format(text) for kind, text in _parts(content(tokenizer, ids)))


class Reader:
    """Streaming detokenizer of an answer: `feed` each token, then `close`.

    Pieces hold whole characters: the bytes of an incomplete one wait for the next token. Invalid UTF-8 becomes U+FFFD.
    The tools' markers switch the kind and give no text; nor do other special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._kind = "text"

    def feed(self, token: int) -> list[Piece]:
        """Return the piece that this token completes, if any. Raises ValueError for an id out of range."""
        tokens, specials = self._tokenizer.tokens, self._tokenizer.specials
        if not 0 <= token < len(tokens) + len(specials):
            raise ValueError(f"token id {token} is outside 0..{len(tokens) + len(specials) - 1}")
        if token < len(tokens):
            return self._decode(tokens[token])
        pieces = self._decode(b"", final=True)  # no character continues after a special token
        part = PART_AFTER.get(specials[token - len(tokens)])
        self._kind = "output" if part == "python_output" else part or self._kind
        return pieces

    def close(self) -> list[Piece]:
        """Return an incomplete last character, as U+FFFD, and reset the reader."""
        pieces = self._decode(b"", final=True)
        self._kind = "text"
        return pieces

    def _decode(self, data: bytes, *, final: bool = False) -> list[Piece]:
        text = self._decoder.decode(data, final)
        return [Piece(self._kind, text)] if text else []


def _parts(content: str | Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    if isinstance(content, str):
        return [("text", content)]
    return [(part["type"], part["text"]) for part in content]
