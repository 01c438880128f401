"""The CORE metric: accuracy of a base model over the in-context tasks of an eval bundle.

A row becomes prompts of few-shot examples, its question, and one of its options; or, for a language-modeling task, a
single prompt with the continuation. `likelihood` scores the prompts.
Source: DCLM (arXiv 2406.11794); nanochat's core_eval.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import PATTERN, Tokenizer
from nanochat.eval import core_bundle, likelihood
from nanochat.eval.core_bundle import Bundle, CoreTask, Row
from nanochat.eval.likelihood import Prompt, Scored, common_prefix_length
from nanochat.eval.results import csv_text
from nanochat.model import CONTEXT_LIMIT, Compute, ModelConfig, ParamsLike

FEW_SHOT_SEED = 1234  # of row 0; row i has FEW_SHOT_SEED + i


class Question(NamedTuple):
    """A row as prompts: one for each option, gold being the index of the correct one; or one, and gold is None."""

    prompts: list[Prompt]
    gold: int | None
    shortened: bool = False  # lost its beginning


class Answer(NamedTuple):
    is_correct: bool
    choice: int  # index of the prompt with the lowest loss
    losses: tuple[float, ...]  # of each prompt's answer, nats a token; nan for an answer without tokens


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's score; `answers` is empty if the result was read from a file."""

    label: str
    rows: int
    right: int
    accuracy: float
    centered: float  # accuracy above random guessing: 0 at the baseline, 1 if all are correct
    seconds: float
    shortened: int = 0  # rows that were longer than max_tokens
    answers: tuple[Answer, ...] = ()


@dataclasses.dataclass(frozen=True)
class Results:
    """The scores of a bundle's tasks by label, in its order, and the reasons of those that failed."""

    tasks: Mapping[str, TaskResult]
    failed: Mapping[str, str]
    core: float | None  # mean of the centered accuracies; None if a task failed


def evaluate(
    params: ParamsLike,
    config: ModelConfig,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    max_per_task: int | None = None,
    max_tokens: int | None = None,
    tokens_per_batch: int | None = None,
    compute: Compute = Compute(),
    done: Mapping[str, TaskResult] | None = None,
    on_task: Callable[[str, TaskResult | str], None] = lambda *_: None,
) -> Results:
    """Return a model's scores on the tasks of a bundle. Collective: all ranks get the same scores.

    Args:
        params: full or (with `compute.all_gather`) this rank's shards.
        max_per_task: rows of each task, after the shuffle; None: all.
        max_tokens: longer prompts keep their last tokens; None: what the model supports.
        tokens_per_batch: as for `likelihood.score`.
        done: results of an earlier, unfinished call; these tasks are skipped.
        on_task: called after each task with its label and its result, or the reason why it failed.
    """
    limit = CONTEXT_LIMIT * config.sequence_len
    max_tokens = max_tokens or limit
    if not 2 <= max_tokens <= limit:
        raise UserError(f"max_tokens={max_tokens}: expected 2 … {limit}, the limit of the model")
    tasks, failed = dict(done or {}), {}
    for label in [label for label in bundle.entries if label not in tasks]:
        start = time.perf_counter()
        try:
            with distributed.raise_on_any_failure():
                task = core_bundle.load(bundle, label, max_per_task)
                rows = list(questions(task, tokenizer, max_tokens))
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[label] = str(error)
            on_task(label, failed[label])
            continue
        scored = likelihood.score(
            params, config, [q.prompts for q in rows], tokens_per_batch=tokens_per_batch, compute=compute
        )
        answers = [answer(question, scores) for question, scores in zip(rows, scored)]
        right = sum(answer.is_correct for answer in answers)
        accuracy, seconds = right / len(answers), time.perf_counter() - start
        centered = (accuracy - task.baseline) / (1 - task.baseline)
        shortened = sum(question.shortened for question in rows)
        tasks[label] = TaskResult(label, len(answers), right, accuracy, centered, seconds, shortened, tuple(answers))
        on_task(label, tasks[label])
    ordered = {label: tasks[label] for label in bundle.entries if label in tasks}
    scores = [task.centered for task in ordered.values()]
    return Results(ordered, failed, None if failed else sum(scores) / len(scores))


# From rows to prompts


