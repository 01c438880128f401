"""Chat evaluation: multiple choice row by row, checked answers, scores, errors, and two ranks."""

import dataclasses
from typing import Any

import chat_eval_ranks
import pytest
import ranks
import torch
from chat_eval_ranks import CONFIG, SAMPLED, TOKENIZER, choice, generative, model_under_test
from scripted_draws import script_draws

from nanochat import infer, model
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.eval import ChatEvalConfig, Score, chat_eval
from nanochat.tasks import Task, qa_conversation
from nanochat.tasks.task import match_final_number

END = TOKENIZER.special("<|assistant_end|>")


def plain_choice(task: Task, index: int) -> bool:
    row, params = task.row(index), model_under_test().params
    prompt = chat_format.prompt(TOKENIZER, row["messages"][:-1])[-CONFIG.sequence_len :]
    logits_V = model.apply(params, torch.tensor([prompt]), config=CONFIG)[0, -1]
    letters = [ord(letter) for letter in row["letters"]]
    return row["letters"][int(logits_V[letters].argmax())] == row["messages"][-1]["content"]


@pytest.mark.parametrize("batch_tokens", [1, 512, 10**6])
def test_batched_multiple_choice_equals_one_row_at_a_time(batch_tokens: int):
    task = choice()
    want = [plain_choice(task, i) for i in range(task.size)]
    assert chat_eval.score_multiple_choice(model_under_test(), task, range(task.size), batch_tokens) == want
    assert 0 < sum(want) < task.size


def rows_of(**changes: Any) -> Task:
    row = {**qa_conversation("which?", "A"), "letters": ["A", "B"], **changes}
    return Task("mmlu", "multiple_choice", 1, lambda i: row, None, 0.25)


def test_long_prompt_keeps_its_last_tokens(monkeypatch: pytest.MonkeyPatch):
    task = rows_of(**qa_conversation("x" * 500 + "?", "A"))
    assert chat_eval.score_multiple_choice(model_under_test(), task, [0]) == [plain_choice(task, 0)]
    requests = script_draws(monkeypatch, lambda request: [END])
    task = dataclasses.replace(task, kind="generative", is_correct=lambda row, text: False)
    chat_eval.evaluate(model_under_test(), [task], ChatEvalConfig(max_tokens=2, compile=False))
    full = chat_format.prompt(TOKENIZER, task.row(0)["messages"][:-1])
    assert list(requests[0].prompt) == full[-CONFIG.sequence_len :] and len(full) > CONFIG.sequence_len


def test_generated_answers_are_checked_by_the_task(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[str]] = {}

    def is_correct(row: Any, text: str) -> bool:
        seen.setdefault(row["messages"][0]["content"], []).append(text)
        return text.endswith(row["messages"][-1]["content"])

    def script(request: infer.Request) -> list[int]:
        # Of two samples to each problem: both correct, the second correct, both wrong, by turns.
        problem, sample = divmod(request.seed - 7, 2)
        wrong = ((0, 0), (1, 0), (1, 1))[problem % 3][sample]
        start, end = TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>")
        result = [0] * (len(str(2 * problem)) + 2)  # forced, not drawn
        call, answer = f"2*{problem}".encode(), f" is #### {2 * problem + wrong}".encode()
        return [*b"So ", start, *call, end, *result, *answer, END]

    script_draws(monkeypatch, script)

    rows = [qa_conversation(f"twice {index:02d}?", f"#### {2 * index}") for index in range(12)]
    task = Task("gsm8k", "generative", 12, rows.__getitem__, is_correct)
    config = ChatEvalConfig(samples=2, temperature=1.0, slots=2, max_tokens=40, seed=7, compile=False)
    engine = chat_eval.start_engine(model_under_test(), config)
    results = chat_eval.sample_answers(engine, TOKENIZER, task, range(12), config)
    assert results == [[[True, True], [False, True], [False, False]][i % 3] for i in range(12)]
    assert seen["twice 04?"] == ["So  is #### 9", "So  is #### 8"], "without tool calls and their results"
    for limits, score in (({}, (8, 12)), ({"max_generative": 5}, (4, 5)), ({"max_problems": 1}, (1, 1))):
        scores = chat_eval.evaluate(model_under_test(), [task], dataclasses.replace(config, **limits))
        assert scores["gsm8k"] == Score(*score, 0.0)


