"""Chat evaluation: multiple choice row by row, checked answers, scores, errors, and two ranks."""

import dataclasses
import json
from typing import Any

import chat_eval_ranks
import pytest
import ranks
import torch
from chat_eval_ranks import CONFIG, SAMPLED, TOKENIZER, choice, generative, subject
from torch import Tensor

from nanochat import infer, model
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.eval import ChatEvalConfig, Score, chat_eval
from nanochat.infer import Request, sampling
from nanochat.tasks import Task, qa_conversation

END = TOKENIZER.special("<|assistant_end|>")


# --- multiple choice --------------------------------------------------------------------------------------------------


def plain_choice(task: Task, index: int) -> bool:
    """Return whether a problem is solved, from all logits of its row alone."""
    row, bot = task.row(index), subject()
    prompt = chat_format.prompt(TOKENIZER, row["messages"][:-1])[-CONFIG.sequence_len :]
    logits_V = model.apply(bot.params, torch.tensor([prompt]), config=CONFIG)[0, -1]
    letters = [ord(letter) for letter in row["letters"]]
    return row["letters"][int(logits_V[letters].argmax())] == row["messages"][-1]["content"]


@pytest.mark.parametrize("batch_tokens", [1, 512, 10**6])
def test_batched_multiple_choice_equals_one_row_at_a_time(batch_tokens: int):
    task = choice()
    want = [plain_choice(task, i) for i in range(task.size)]
    assert chat_eval.score_multiple_choice(subject(), task, range(task.size), batch_tokens) == want
    assert 0 < sum(want) < task.size


def test_batches_have_similar_lengths_and_hold_each_row_once():
    lengths = [5, 3, 9, 9, 1, 2, 30, 4]
    batches = chat_eval._make_batches(lengths, 18)
    assert sorted(n for batch in batches for n in batch) == list(range(8))
    assert batches == [[6], [2, 3], [0, 7, 1], [5, 4]]


def test_long_prompt_keeps_its_last_tokens():
    long = Task(
        "mmlu",
        "multiple_choice",
        1,
        lambda i: {**qa_conversation("x" * 500 + "?", "A"), "letters": ["A", "B"]},
        None,
        0.5,
    )
    assert chat_eval.score_multiple_choice(subject(), long, [0]) == [plain_choice(long, 0)]
    requests: list[Request] = []
    complete = infer.complete

    def record(idle: Any, new: Any) -> Any:
        requests.extend(new)
        return complete(idle, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "complete", record)
        task = dataclasses.replace(long, kind="generative", is_correct=lambda row, text: False)
        chat_eval.evaluate(subject(), [task], ChatEvalConfig(max_tokens=2, compile=False))
    full = chat_format.prompt(TOKENIZER, long.row(0)["messages"][:-1])
    assert list(requests[0].prompt) == full[-CONFIG.sequence_len :] and len(full) > CONFIG.sequence_len


# --- generated answers ------------------------------------------------------------------------------------------------


def script(monkeypatch: pytest.MonkeyPatch, texts: dict[int, list[int]], n_prompt: int) -> None:
    """Let the request of seed `s` draw texts[s]."""

    def drawn(logits_BV: Tensor, *, seed_B: Tensor, position_B: Tensor, **_: Any) -> Tensor:
        pairs = zip(seed_B.tolist(), position_B.tolist())
        tokens = [
            texts.get(seed, [END])[position - n_prompt] if position >= n_prompt else 0 for seed, position in pairs
        ]
        return torch.tensor(tokens)

    monkeypatch.setattr(sampling, "draw", drawn)


def answer_tokens(text: str) -> list[int]:
    """Return the tokens of an answer in which `a[b]c` calls the tool with b."""
    before, _, rest = text.partition("[")
    call, _, after = rest.partition("]")
    tool = [TOKENIZER.special("<|python_start|>"), *call.encode(), TOKENIZER.special("<|python_end|>")] if rest else []
    result = [0] * (len(str(eval(call))) + 2) if rest else []  # forced, not drawn
    return [*before.encode(), *tool, *result, *after.encode(), END]


def doubling_row(index: int) -> chat_format.Conversation:
    return qa_conversation(f"twice {index:02d}?", f"#### {2 * index}")


def test_generated_answers_are_checked_by_the_task(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[str]] = {}

    def right(row: Any, text: str) -> bool:
        seen.setdefault(row["messages"][0]["content"], []).append(text)
        return text.endswith(row["messages"][-1]["content"])

    task = Task("gsm8k", "generative", 12, doubling_row, right)
    n_prompt = len(chat_format.prompt(TOKENIZER, doubling_row(0)["messages"][:1]))
    # Of two samples to each problem: both right, the second right, both wrong, by turns.
    config = ChatEvalConfig(samples=2, temperature=1.0, slots=2, max_tokens=40, seed=7, compile=False)
    texts = {}
    for i in range(12):
        first, second = (f"[2*{i}] is #### {2 * i + wrong}" for wrong in ((0, 0), (1, 0), (1, 1))[i % 3])
        texts |= {7 + 2 * i: answer_tokens(first), 7 + 2 * i + 1: answer_tokens(second)}
    script(monkeypatch, texts, n_prompt)
    bot = subject()
    results = chat_eval.sample_answers(chat_eval.start_engine(bot, config), TOKENIZER, task, range(12), config)
    assert results == [[[True, True], [False, True], [False, False]][i % 3] for i in range(12)]
    assert seen["twice 04?"] == [" is #### 9", " is #### 8"]  # tool calls and their results are not part of the answer
    assert chat_eval.evaluate(bot, [task], config)["gsm8k"] == Score(8, 12, 0.0)
    limited = dataclasses.replace(config, max_generative=5)
    assert chat_eval.evaluate(bot, [task], limited)["gsm8k"] == Score(4, 5, 0.0)
    assert chat_eval.evaluate(bot, [task], dataclasses.replace(limited, max_problems=1))["gsm8k"] == Score(1, 1, 0.0)


