"""The CORE metric: how often a base model finds the likeliest of given answers right, over the tasks of a bundle.

A row becomes prompts: solved rows, its question, and one of the answers, or the continuation that is to be found
token by token. `likelihood` scores them.
Source: DCLM (arXiv 2406.11794); nanochat's core_eval.
"""

import csv
import dataclasses
import io
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nanochat import distributed
from nanochat.config import UserError
from nanochat.data import PATTERN, Tokenizer
from nanochat.eval import core_bundle, likelihood
from nanochat.eval.core_bundle import OPTIONS, Bundle, CoreTask, Row
from nanochat.eval.likelihood import Prompt, Scored, common_prefix_length
from nanochat.model import CONTEXT_LIMIT, Compute, ModelConfig, ParamsLike

FEW_SHOT_SEED = 1234  # of row 0; each row has the next


class Question(NamedTuple):
    """A row as the model is given it.

    Attributes:
        prompts: with each answer, <|bos|> first; one alone where it is the continuation that is to be found.
        gold: index of the right prompt; None for a continuation.
    """

    prompts: list[Prompt]
    gold: int | None


class Answer(NamedTuple):
    """What the model made of a row.

    Attributes:
        right: whether it is the right one. choice: index of the prompt with the lowest loss. losses: mean of each
            prompt over its span, in nats a token; nan for an empty span.
    """

    right: bool
    choice: int
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's score.

    Attributes:
        label: of the task. rows, right: how many there were, and were answered right. accuracy: their ratio.
        centered: the accuracy above guessing, 0 for guessing and 1 for all right. seconds: that it took.
        answers: in the order of the rows; empty where the result was read from a file.
    """

    label: str
    rows: int
    right: int
    accuracy: float
    centered: float
    seconds: float
    answers: tuple[Answer, ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass(frozen=True)
class Results:
    """The scores of a bundle.

    Attributes:
        tasks: label -> result, in the order of the bundle. failed: label -> why there is none.
        core: mean of the centered accuracies; None where a task is missing.
    """

    tasks: Mapping[str, TaskResult]
    failed: Mapping[str, str]
    core: float | None


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
    """Return a model's scores on the tasks of a bundle. All ranks of a job call this, and all get the scores.

    Args:
        params: as from `model.init`, whole or (with `compute.gather`) this rank's parts.
        max_per_task: rows of each task, after the shuffle; None: all.
        max_tokens: of a prompt, of which the last are kept; None: as many as the model takes.
        tokens_per_batch: as for `likelihood.score`.
        done: results of an earlier, unfinished call, for tasks that are not to be evaluated again.
        on_task: called after each task with its label and its result, or the reason why there is none.

    Raises:
        UserError: a setting is out of range. A fault of a single task is in the results instead.
    """
    limit = CONTEXT_LIMIT * config.sequence_len
    max_tokens = max_tokens or limit
    if not 2 <= max_tokens <= limit:
        raise UserError(f"max_tokens={max_tokens}: expected 2 … {limit}, the limit of the model")
    for name, value in {"max_per_task": max_per_task, "tokens_per_batch": tokens_per_batch}.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: expected at least 1")
    tasks, failed = dict(done or {}), {}
    line = distributed.create_group()
    for label in bundle.entries:
        if label in tasks:
            continue
        start = time.perf_counter()
        try:
            with distributed.raise_on_any_failure(line):
                task = core_bundle.load(bundle, label, max_per_task)
                asked = list(questions(task, tokenizer, max_tokens))
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[label] = str(error)
            on_task(label, failed[label])
            continue
        scored = likelihood.score(
            params, config, [question.prompts for question in asked], padding=tokenizer.bos,
            tokens_per_batch=tokens_per_batch, compute=compute, rank=line.rank, world_size=line.size,
        )  # fmt: skip
        found = [answer(question, scores) for question, scores in zip(asked, scored)]
        tasks[label] = result(task, found, time.perf_counter() - start)
        on_task(label, tasks[label])
    distributed.destroy_group(line)
    ordered = {label: tasks[label] for label in bundle.entries if label in tasks}
    scores = [task.centered for task in ordered.values()]
    return Results(ordered, failed, None if failed else sum(scores) / len(scores))


def answer(question: Question, scored: Sequence[Scored]) -> Answer:
    """Return what was answered, from the scores of the prompts."""
    losses = [nats / tokens if tokens else math.nan for nats, _, tokens in scored]
    choice = losses.index(min(losses))  # of equal ones the first; min passes over a nan that is not the first
    right = scored[0].hits == scored[0].tokens if question.gold is None else choice == question.gold
    return Answer(right, choice, tuple(losses))


def result(task: CoreTask, found: Sequence[Answer], seconds: float) -> TaskResult:
    """Return the score of a task from the answers to its rows."""
    right = sum(answer.right for answer in found)
    accuracy = right / len(found)
    centered = (accuracy - task.baseline) / (1 - task.baseline)
    return TaskResult(task.label, len(found), right, accuracy, centered, seconds, tuple(found))


def table(results: Results) -> str:
    """Return the scores as CSV: Task, Accuracy, Centered; CORE in the last line, if no task is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Task", "Accuracy", "Centered"])
    for task in results.tasks.values():
        writer.writerow([task.label, f"{task.accuracy:.6f}", f"{task.centered:.6f}"])
    if results.core is not None:
        writer.writerow(["CORE", "", f"{results.core:.6f}"])
    return text.getvalue()


