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


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def marked(conversation: Any, **options: Any) -> str:
    """Return a conversation as text, with U and A for the sides and [ ] around what is in the loss."""
    text, before = "", 0
    for token, supervised in zip(*chat_format.render(TOK, conversation, **options)):
        text += {(0, 1): "[", (1, 0): "]"}.get((before, supervised), "")
        text += {USER: "U:", BOT: "A:", BOS: "", USER_END: "|", BOT_END: "|"}.get(token, TOK.decode([token]))
        before = supervised
    return text + "]" * before


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([say("developer", "d"), say("user", "q"), say("assistant", "a")], "U:d\n\nq|A:[a|]"),
        ([say("system", "s"), say("system", "t"), say("user", "q")], "U:s\n\nt\n\nq|"),
        ([say("user", "q"), say("assistant", "a"), say("system", "s"), say("user", "r")], "U:q|A:[a|]U:s\n\nr|"),
        ([say("user", "q"), say("system", "s"), say("assistant", "a")], "U:q\n\ns|A:[a|]"),
        ([say("user", "q"), say("user", "r"), say("user", "s")], "U:q\n\nr\n\ns|"),
        ([say("user", "q"), say("assistant", "a"), say("assistant", "b")], "U:q|A:[a\n\nb|]"),
        ([say("user", "q"), say("assistant", "a", weight=0), say("assistant", "b")], "U:q|A:a[\n\nb|]"),
        ([say("user", "q"), say("assistant", "a"), say("assistant", "b", masked=True)], "U:q|A:[a]\n\nb|"),
        ([say("system", ""), say("user", "q"), say("assistant", "")], "U:\n\nq|A:[|]"),
        ([say("human", "q"), say("gpt", "a"), say("User", "r"), say("Model", "b")], "U:q|A:[a|]U:r|A:[b|]"),
        ([say("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}])], "U:q\nr|"),
        ([say("user", "q", name=None, weight=0), say("assistant", "a", tool_calls=[], weight=1.0)], "U:q|A:[a|]"),
    ],
)
def test_rule_for_roles_and_consecutive_messages(messages: list[Any], expected: str) -> None:
    assert marked({"messages": messages}) == expected


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}, {"masked": True}])
def test_switch_takes_a_message_or_all_of_a_conversation_out_of_the_loss(off: dict[str, Any]) -> None:
    on = {key: not value for key, value in off.items()}
    questions = [say("user", "q"), say("user", "r")]
    messages = [questions[0], say("assistant", "a", **off), questions[1], say("assistant", "b")]
    assert marked({"messages": messages}) == "U:q|A:a|U:r|A:[b|]"
    assert marked({"messages": messages}, assistant_only=False) == "[U:q|A:]a|[U:r|A:b|]"
    assert marked({"messages": messages, **off}) == "U:q|A:a|U:r|A:b|"
    messages[3].update(on)
    assert marked({"messages": messages, **off}) == "U:q|A:a|U:r|A:[b|]", "a message's own switch comes first"


TEXTS = st.text("ab \n.é", max_size=6)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(chat_format.PART_TYPES), "text": TEXTS}), max_size=3)
USERS = st.builds(say, st.sampled_from(["system", "developer", "user"]), TEXTS)
ANSWER = st.builds(say, st.just("assistant"), TEXTS | PARTS, weight=st.sampled_from([None, 0, 1]))
EXCHANGE = st.tuples(st.lists(USERS, max_size=2), st.builds(say, st.just("user"), TEXTS), st.lists(ANSWER, min_size=1))
EXCHANGES = st.lists(EXCHANGE, min_size=1, max_size=3)


@given(exchanges=EXCHANGES)
def test_prompt_equals_the_training_text_before_each_answer(exchanges: list[Any]) -> None:
    messages: list[Any] = []
    for before, question, answers in exchanges:
        messages += [*before, question]
        prompt = chat_format.prompt(TOK, messages)
        messages += answers
        ids, mask = chat_format.render(TOK, {"messages": messages})
        assert ids[: len(prompt)] == prompt and USER not in ids[len(prompt) :]
    plain = [{key: message[key] for key in ("role", "content")} for message in messages]
    every_ids, every_mask = chat_format.render(TOK, {"messages": plain})
    assert ids == every_ids, "switches do not change the tokens"
    off = {message["weight"] == 0 for message in messages if message["role"] == "assistant"}
    assert all(a <= b for a, b in zip(mask, every_mask))
    assert (off != {True} or not any(mask)) and (off != {False} or mask == every_mask)


@given(exchanges=EXCHANGES, limit=st.integers(1, 60))
def test_long_conversation_ends_with_the_last_answer_that_fits(exchanges: list[Any], limit: int) -> None:
    messages = [message for before, *rest in exchanges for message in (*before, rest[0], *rest[1])]
    ids, _ = chat_format.render(TOK, {"messages": messages})
    ends = [0, *(i + 1 for i, token in enumerate(ids) if token == BOT_END)]
    end = max(end for end in ends if end <= limit)
    assert chat_format.kept_tokens(TOK, ids, limit, "whole_turns") == (len(ids) if len(ids) <= limit else end)
    assert chat_format.kept_tokens(TOK, ids, limit, "drop") == (len(ids) if len(ids) <= limit else 0)


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
        ({"messages": [SYSTEM_X, BOT_X]}, "message 2: role 'assistant', expected user"),
        ({"messages": [USER_X, BOT_X, SYSTEM_X, BOT_X]}, "message 4: role 'assistant', expected user"),
        ({"messages": [{"role": [], "content": ""}]}, r"message 1: role \[\], expected system, developer, user"),
        ({"messages": [USER_X, {"role": "tool", "content": "1"}]}, "message 2: role 'tool', expected .*parts of the"),
        ({"messages": [USER_X, {"role": "assistant", "tool_calls": [{}]}]}, "message 2: tool_calls is not supported"),
        ({"messages": [USER_X, BOT_X], "tools": [{}]}, "the conversation: tools is not supported"),
        ({"messages": [{"role": "user", "content": TOOL}]}, 'message 1, part 2: expected {"type": text, "text"'),
        ({"messages": [USER_X, BOT_X | {"weight": 0.5}]}, "message 2: weight is 0.5, expected 0 or 1"),
        ({"messages": [USER_X, BOT_X | {"train": "no"}]}, "message 2: train is 'no', expected 0 or 1"),
        ({"messages": [USER_X, BOT_X | {"train": False, "weight": 1}]}, "message 2: weight and train contradict"),
        ({"messages": [USER_X, BOT_X | {"train_detail": [{}]}]}, "message 2: train_detail is not supported"),
        ({"messages": [USER_X, BOT_X], "loss": 1.7}, "the conversation: loss is 1.7, expected 0 or 1"),
        ({"messages": [USER_X | {"weight": 1}, BOT_X]}, "message 1: weight on the user's message: only"),
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
