"""What the ranks of test_chat_eval.py run: tasks evaluated together; and the tasks themselves."""

import random
from typing import Any

import torch
from small_model import random_params

from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.eval import ChatEvalConfig, ModelUnderTest, Score, chat_eval
from nanochat.model import ModelConfig
from nanochat.tasks import Task, multiple_choice_prompt, qa_conversation

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
CONFIG = ModelConfig(sequence_len=192, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
SAMPLED = ChatEvalConfig(samples=3, temperature=1.0, max_tokens=12, slots=2, compile=False)


def model_under_test() -> ModelUnderTest:
    return ModelUnderTest(random_params(CONFIG), CONFIG, TOKENIZER, torch.float32)


def choice(size: int = 40) -> Task:
    """Return a task of questions of random words, with three to five choices."""

    def row(index: int) -> dict[str, Any]:
        rng = random.Random(index)
        letters = list("ABCDE")[: rng.randint(3, 5)]
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in letters]
        question = multiple_choice_prompt(" ".join(rng.choices(words, k=rng.randint(1, 20))), letters, words)
        return {**qa_conversation(question, rng.choice(letters)), "letters": letters}

    return Task("mmlu", "multiple_choice", size, row, None, 0.25)


def even(row: Any, text: str) -> bool:
    """Accept half of what a random model says."""
    return sum(text.encode()) % 2 == 0


def refuse(row: Any, text: str) -> bool:
    raise UserError("the sandbox cannot run here")


def generative(size: int = 21, is_correct: Any = even) -> Task:
    def row(index: int) -> Any:
        return qa_conversation(f"question {'?' * (index % 5)}{index}", "#### 1")

    return Task("gsm8k", "generative", size, row, is_correct)


def results() -> tuple[list[bool], list[list[bool]], dict[str, Score]]:
    """Return the results of each problem, and the scores."""
    model = model_under_test()
    letters = chat_eval.score_multiple_choice(model, choice(), range(40), 512)
    engine = chat_eval.start_engine(model, SAMPLED)
    samples = chat_eval.sample_answers(engine, TOKENIZER, generative(), range(21), SAMPLED)
    return letters, samples, chat_eval.evaluate(model, [choice(), generative()], SAMPLED)


def results_and_failures() -> tuple[Any, list[str]]:
    """Return the results of this rank, and what becomes of a task that rank 1 cannot check, and of the next."""
    failures = []
    with distributed.distributed_context("cpu") as here:
        for is_correct in (refuse if here.rank == 1 else even, even):
            try:
                score = chat_eval.evaluate(model_under_test(), [generative(21, is_correct)], SAMPLED)["gsm8k"]
                failures.append(f"{score.total} problems")
            except UserError as error:
                failures.append(str(error))
        return results(), failures