# From rows to prompts


def few_shot(index: int, num_rows: int, count: int) -> list[int]:
    """Return the indices of the solved rows that stand before a row, in their order."""
    others = [i for i in range(num_rows) if i != index]
    return random.Random(FEW_SHOT_SEED + index).sample(others, count)


def questions(task: CoreTask, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Question]:
    """Yield the rows of a task as prompts, each of which keeps its last `max_tokens` tokens.

    Raises:
        UserError: a continuation changes the tokens of the text before it, or adds none (with file and line).
    """
    ends = [_ends(task, row) for row in task.rows]
    continues = OPTIONS[task.kind] is None
    solved = [f"{texts[1 if continues else row.fields['gold']]}\n\n" for texts, row in zip(ends, task.rows)]
    encode = _encoder(tokenizer, ends, solved)
    for index, (row, texts) in enumerate(zip(task.rows, ends)):
        before = few_shot(index, len(task.rows), task.num_fewshot)
        prompts = [[tokenizer.bos, *encode(before, text, continues and text is texts[0])] for text in texts]
        question = _question(task, row, prompts)
        yield Question([cropped(prompt, max_tokens) for prompt in question.prompts], question.gold)


def _ends(task: CoreTask, row: Row) -> list[str]:
    """Return what can stand at the end of a row's prompts; or the end without, and with, the continuation."""
    fields = row.fields
    if task.kind == "multiple_choice":
        return [f"{fields['query']}{task.delimiter}{choice}" for choice in fields["choices"]]
    if task.kind == "schema":
        return [f"{context}{task.delimiter}{fields['continuation']}" for context in fields["context_options"]]
    text = f"{fields['context'].strip()}{task.delimiter}"
    return [text, f"{text}{fields['continuation']}"]


def _encoder(
    tokenizer: Tokenizer, ends: Sequence[Sequence[str]], solved: Sequence[str]
) -> Callable[[Sequence[int], str, bool], list[int]]:
    """Return a function (indices of solved rows, the end behind them, whether to strip the whole) -> tokens.

    No token crosses the border between line breaks and what is no space, in the usual pattern: then each solved row is
    encoded once, where it would be many times.
    """

    def at_once(before: Sequence[int], end: str, strip: bool) -> list[int]:
        text = "".join(solved[i] for i in before) + end
        return tokenizer.encode(text.strip() if strip else text)

    starts = [text[:1] for texts in ends for text in texts]
    if tokenizer.pattern != PATTERN or any(start == "" or start.isspace() for start in starts):
        return at_once
    pieces = tokenizer.encode_batch(solved)

    def by_pieces(before: Sequence[int], end: str, strip: bool) -> list[int]:
        return [token for i in before for token in pieces[i]] + tokenizer.encode(end.rstrip() if strip else end)

    return by_pieces


def _question(task: CoreTask, row: Row, prompts: list[list[int]]) -> Question:
    if task.kind == "multiple_choice":
        start = common_prefix_length(prompts)
        return Question([Prompt(ids, start, len(ids)) for ids in prompts], row.fields["gold"])
    if task.kind == "schema":
        length = common_prefix_length([ids[::-1] for ids in prompts])
        return Question([Prompt(ids, len(ids) - length, len(ids)) for ids in prompts], row.fields["gold"])
    without, whole = prompts
    if len(without) >= len(whole) or whole[: len(without)] != without:
        raise UserError(
            f"{task.path}:{row.line}: the tokens of the text before the continuation are not the beginning of those "
            "with it; the row needs a space between, or another continuation_delimiter"
        )
    return Question([Prompt(whole, len(without), len(whole))], None)


def cropped(prompt: Prompt, max_tokens: int) -> Prompt:
    """Return the prompt's last tokens; of an answer that is cut, what has a token before it stays."""
    lost = max(len(prompt.ids) - max_tokens, 0)
    return Prompt(prompt.ids[lost:], max(prompt.start - lost, 1), max(prompt.end - lost, 1))
