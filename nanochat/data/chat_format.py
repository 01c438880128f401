"""The chat format: conversations to tokens with a loss mask, prompts, and tokens back to text, also while streaming.

A conversation is {"messages": [{"role": …, "content": …}, …]}. It becomes

    <|bos|> (<|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|>)*

by one rule, `normalize`, for training, evaluation, chat and the API:

- Everything up to the next assistant message is one user turn: system (or developer) and user messages in their order,
  joined by a blank line. It needs at least one user message, so no conversation starts with the assistant.
- Consecutive assistant messages are one assistant turn, joined by a blank line.
- Content is text, or a list of parts {"type": …, "text": …}. A part is `text`, or in the assistant's messages `python`
  (a tool call, between <|python_start|> and <|python_end|>) or `python_output` (its result, between <|output_start|>
  and <|output_end|>). The text parts of other roles are joined by a line break. Text never becomes a special token.
- A switch (`"weight": 0`, `"train": false`, …, see `SWITCHES`) takes an assistant's message, or all of those of a
  conversation, out of the loss. It changes the mask, never the tokens.
- null stands for an absent key. Roles and keys that would change the meaning (the role `tool`, `tool_calls`, `images`,
  …) are refused; other keys have no effect: `unused_keys` names them.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

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
# Names of roles, those of ShareGPT among them -> the role.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
# Keys of a message or a conversation -> the value that leaves it in the loss; the other value takes it out.
SWITCHES = {"weight": True, "loss_weight": True, "train": True, "training": True, "loss": True, "masked": False}
UNSUPPORTED = (
    *("tool_calls", "tool_call_id", "tools", "function_call", "functions", "images", "image", "audio", "audios"),
    *("video", "videos", "refusal", "reasoning", "reasoning_content", "thinking", "mask", "loss_mask", "train_detail"),
    *("chosen", "rejected", "history"),
)
EMPTY = (None, "", [], {})  # values that say nothing

Conversation = Mapping[str, Any]
Message = Mapping[str, Any]
TooLong = Literal["truncate", "whole_turns", "drop"]


class ConversationError(UserError, ValueError):
    """An invalid conversation; names the message (counted from 1), the problem and the fix."""


class Piece(NamedTuple):
    """Streamed text of an answer, whole characters; kind is "text", "python" (a tool call) or "output" (its result)."""

    kind: str
    text: str


class Turn(NamedTuple):
    """What one side says before the other answers."""

    side: str  # "user" or "assistant"
    parts: list[tuple[str, str, bool]]  # (type, text, supervised), at least one; of the user exactly one


def normalize(conversation: Conversation) -> list[Turn]:
    """Return the turns of a conversation by the rule above. Raises ConversationError if it is invalid."""
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("messages"), list | tuple):
        raise ConversationError('expected a conversation {"messages": [{"role": …, "content": …}, …]}')
    default = _switch("the conversation", conversation)
    turns: list[Turn] = []
    has_question = False  # the user turn has a message of the user
    for number, message in enumerate(conversation["messages"], start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise ConversationError(f'{where}: expected an object {{"role": …, "content": …}}, got {_short(message)}')
        switch = _switch(where, message)
        role, parts = _checked(where, message)
        side = "assistant" if role == "assistant" else "user"
        continues = bool(turns) and turns[-1].side == side
        if side == "user":
            if switch:
                keys = "/".join(key for key in SWITCHES if message.get(key) is not None)
                raise ConversationError(f"{where}: {keys} on the {role}'s message: only the assistant's are trained on")
            has_question = role == "user" or (continues and has_question)
            texts = [turns.pop().parts[0][1]] if continues else []
            texts.append("\n".join(text for _, text in parts))
            turns.append(Turn("user", [("text", "\n\n".join(texts), False)]))
        elif not has_question:
            raise ConversationError(f"{where}: role {role!r}, expected user: it answers no user message, so remove it")
        else:
            supervised = next(value for value in (switch, default, True) if value is not None)
            before = [*turns.pop().parts, ("text", "\n\n", supervised)] if continues else []
            turns.append(Turn("assistant", [*before, *((kind, text, supervised) for kind, text in parts)]))
    if not has_question:
        raise ConversationError("the conversation has no user message: add one" + " after the system's" * bool(turns))
    return turns


def unused_keys(conversation: Conversation) -> set[str]:
    """Return the keys of a valid conversation's messages and parts that have no effect, without empty ones."""
    unused: set[str] = set()
    for message in conversation["messages"]:
        parts = [] if isinstance(message["content"], str) else message["content"]
        for holder, used in [(message, {"role", "content", *SWITCHES}), *((part, {"type", "text"}) for part in parts)]:
            unused |= {key for key, value in holder.items() if key not in used and value not in EMPTY}
    return unused


