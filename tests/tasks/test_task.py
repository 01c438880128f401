"""Tasks as rows: slices and mixtures by literal indices, the rendering of choices, and final answers."""

import pydoc_data.topics
import random
from typing import Any

import pytest

from nanochat import tasks
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, tokenizer
from nanochat.tasks import Task


def numbers(name: str, size: int) -> Task:
    """Return a task whose row i is the text `<name><i>`."""
    return Task(
        name, "generative", size, lambda i: tasks.qa_conversation(f"{name}{range(size)[i]}", "a"), lambda *_: True
    )


def questions(some: Task) -> list[str]:
    return [some.row(i)["messages"][0]["content"] for i in range(some.size)]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ((), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((3,), [3, 4, 5, 6, 7, 8, 9]),
        ((2, 5), [2, 3, 4]),
        ((1, None, 3), [1, 4, 7]),
        ((0, 100), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((-2, None), [8, 9]),
        ((None, None, -4), [9, 5, 1]),
        ((5, 5), []),
    ],
)
def test_a_view_is_a_slice(cut: tuple[Any, ...], expected: list[int]) -> None:
    sliced = tasks.slice_task(numbers("a", 10), *cut)
    assert questions(sliced) == [f"a{i}" for i in expected]
    assert (sliced.name, sliced.kind, sliced.right is None) == ("a", "generative", False)
    with pytest.raises(IndexError):
        sliced.row(len(expected))


def test_a_view_of_a_view() -> None:
    assert questions(tasks.slice_task(tasks.slice_task(numbers("a", 10), 1, None, 2), 1, 4)) == ["a3", "a5", "a7"]
    with pytest.raises(ValueError, match="zero"):
        tasks.slice_task(numbers("a", 10), step=0)


def test_a_view_makes_no_row_before_it_is_asked_for() -> None:
    made: list[int] = []
    source = Task("a", "chat", 10, lambda i: made.append(i) or {"messages": []})
    mixed = tasks.mixture([tasks.slice_task(source, 2, 4), source])
    assert made == []
    mixed.row(0)
    assert len(made) == 1


def test_a_mixture_has_the_order_of_one_shuffle() -> None:
    mixed = tasks.mixture([numbers("a", 3), numbers("b", 4)])
    assert questions(mixed) == ["a1", "b0", "b1", "a2", "b3", "a0", "b2"]
    assert (mixed.name, mixed.kind, mixed.size, mixed.right) == ("mixture", "chat", 7, None)
    for index in (7, 100):
        with pytest.raises(IndexError):
            mixed.row(index)


def test_a_mixture_shuffles_pairs_as_the_plain_way_does() -> None:
    parts = [numbers("a", 30), numbers("empty", 0), numbers("b", 11), numbers("c", 1)]
    for seed in (42, 7):
        pairs = [f"{part.name}{i}" for part in parts for i in range(part.size)]
        random.Random(seed).shuffle(pairs)
        assert questions(tasks.mixture(parts, seed=seed)) == pairs


def test_a_task_named_twice_counts_twice() -> None:
    asked = questions(tasks.mixture([numbers("a", 5), numbers("b", 5), numbers("a", 5)]))
    assert {q: asked.count(q) for q in asked} == {f"a{i}": 2 for i in range(5)} | {f"b{i}": 1 for i in range(5)}
    with pytest.raises(ValueError, match="a task at least"):
        tasks.mixture([])


def test_multiple_choice_is_rendered_as_the_spec_says() -> None:
    assert tasks.multiple_choice("What is wet?", ["A", "B"], ["stone", "water"]) == (
        "Multiple Choice question: What is wet?\n- stone=A\n- water=B\n\nRespond only with the letter of the correct "
        "answer."
    )
    with pytest.raises(ValueError, match="argument 2 is longer"):
        tasks.multiple_choice("?", ["A"], ["x", "y"])


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer that learned 700 tokens from Python's own manual."""
    return tokenizer.train(list(pydoc_data.topics.topics.values()), 965)


def test_a_letter_is_the_same_token_in_question_and_answer(trained: Tokenizer) -> None:
    letters = ["A", "B", "C", "D", "E", "1", "2", "3", "4"]
    choices = ["the sun", "42", "x", "an end.", "a (b)", "", "1", "é", "x="]
    ids = tasks.letter_ids(trained, letters)
    assert len(set(ids)) == len(letters) and [trained.decode([i]) for i in ids] == letters
    row = tasks.qa_conversation(tasks.multiple_choice("Which?", letters, choices), "C")
    tokens, mask = chat_format.render(trained, row)
    assert [token for token, learned in zip(tokens, mask) if learned] == [ids[2], trained.special("<|assistant_end|>")]
    ends = [i for i, token in enumerate(tokens) if trained.decode([token]).endswith("=")]
    assert [tokens[i + 1] for i in ends if tokens[i + 1] in ids] == ids


def test_a_tokenizer_that_merges_a_letter_with_its_sign_is_refused() -> None:
    single = tuple(bytes([i]) for i in range(256))
    assert tasks.letter_ids(Tokenizer(single), ["A"]) == [65]
    with pytest.raises(UserError, match="letter 'A'"):
        tasks.letter_ids(Tokenizer((*single, b"=A")), ["A"])
    with pytest.raises(UserError, match="letter 'AB'"):
        tasks.letter_ids(Tokenizer(single), ["AB"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 42", "42"),
        ("#### -1,234.5 dollars", "-1234.5"),
        ("#### 1 then #### 2", "1"),
        ("#### 7.", "7."),
        ("####7", None),
        ("### 7", None),
        ("#### $7", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_number_behind_the_marks(text: str, number: str | None) -> None:
    assert tasks.final_answer(text) == number


def test_an_answer_is_right_by_its_number() -> None:
    parts = [{"type": "python", "text": "9"}, {"type": "python_output", "text": "#### 9"}]
    row = tasks.qa_conversation("?", [*parts, {"type": "text", "text": "#### 1,000"}])
    assert tasks.match_final_number(row, "I say #### 1000") and tasks.match_final_number(row, "#### 1,000")
    assert not tasks.match_final_number(row, "#### 9") and not tasks.match_final_number(row, "1000")
    assert not tasks.match_final_number(tasks.qa_conversation("?", "no number"), "no number")
