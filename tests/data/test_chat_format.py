"""Conversations: rendered ids and masks against literals, what is refused, and the reader of streamed answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.data import SPECIALS, ConversationError, Piece, Reader, Tokenizer, chat_format

# Bytes are their own ids, and three tokens were learned; the specials follow.
TOK = Tokenizer((*(bytes([i]) for i in range(256)), b"he", b"\n\n", " é".encode()))
BOS, USER, USER_END, BOT, BOT_END, PY, PY_END, OUT, OUT_END = range(259, 268)
TOOL = [
    {"type": "text", "text": "hm "},
    {"type": "python", "text": "2*3"},
    {"type": "python_output", "text": "6"},
    {"type": "text", "text": "!"},
]


def talk(*contents: Any, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


def test_conversation_is_rendered_with_its_mask_and_truncated_to_max_tokens() -> None:
    ids, mask = chat_format.render(TOK, talk("hey", "he é", "q", "r"))
    first = [BOS, USER, 256, ord("y"), USER_END, BOT, 256, 258, BOT_END]
    assert ids == [*first, USER, ord("q"), USER_END, BOT, ord("r"), BOT_END]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    for length in (1, 6, 7, 9, 100):
        assert chat_format.render(TOK, talk("hey", "he é", "q", "r"), length) == (ids[:length], mask[:length])


def test_system_message_is_merged_into_the_first_user_message() -> None:
    ids, mask = chat_format.render(TOK, talk("b", "c", "d", "e", system="a"))
    assert ids[:7] == [BOS, USER, ord("a"), 257, ord("b"), USER_END, BOT]
    assert ids[9:12] == [USER, ord("d"), USER_END]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_tool_calls_are_in_the_loss_mask_and_outputs_are_not() -> None:
    ids, mask = chat_format.render(TOK, talk("x", TOOL))
    call, output = [PY, *b"2*3", PY_END], [OUT, ord("6"), OUT_END]
    assert ids == [BOS, USER, ord("x"), USER_END, BOT, *b"hm ", *call, *output, ord("!"), BOT_END]
    assert mask == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]


EVIL = "".join(SPECIALS)


@pytest.mark.parametrize(
    ("conversation", "markers"),
    [
        (talk("u", "a", system=EVIL), []),
        (talk(EVIL, "a"), []),
        (talk("u", EVIL), []),
        (talk("u", [{"type": "python", "text": EVIL}]), [PY, PY_END]),
        (talk("u", [{"type": "python_output", "text": EVIL}]), [OUT, OUT_END]),
    ],
)
def test_text_never_becomes_a_special_token(conversation: dict[str, Any], markers: list[int]) -> None:
    ids, _ = chat_format.render(TOK, conversation)
    assert [i for i in ids if i >= BOS] == [BOS, USER, USER_END, BOT, *markers, BOT_END]
    assert EVIL in TOK.decode([i for i in ids if i < BOS])


def test_prompt_ends_where_the_answer_starts() -> None:
    conversation = talk("hey", "he é", "q", system="s")
    ids, _ = chat_format.render(TOK, conversation)
    assert chat_format.prompt(TOK, conversation["messages"]) == [*ids, BOT]
    with pytest.raises(ConversationError, match="message 2: the last message must be the user's"):
        chat_format.prompt(TOK, talk("hey", "you")["messages"])


USER_X, BOT_X = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
SYSTEM_X = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([USER_X], 'expected a conversation {"messages"'),
        ({"messages": "hello"}, 'expected a conversation {"messages"'),
        ({"messages": []}, "no user message: add one"),
        ({"messages": [SYSTEM_X]}, "no user message: add one after the system's"),
        ({"messages": ["hello"]}, r"message 1: expected an object .* got 'hello'"),
        ({"messages": [BOT_X]}, "message 1: role 'assistant', expected user"),
        ({"messages": [USER_X, SYSTEM_X]}, "message 2: role 'system', expected assistant.*may only come first"),
        ({"messages": [{"role": [], "content": ""}]}, r"message 1: role \[\], expected user"),
        ({"messages": [{"role": "user", "content": TOOL}]}, "message 1: content of the user must be a string"),
        (talk("x", None), "message 2: content must be a string or a list of parts, got None"),
        (talk("x", ["text"]), r"message 2, part 1: expected .*python_output.* got 'text'"),
        (talk("x", [TOOL[0], {"type": "image", "text": ""}]), "message 2, part 2: .*'image'"),
    ],
)
def test_invalid_message_is_named(conversation: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message) as caught:
        chat_format.render(TOK, conversation)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_content_is_the_inverse_of_render() -> None:
    for expected in ("he é", "", TOOL, TOOL[1:3], [*TOOL[1:3], *TOOL[1:3]], [{"type": "python", "text": ""}]):
        ids, _ = chat_format.render(TOK, talk("x", expected))
        assert chat_format.content(TOK, ids[5:]) == expected
        assert chat_format.content(TOK, ids[5:-1]) == expected


def test_content_of_malformed_answers() -> None:
    assert chat_format.content(TOK, []) == ""
    assert chat_format.content(TOK, [ord("a"), PY_END, ord("b"), BOS]) == "ab"
    assert chat_format.content(TOK, [PY, ord("1")]) == [{"type": "python", "text": "1"}]
    assert chat_format.content(TOK, [0xC3]) == "\ufffd"


def read(ids: list[int], tok: Tokenizer = TOK) -> list[Piece]:
    reader = Reader(tok)
    return [piece for token in ids for piece in reader.feed(token)] + reader.close()


def test_reader_yields_whole_characters_by_kind() -> None:
    reader = Reader(TOK)
    assert reader.feed(256) == [Piece("text", "he")]
    assert [reader.feed(byte) for byte in "🙂".encode()] == [[], [], [], [Piece("text", "🙂")]]
    assert reader.feed(258) == [Piece("text", " é")]
    assert [reader.feed(i) for i in (PY, ord("2"), PY_END)] == [[], [Piece("python", "2")], []]
    assert [reader.feed(i) for i in (OUT, ord("2"), OUT_END)] == [[], [Piece("output", "2")], []]
    assert [reader.feed(i) for i in (ord("k"), BOT_END)] == [[Piece("text", "k")], []]
    assert reader.close() == []


def test_reader_replaces_an_incomplete_character_at_a_marker_and_at_the_end() -> None:
    assert read([0xC3, PY, ord("1")]) == [Piece("text", "\ufffd"), Piece("python", "1")]
    assert read([PY, 0xC3, PY_END, 0xA9]) == [Piece("python", "\ufffd"), Piece("text", "\ufffd")]
    assert read([0xC3, BOT_END]) == [Piece("text", "\ufffd")]
    reader = Reader(TOK)
    for token in (PY, ord("1"), 0xC3):
        reader.feed(token)
    assert reader.close() == [Piece("python", "\ufffd")]
    assert reader.close() == [] and reader.feed(ord("a")) == [Piece("text", "a")], "a closed reader can be used again"


def test_reader_refuses_ids_out_of_range() -> None:
    for token in (-1, 268, 10**9):
        with pytest.raises(ValueError, match=r"outside 0\.\.267"):
            Reader(TOK).feed(token)


@given(raw=st.binary() | st.text().map(str.encode), data=st.data())
def test_pieces_join_to_the_text_for_any_tokenization(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1)))) if len(raw) > 1 else []
    words = [raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)]) if raw]
    vocabulary = [*TOK.tokens[:256], *dict.fromkeys(word for word in words if len(word) > 1)]
    tok = Tokenizer(tuple(vocabulary))
    pieces = read([vocabulary.index(word) for word in words], tok)
    assert "".join(piece.text for piece in pieces) == raw.decode("utf-8", "replace")
    assert all(piece.text and piece.kind == "text" for piece in pieces)


@given(ids=st.lists(st.integers(0, TOK.vocab_size - 1) | st.integers(BOS, OUT_END)))
def test_content_of_any_tokens_can_be_rendered(ids: list[int]) -> None:
    pieces = read(ids)
    assert {piece.kind for piece in pieces} <= {"text", "python", "output"}
    content = chat_format.content(TOK, ids)
    chat_format.render(TOK, talk("x", content))
    if all(i < 128 or i >= BOS for i in ids):  # no character of several bytes, which a special token may tear apart
        whole = content if isinstance(content, str) else "".join(part["text"] for part in content)
        assert whole == "".join(piece.text for piece in pieces)