def questions(task: CoreTask, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Question]:
    """Yield the rows of a task as prompts, each truncated to its last `max_tokens` tokens."""
    texts = [_option_texts(task, row) for row in task.rows]
    cloze = task.kind == "language_modeling"
    examples = [f"{options[1 if cloze else row.fields['gold']]}\n\n" for options, row in zip(texts, task.rows)]
    # In the usual pattern, no token crosses from line breaks to a character that is not a space. Then each example is
    # encoded once instead of many times.
    starts = [text[:1] for options in texts for text in options]
    separable = tokenizer.pattern == PATTERN and all(start and not start.isspace() for start in starts)
    encoded = tokenizer.encode_batch(examples) if separable else []

    def encode(shots: Sequence[int], text: str, strip: bool) -> list[int]:
        if separable:
            return [token for i in shots for token in encoded[i]] + tokenizer.encode(text.rstrip() if strip else text)
        text = "".join(examples[i] for i in shots) + text
        return tokenizer.encode(text.strip() if strip else text)

    for index, (row, options) in enumerate(zip(task.rows, texts)):
        shots = few_shot_indices(index, len(task.rows), task.num_fewshot)
        ids = [[tokenizer.bos, *encode(shots, text, cloze and text is options[0])] for text in options]
        prompts, gold, _ = _question(task, row, ids)
        shortened = any(len(prompt.ids) > max_tokens for prompt in prompts)
        yield Question([truncate(prompt, max_tokens) for prompt in prompts], gold, shortened)


def few_shot_indices(index: int, num_rows: int, count: int) -> list[int]:
    """Return the indices of the few-shot examples before a row, in order."""
    others = [i for i in range(num_rows) if i != index]
    return random.Random(FEW_SHOT_SEED + index).sample(others, count)


def _option_texts(task: CoreTask, row: Row) -> list[str]:
    """Return the text of the row with each option; for language modeling, without and with the continuation."""
    fields = row.fields
    if task.kind == "multiple_choice":
        return [f"{fields['query']}{task.delimiter}{choice}" for choice in fields["choices"]]
    if task.kind == "schema":
        return [f"{context}{task.delimiter}{fields['continuation']}" for context in fields["context_options"]]
    text = f"{fields['context'].strip()}{task.delimiter}"
    return [text, f"{text}{fields['continuation']}"]


def _question(task: CoreTask, row: Row, ids: list[list[int]]) -> Question:
    if task.kind == "multiple_choice":
        start = common_prefix_length(ids)
        return Question([Prompt(option, start, len(option)) for option in ids], row.fields["gold"])
    if task.kind == "schema":
        length = common_prefix_length([option[::-1] for option in ids])
        return Question([Prompt(option, len(option) - length, len(option)) for option in ids], row.fields["gold"])
    context, full = ids
    if len(context) >= len(full) or full[: len(context)] != context:
        raise UserError(
            f"{task.path}:{row.line}: the tokens of the context are not a prefix of those with the continuation: put a "
            "space between them, or change continuation_delimiter"
        )
    return Question([Prompt(full, len(context), len(full))], None)


def truncate(prompt: Prompt, max_tokens: int) -> Prompt:
    """Return the prompt's last tokens; of a truncated answer, the tokens that still have a token before them."""
    lost = max(len(prompt.ids) - max_tokens, 0)
    return Prompt(prompt.ids[lost:], max(prompt.start - lost, 1), max(prompt.end - lost, 1))


# From losses to scores


def answer(question: Question, scored: Sequence[Scored]) -> Answer:
    """Return the answer that the losses of a row's prompts imply."""
    losses = [nats / tokens if tokens else math.nan for nats, _, tokens in scored]
    choice = losses.index(min(losses))  # the first of equal ones; min skips a nan that is not the first
    greedy = scored[0].n_correct_greedy == scored[0].n_tokens
    return Answer(greedy if question.gold is None else choice == question.gold, choice, tuple(losses))


def to_csv(results: Results) -> str:
    """Return the scores as CSV: Task, Accuracy, Centered, and a last line CORE unless a task failed."""
    rows = [(task.label, task.accuracy, task.centered) for task in results.tasks.values()]
    mean = [] if results.core is None else [("CORE", "", results.core)]
    return csv_text([("Task", "Accuracy", "Centered"), *rows, *mean])