def _checked(where: str, message: Message) -> tuple[str, list[tuple[str, str]]]:
    """Return the role and the parts of a message."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role.lower() not in ROLES:
        known = "system, developer, user or assistant; tool calls and results are parts of the assistant's content"
        raise ConversationError(f"{where}: role {_short(role)}, expected {known}")
    if not isinstance(content, str | list | tuple):
        raise ConversationError(f"{where}: content must be a string or a list of parts, got {_short(content)}")
    role = ROLES[role.lower()]
    types = PART_TYPES if role == "assistant" else ("text",)
    for number, part in enumerate([] if isinstance(content, str) else content, start=1):
        if not isinstance(part, Mapping) or part.get("type") not in types or not isinstance(part.get("text"), str):
            form = f'{{"type": {" | ".join(types)}, "text": string}}'
            raise ConversationError(f"{where}, part {number}: expected {form}, got {_short(part)}")
    return role, _parts(content) or [("text", "")]


def _switch(where: str, holder: Message | Conversation) -> bool | None:
    """Return whether a message, or all of a conversation's, are in the loss; None if nothing says so."""
    for key in UNSUPPORTED:
        if holder.get(key) not in EMPTY:
            raise ConversationError(f"{where}: {key} is not supported: remove it, or the conversation")
    given = {key: holder[key] for key in SWITCHES if holder.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ConversationError(f"{where}: {key} is {_short(value)}, expected 0 or 1, or false or true")
    switches = {value == SWITCHES[key] for key, value in given.items()}
    if len(switches) > 1:
        raise ConversationError(f"{where}: {' and '.join(given)} contradict each other: remove one")
    return switches.pop() if switches else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def render(
    tokenizer: Tokenizer,
    conversation: Conversation,
    max_tokens: int | None = None,
    *,
    assistant_only: bool = True,
) -> tuple[list[int], list[int]]:
    """Return a conversation's (ids, loss mask), of equal length, truncated to `max_tokens`.

    The mask is 1 on the assistant's text, its tool calls with both markers, and <|assistant_end|>. It is 0 on all
    else, tool outputs with their markers included, and on messages that are switched off.

    Args:
        assistant_only: False: the mask is 1 on all but the assistant's messages that are switched off.
    """
    other = not assistant_only
    ids, mask = [tokenizer.bos], [int(other)]

    def add(supervised: bool, *pieces: str | int) -> None:
        for piece in pieces:
            tokens = tokenizer.encode(piece) if isinstance(piece, str) else [piece]
            ids.extend(tokens)
            mask.extend([int(supervised)] * len(tokens))

    special = tokenizer.special
    for side, parts in normalize(conversation):
        if side == "user":
            add(other, special("<|user_start|>"), parts[0][1], special("<|user_end|>"))
            continue
        add(other, special("<|assistant_start|>"))
        for kind, text, supervised in parts:
            if kind == "text":
                add(supervised, text)
            else:
                start, end = MARKERS[kind]
                add(supervised and (other or kind == "python"), special(start), text, special(end))
        add(parts[-1][2], special("<|assistant_end|>"))
    return ids[:max_tokens], mask[:max_tokens]


def kept_tokens(tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int, too_long: TooLong) -> int:
    """Return how many of a rendered conversation's tokens remain, all if there are at most `max_tokens`.

    Else truncate: `max_tokens`; whole_turns: those up to the last answer that fits, 0 without one; drop: 0.
    """
    if len(ids) <= max_tokens or too_long == "truncate":
        return min(len(ids), max_tokens)
    if too_long == "drop":
        return 0
    end = tokenizer.special("<|assistant_end|>")
    return max((n for n in range(1, max_tokens + 1) if ids[n - 1] == end), default=0)


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the tokens that precede an answer to the last turn, the user's, up to <|assistant_start|>."""
    ids, _ = render(tokenizer, {"messages": messages})
    if ids[-1] != tokenizer.special("<|user_end|>"):
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
        self.kind = "text"  # of the text of the next token

    def feed(self, token: int) -> list[Piece]:
        """Return the piece that this token completes, if any. Raises ValueError for an id out of range."""
        tokens, specials = self._tokenizer.tokens, self._tokenizer.specials
        if not 0 <= token < len(tokens) + len(specials):
            raise ValueError(f"token id {token} is outside 0..{len(tokens) + len(specials) - 1}")
        if token < len(tokens):
            return self._decode(tokens[token])
        pieces = self._decode(b"", final=True)  # no character continues after a special token
        part = PART_AFTER.get(specials[token - len(tokens)])
        self.kind = "output" if part == "python_output" else part or self.kind
        return pieces

    def close(self) -> list[Piece]:
        """Return an incomplete last character, as U+FFFD, and reset the reader."""
        pieces = self._decode(b"", final=True)
        self.kind = "text"
        return pieces

    def _decode(self, data: bytes, *, final: bool = False) -> list[Piece]:
        text = self._decoder.decode(data, final)
        return [Piece(self.kind, text)] if text else []


def _parts(content: str | Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    if isinstance(content, str):
        return [("text", content)]
    return [(part["type"], part["text"]) for part in content]