def test_max_generative_does_not_limit_multiple_choice():
    scores = chat_eval.evaluate(
        subject(), [choice(9), generative(9)], dataclasses.replace(SAMPLED, max_generative=2, max_problems=7)
    )
    assert {name: score.total for name, score in scores.items()} == {"mmlu": 7, "gsm8k": 2}


def test_answers_depend_only_on_the_seed_and_the_problem():
    bot = subject()

    def texts(indices: Any, config: ChatEvalConfig) -> list[str]:
        seen: list[str] = []
        task = generative(is_correct=lambda row, text: seen.append(text) or True)
        chat_eval.sample_answers(chat_eval.start_engine(bot, config), TOKENIZER, task, indices, config)
        return seen[1:]  # the first call tests whether answers can be checked

    want = texts(range(6), SAMPLED)
    assert len(set(want)) > 12
    assert texts([4, 5], SAMPLED) == want[12:]
    assert texts(range(6), dataclasses.replace(SAMPLED, slots=5)) == want
    assert texts(range(6), dataclasses.replace(SAMPLED, seed=43)) != want


# --- scores and errors ------------------------------------------------------------------------------------------------


def test_chat_core_is_the_mean_centered_accuracy():
    scores = {
        "arc_easy": Score(50, 100, 0.25),
        "arc_challenge": Score(25, 100, 0.25),
        "mmlu": Score(10, 100, 0.25),
        "gsm8k": Score(3, 10, 0.0),
        "humaneval": Score(0, 7, 0.0),
        "spellingbee": Score(9, 10, 0.0),
    }
    assert chat_eval.chat_core(scores) == pytest.approx((1 / 3 + 0 - 0.2 + 0.3 + 0) / 5)
    named = chat_eval.as_metrics(scores)
    assert named["chat/ARC-Easy"] == 0.5 and named["chat/SpellingBee"] == 0.9 and len(named) == 7
    assert named["chat/ChatCORE"] == chat_eval.chat_core(scores)
    del scores["humaneval"]
    assert chat_eval.chat_core(scores) is None and "chat/ChatCORE" not in chat_eval.as_metrics(scores)


def test_scoring_errors_name_the_reason():
    def rows(row: Any) -> Task:
        return Task("mmlu", "multiple_choice", 3, lambda i: row, None, 0.25)

    good = {**qa_conversation("which?", "A"), "letters": ["A", "B"]}
    for task, why in (
        (dataclasses.replace(generative(), kind="chat"), "gsm8k: is of kind chat"),
        (generative(is_correct=None), "gsm8k: cannot check answers"),
        (dataclasses.replace(choice(), size=0), "mmlu: has no rows"),
        (rows({**good, "letters": ["B", "C"]}), "mmlu row 0: the answer 'A' is not one of its letters"),
        (rows(qa_conversation("which?", "A")), "mmlu row 0: the answer 'A' is not one of its letters"),
        (rows({**qa_conversation("which?", "Ä"), "letters": ["Ä", "B"]}), "letter 'Ä'"),
    ):
        with pytest.raises(UserError, match=why):
            chat_eval.evaluate(subject(), [task], SAMPLED)
    settings: list[dict[str, Any]] = [
        {"samples": 0},
        {"max_problems": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"samples": 2},
    ]
    for wrong in settings:
        with pytest.raises(UserError, match=next(iter(wrong))):
            ChatEvalConfig(**wrong)


def test_unavailable_check_fails_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infer, "complete", lambda *_: pytest.fail("an answer was generated"))
    with pytest.raises(UserError, match="the sandbox cannot run here"):
        chat_eval.evaluate(subject(), [generative(is_correct=chat_eval_ranks.refuse)], SAMPLED)


@pytest.mark.slow
def test_two_ranks_equal_one_and_fail_together():
    want = json.loads(json.dumps(chat_eval_ranks.results()))
    # The error of one rank is raised on both; the next task runs.
    failures = ["UserError: the sandbox cannot run here", "21 problems"]
    results = json.loads(json.dumps(ranks.call(2, chat_eval_ranks.results_and_failures)))
    assert results == [[0, want, failures], [1, want, failures]]
    letters, samples, scores = want
    assert 0 < sum(letters) < 40 and 0 < sum(map(sum, samples)) < 63
    assert scores["gsm8k"] == {"right": sum(map(any, samples)), "total": 21, "baseline": 0.0}