def test_lenient_score_is_beside_the_strict_one(monkeypatch: pytest.MonkeyPatch):
    answers = ["#### 18", "So it is $18.00.", "#### 19", "18 or 19", "#### 18.", "\\boxed{18}"]
    script_draws(monkeypatch, lambda request: [*answers[request.seed].encode(), END])
    row = qa_conversation("?", "#### 18")
    task = Task("gsm8k", "generative", 6, lambda i: row, match_final_number)
    config = ChatEvalConfig(max_tokens=40, seed=0, compile=False)
    scores = chat_eval.evaluate(model_under_test(), [task], config)
    assert scores["gsm8k"] == Score(1, 6, 0.0, 4) and scores["gsm8k"].accuracy == 1 / 6
    assert chat_eval.as_metrics(scores) == {"chat/GSM8K": 1 / 6, "chat/GSM8K-lenient": 4 / 6}
    task = dataclasses.replace(task, is_correct=lambda row, text: text == "#### 18")
    assert chat_eval.evaluate(model_under_test(), [task], config)["gsm8k"] == Score(1, 6, 0.0)


def test_max_generative_does_not_limit_multiple_choice():
    config = dataclasses.replace(SAMPLED, max_generative=2, max_problems=7)
    scores = chat_eval.evaluate(model_under_test(), [choice(9), generative(9)], config)
    assert {name: score.total for name, score in scores.items()} == {"mmlu": 7, "gsm8k": 2}


def test_answers_depend_only_on_the_seed_and_the_problem():
    def texts(indices: Any, config: ChatEvalConfig) -> list[str]:
        seen: list[str] = []
        task = generative(is_correct=lambda row, text: seen.append(text) or True)
        engine = chat_eval.start_engine(model_under_test(), config)
        chat_eval.sample_answers(engine, TOKENIZER, task, indices, config)
        return seen[1:]  # the first call tests whether answers can be checked

    want = texts(range(6), SAMPLED)
    assert len(set(want)) > 12
    assert texts([4, 5], SAMPLED) == want[12:]
    assert texts(range(6), dataclasses.replace(SAMPLED, slots=5)) == want
    assert texts(range(6), dataclasses.replace(SAMPLED, seed=43)) != want


def test_chat_core_is_the_mean_centered_accuracy():
    scores = {
        "arc_easy": Score(50, 100, 0.25),
        "arc_challenge": Score(25, 100, 0.25),
        "mmlu": Score(10, 100, 0.25),
        "gsm8k": Score(3, 10, 0.0),
        "humaneval": Score(0, 7, 0.0),
        "spellingbee": Score(9, 10, 0.0),
    }
    named = chat_eval.as_metrics(scores)
    assert named["chat/ARC-Easy"] == 0.5 and named["chat/SpellingBee"] == 0.9 and len(named) == 7
    assert named["chat/ChatCORE"] == pytest.approx((1 / 3 + 0 - 0.2 + 0.3 + 0) / 5)
    del scores["humaneval"]
    assert "chat/ChatCORE" not in chat_eval.as_metrics(scores)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (dataclasses.replace(generative(), kind="chat"), "gsm8k: is of kind chat"),
        (generative(is_correct=None), "gsm8k: cannot check answers"),
        (dataclasses.replace(choice(), size=0), "mmlu: has no rows"),
        (rows_of(letters=["B", "C"]), "mmlu row 0: the answer 'A' is not one of its letters"),
        (rows_of(**qa_conversation("which?", "Ä"), letters=["Ä", "B"]), "letter 'Ä'"),
        (generative(is_correct=chat_eval_ranks.refuse), "the sandbox cannot run here"),
    ],
    ids=lambda x: x.name if isinstance(x, Task) else x,
)
def test_error_names_the_reason_before_anything_is_generated(task: Task, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infer, "run", lambda *_: pytest.fail("an answer was generated"))
    with pytest.raises(UserError, match=message):
        chat_eval.evaluate(model_under_test(), [task], SAMPLED)


def test_several_greedy_samples_are_refused():
    with pytest.raises(UserError, match="samples=2: are all the same at temperature 0"):
        ChatEvalConfig(samples=2)


@pytest.mark.slow
def test_two_ranks_equal_one_and_fail_together():
    want = chat_eval_ranks.results()
    # The error of one rank is raised on both; the next task runs.
    failures = ["the sandbox cannot run here", "21 problems"]
    assert ranks.call(2, chat_eval_ranks.results_and_failures) == [(want, failures)] * 2
    letters, samples, scores = want
    assert 0 < sum(letters) < 40 and 0 < sum(map(sum, samples)) < 63
    assert scores["gsm8k"] == Score(sum(map(any, samples)), 21, 0.0)
