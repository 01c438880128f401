"""Evaluation by tasks: multiple choice by the logits of its letters, and answers that are generated and checked.

    subject = chat_eval.Subject(bot.params, bot.config, bot.tokenizer, torch.bfloat16)
    scores = chat_eval.evaluate(subject, [tasks.load("arc_easy", "test")], ChatEvalConfig(max_problems=100))
    print(scores["arc_easy"].accuracy, chat_eval.chat_core(scores))

Rows are batched. Each rank makes up the same batches from all rows, and computes its share of them: a batch has the
same shapes on whatever rank, so a result does not depend on how many there are, not even by its rounding.

Letters in names: B batch, T time, C width, A letters of a batch.
Source: spec/evaluation.md, "Chat evaluation".
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from nanochat import distributed, infer, model
from nanochat.config import UserError
from nanochat.data import Conversation, Tokenizer, chat_format
from nanochat.distributed import ControlGroup
from nanochat.eval.config import CHAT_CORE, TITLES, ChatEvalConfig
from nanochat.infer import Engine, Request
from nanochat.metrics import progress
from nanochat.model import Compute, ModelConfig, Params
from nanochat.tasks import Task, letter_ids, plain_text

ROUNDS = 4  # answers of a batch to each slot: few slots are empty until the last of them, and ranks get even shares


class ModelUnderTest(NamedTuple):
    """Who is evaluated.

    Attributes:
        params: whole plain tensors. config: their shape. tokenizer: theirs. dtype: to compute in.
    """

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype


class Score(NamedTuple):
    """The result of a task.

    Attributes:
        right, total: problems. baseline: accuracy of guessing.
    """

    right: int
    total: int
    baseline: float

    @property
    def accuracy(self) -> float:
        """Share of the problems that were solved, 0 … 1."""
        return self.right / self.total

    @property
    def centered(self) -> float:
        """Accuracy above guessing, 1 at best: (accuracy − baseline) / (1 − baseline)."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def evaluate(
    subject: ModelUnderTest,
    tasks: Sequence[Task],
    how: ChatEvalConfig = ChatEvalConfig(),
    line: ControlGroup = ControlGroup(),
) -> dict[str, Score]:
    """Return the score of each task by its name, the same on all ranks.

    Args:
        subject: on every rank. tasks: of choice or generative. how: the limits.
        line: the ranks that share the work.

    Raises:
        UserError: a row is bad, or an answer cannot be checked here.
    """
    decoder = functools.cache(lambda: start(subject, how))
    return {task.name: score(subject, task, how, decoder, line) for task in tasks}


def start(subject: ModelUnderTest, how: ChatEvalConfig) -> Engine:
    """Return the engine that generates answers; it takes prompts of the model's whole context."""
    limit = model.CONTEXT_LIMIT * subject.config.sequence_len
    compile = subject.params["wte"].device.type == "cuda" if how.compile is None else how.compile
    return infer.start(
        subject.params,
        subject.config,
        subject.tokenizer,
        slots=how.slots,
        context=min(limit, subject.config.sequence_len + how.max_tokens),
        dtype=subject.dtype,
        compile=compile,
    )


def score(
    subject: ModelUnderTest,
    task: Task,
    how: ChatEvalConfig,
    decoder: Callable[[], Engine],
    line: ControlGroup = ControlGroup(),
    *,
    show: bool = False,
) -> Score:
    """Return the score of one task; the other arguments as for `evaluate`.

    Args:
        decoder: gives the engine, which a task of multiple choice does not need. show: the progress, on rank 0.

    Raises:
        UserError: as for `evaluate`; or the task cannot be scored.
    """
    if task.kind not in ("multiple_choice", "generative"):
        raise UserError(f"{task.name}: is of kind {task.kind}, whose answers are neither right nor wrong")
    limits = [task.size, how.max_problems, how.max_generative if task.kind == "generative" else None]
    indices = range(min(limit for limit in limits if limit is not None))
    if not indices:
        raise UserError(f"{task.name}: has no rows")
    if task.kind == "multiple_choice":
        solved = score_multiple_choice(subject, task, indices, how.batch_tokens, line, show=show)
    else:
        found = sample_answers(decoder(), subject.tokenizer, task, indices, how, line, show=show)
        solved = [any(row) for row in found]
    return Score(sum(solved), len(solved), task.baseline)


def chat_core(scores: Mapping[str, Score]) -> float | None:
    """Return the mean centered accuracy of the five tasks of ChatCORE; None where one is missing."""
    if any(name not in scores for name in CHAT_CORE):
        return None
    return sum(scores[name].centered for name in CHAT_CORE) / len(CHAT_CORE)


def as_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return {"chat/GSM8K": accuracy, …}, with "chat/ChatCORE" where all of its tasks are there."""
    found = {f"chat/{TITLES.get(name, name)}": score.accuracy for name, score in scores.items()}
    core = chat_core(scores)
    return found if core is None else found | {"chat/ChatCORE": core}


class _Question(NamedTuple):
    """A row of multiple choice: its prompt, the ids of its letters, and which of them is right."""

    prompt: list[int]
    letters: list[int]
    answer: int


@torch.no_grad()
def score_multiple_choice(
    subject: ModelUnderTest,
    task: Task,
    indices: Sequence[int],
    batch_tokens: int = ChatEvalConfig.batch_tokens,
    line: ControlGroup = ControlGroup(),
    *,
    show: bool = False,
) -> list[bool]:
    """Return for each problem of multiple choice whether the right letter is the most likely of its letters.

    Args:
        batch_tokens: of a batch, with its padding. Others as for `score`.

    Raises:
        UserError: a row is not of multiple choice, or a letter is no single token.
    """
    found = []
    with distributed.raise_on_any_failure(line):
        ids = functools.cache(lambda letters: letter_ids(subject.tokenizer, letters))
        questions = [_question(subject, task, i, ids) for i in indices]
        mine = _batches([len(question.prompt) for question in questions], batch_tokens)[line.rank :: line.size]
        with _bar(task, sum(map(len, mine)), show) as bar:
            for batch in mine:
                chosen = _chosen(subject, [questions[n] for n in batch])
                found += [[n, letter == questions[n].answer] for n, letter in zip(batch, chosen)]
                bar.update(len(batch))
    return _gathered(line, found)


def _question(
    subject: ModelUnderTest, task: Task, index: int, ids: Callable[[tuple[str, ...]], list[int]]
) -> _Question:
    row = task.row(index)
    letters, answer = tuple(row.get("letters", ())), row["messages"][-1]["content"]
    if answer not in letters:
        raise UserError(f"{task.name} row {index}: the answer {answer!r} is none of its letters {list(letters)}")
    return _Question(_prompt(subject.tokenizer, row, subject.config), ids(letters), letters.index(answer))


def _prompt(tokenizer: Tokenizer, row: Conversation, config: ModelConfig) -> list[int]:
    """Return what the reference answer follows; where that is longer than the model's context, its last tokens."""
    return chat_format.prompt(tokenizer, row["messages"][:-1])[-config.sequence_len :]


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return all indices in batches of similar lengths, the padding of which counts as tokens too."""
    batches: list[list[int]] = []
    # The longest come first: when they fit into memory, so does the rest.
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(n)
    return batches


def _chosen(subject: ModelUnderTest, questions: Sequence[_Question]) -> list[int]:
    """Return which of its letters is the most likely in each row, the first where two are."""
    params, config, compute = subject.params, subject.config, Compute(subject.dtype)
    width, device = max(len(question.prompt) for question in questions), params["wte"].device
    padded = [[*question.prompt, *[0] * (width - len(question.prompt))] for question in questions]
    x_BTC = model.features(params, torch.tensor(padded, device=device), config=config, compute=compute)
    last_B = torch.tensor([len(question.prompt) - 1 for question in questions], device=device)
    letters = sorted({token for question in questions for token in question.letters})
    # Only these positions are read, and of the vocabulary only these rows.
    x_BC = x_BTC[torch.arange(len(questions), device=device), last_B]
    logits_BA = model.unembed(x_BC, params["lm_head"][torch.tensor(letters, device=device)], config, compute)
    logits = [dict(zip(letters, row)) for row in logits_BA.tolist()]
    return [
        max(range(len(question.letters)), key=lambda n, q=question, row=row: row[q.letters[n]])
        for question, row in zip(questions, logits)
    ]


def sample_answers(
    decoder: Engine,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    how: ChatEvalConfig,
    line: ControlGroup = ControlGroup(),
    *,
    show: bool = False,
) -> list[list[bool]]:
    """Return for each problem whether each of its `how.samples` answers is right.

    Args:
        decoder: without a request. how: the sampling. Others as for `score`.

    Raises:
        UserError: as for `evaluate`.
    """
    each = max(1, ROUNDS * decoder.slots // how.samples)
    batches = [list(indices[start : start + each]) for start in range(0, len(indices), each)]
    mine, found = list(enumerate(batches))[line.rank :: line.size], []
    total = how.samples * sum(len(batch) for _, batch in mine)
    with distributed.raise_on_any_failure(line), _bar(task, total, show, "answer") as bar:
        is_correct(task, task.row(indices[0]), "")  # what cannot be judged here is said before answers are made
        for number, batch in mine:
            rows = [task.row(index) for index in batch]
            texts = _answers(decoder, tokenizer, batch, rows, how, bar)
            for n, row in enumerate(rows):
                found.append([number * each + n, [is_correct(task, row, text) for text in texts[n]]])
    return _gathered(line, found)


def _answers(
    decoder: Engine,
    tokenizer: Tokenizer,
    indices: Sequence[int],
    rows: Sequence[Conversation],
    how: ChatEvalConfig,
    bar: progress.Bar,
) -> list[list[str]]:
    """Return the texts of `how.samples` answers to each row; the seed of one depends on the row's index alone."""
    requests = []
    for index, row in zip(indices, rows):
        prompt = tuple(_prompt(tokenizer, row, decoder.config))
        for seed in range(how.seed + index * how.samples, how.seed + (index + 1) * how.samples):
            requests.append(Request(prompt, how.max_tokens, how.temperature, how.top_k, seed))
    tokens: list[list[int]] = [[] for _ in requests]
    for event in infer.run(decoder, requests):
        tokens[cast(int, event.key)].append(event.token)
        if event.finish:
            bar.update(1)
    texts = [answer_text(tokenizer, ids) for ids in tokens]
    return [texts[n : n + how.samples] for n in range(0, len(texts), how.samples)]


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return what an answer's tokens say, without tool calls and their results: what a task judges."""
    return plain_text(chat_format.content(tokenizer, ids))


def is_correct(task: Task, row: Conversation, text: str) -> bool:
    """Return whether a task accepts an answer to one of its rows. Raises: UserError."""
    if task.is_correct is None:
        raise UserError(f"{task.name}: has nothing to judge an answer by")
    return task.is_correct(row, text)


def _bar(task: Task, total: int, show: bool, unit: str = "problem") -> progress.Bar:
    """Return the progress of this rank's share of a task, which the others' is like."""
    label = TITLES.get(task.name, task.name)
    return progress.bar(total, label=label, unit=unit, enabled=None if show else False)


def _gathered(line: ControlGroup, found: list[Any]) -> list[Any]:
    """Return the values of all ranks' [place, value], ordered by place."""
    return [value for _, value in sorted(pair for part in distributed.all_gather_object(line, found) for pair in part)]
