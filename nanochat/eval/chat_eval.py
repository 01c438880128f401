"""Accuracy on chat tasks: multiple choice by the logits of the letters, and generated answers that are checked.

All ranks make the same batches from all rows, and each computes its share of them. A batch has the same shape on any
rank, so results do not depend on the number of ranks, not even by rounding.

Shape suffixes: B batch, T time, C width, A distinct letters of a batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nanochat import distributed, infer
from nanochat.config import UserError
from nanochat.data import Conversation, Tokenizer, chat_format
from nanochat.eval.config import CHAT_CORE, TITLES, ChatEvalConfig
from nanochat.infer import Engine, Request
from nanochat.metrics import progress
from nanochat.model import CONTEXT_LIMIT, Compute, ModelConfig, Params, features, unembed
from nanochat.tasks import Task, letter_ids, plain_text

ANSWERS_PER_SLOT = 4  # of a batch: few slots run empty before its end, and ranks get even shares


class ModelUnderTest(NamedTuple):
    """A model to evaluate: full plain tensors, and the dtype to compute in."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype


class Score(NamedTuple):
    """The result of a task: number of problems solved, number of problems, accuracy of random guessing.

    `lenient` is the number solved by the task's lenient check; None if it has none. `shortened` is the number of
    questions longer than the model's context, which lose their beginning.
    """

    right: int
    total: int
    baseline: float
    lenient: int | None = None
    shortened: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def centered(self) -> float:
        """Accuracy above guessing: 0 at the baseline, 1 if all are correct."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def evaluate(
    model: ModelUnderTest, tasks: Sequence[Task], config: ChatEvalConfig = ChatEvalConfig()
) -> dict[str, Score]:
    """Return the score of each task by its name. Collective: the ranks share the work, and all get the scores."""
    engine = functools.cache(lambda: start_engine(model, config))
    return {task.name: score(model, task, config, engine) for task in tasks}


def start_engine(model: ModelUnderTest, config: ChatEvalConfig) -> Engine:
    """Return an engine that generates answers to prompts of up to the model's training context."""
    sequence_len = model.config.sequence_len
    return infer.start(
        model.params,
        model.config,
        model.tokenizer,
        slots=config.slots,
        context=min(CONTEXT_LIMIT * sequence_len, sequence_len + config.max_tokens),
        dtype=model.dtype,
        compile=model.params["wte"].device.type == "cuda" if config.compile is None else config.compile,
    )


def score(
    model: ModelUnderTest,
    task: Task,
    config: ChatEvalConfig,
    engine: Callable[[], Engine],
    *,
    show_progress: bool = False,
) -> Score:
    """Return the score of a task; `engine`: returns that of `start_engine`, and is called for generative tasks only."""
    if task.kind == "chat":
        raise UserError(f"{task.name}: is of kind chat and has no correct answers")
    limits = [task.size, config.max_problems, config.max_generative if task.kind == "generative" else None]
    indices = range(min(limit for limit in limits if limit is not None))
    if not indices:
        raise UserError(f"{task.name}: has no rows")
    with distributed.raise_on_any_failure():
        questions = (chat_format.prompt(model.tokenizer, task.row(i)["messages"][:-1]) for i in indices)
        shortened = sum(len(question) > model.config.sequence_len for question in questions)
    if task.kind == "multiple_choice":
        solved = score_multiple_choice(model, task, indices, config.batch_tokens, show_progress=show_progress)
        return Score(sum(solved), len(solved), task.baseline, shortened=shortened)
    grades = sample_answers(engine(), model.tokenizer, task, indices, config, grade, show_progress=show_progress)
    right, lenient = (sum(any(answer[column] for answer in answers) for answers in grades) for column in (0, 1))
    return Score(right, len(grades), task.baseline, lenient if task.is_correct_lenient else None, shortened)


def chat_core(scores: Mapping[str, Score]) -> float | None:
    """Return ChatCORE, the mean centered accuracy of its five tasks; None if one is missing."""
    if any(name not in scores for name in CHAT_CORE):
        return None
    return sum(scores[name].centered for name in CHAT_CORE) / len(CHAT_CORE)


def as_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """Return {"chat/GSM8K": accuracy, "chat/GSM8K-lenient": …}, with "chat/ChatCORE" if all of its tasks are there.

    "-shortened" is the fraction of questions that were too long for the model's context.
    """
    values = {f"chat/{TITLES.get(name, name)}": score.accuracy for name, score in scores.items()}
    for name, score in scores.items():
        if score.lenient is not None:
            values[f"chat/{TITLES.get(name, name)}-lenient"] = score.lenient / score.total
        if score.shortened:
            values[f"chat/{TITLES.get(name, name)}-shortened"] = score.shortened / score.total
    core = chat_core(scores)
    return values if core is None else values | {"chat/ChatCORE": core}


# Multiple choice

_Question = tuple[list[int], list[int], int]  # token ids: the prompt, its letters, the correct letter


@torch.no_grad()
def score_multiple_choice(
    model: ModelUnderTest,
    task: Task,
    indices: Sequence[int],
    batch_tokens: int = ChatEvalConfig.batch_tokens,
    *,
    show_progress: bool = False,
) -> list[bool]:
    """Return for each problem whether the correct letter is the most likely of its letters."""
    results, group = [], distributed.control_group()
    with distributed.raise_on_any_failure():
        ids = functools.cache(lambda letters: letter_ids(model.tokenizer, letters))
        questions = [_question(model, task, i, ids) for i in indices]
        batches = _make_batches([len(prompt) for prompt, *_ in questions], batch_tokens)
        own_batches = batches[group.rank :: group.size]
        with _progress_bar(task, sum(map(len, own_batches)), show_progress) as bar:
            for batch in own_batches:
                letters = _most_likely_letters(model, [questions[n] for n in batch])
                results += [[n, letter == questions[n][2]] for n, letter in zip(batch, letters)]
                bar.update(len(batch))
    return _gather(results)


def _question(model: ModelUnderTest, task: Task, index: int, ids: Callable[[tuple[str, ...]], list[int]]) -> _Question:
    row = task.row(index)
    letters, answer = tuple(row.get("letters", ())), row["messages"][-1]["content"]
    if answer not in letters:
        raise UserError(f"{task.name} row {index}: the answer {answer!r} is not one of its letters {list(letters)}")
    tokens = ids(letters)
    return _prompt(model.tokenizer, row, model.config), tokens, tokens[letters.index(answer)]


def _prompt(tokenizer: Tokenizer, row: Conversation, config: ModelConfig) -> list[int]:
    """Return the prompt for the reference answer, truncated to its last tokens if it exceeds the model's context."""
    return chat_format.prompt(tokenizer, row["messages"][:-1])[-config.sequence_len :]


def _make_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return all indices in batches of similar lengths, the longest first: if they fit into memory, so do the rest."""
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(n)
    return batches


def _most_likely_letters(model: ModelUnderTest, questions: Sequence[_Question]) -> list[int]:
    """Return the token of the most likely letter of each question, the first of equal ones."""
    params, config, compute = model.params, model.config, Compute(model.dtype)
    prompts, device = [torch.tensor(prompt) for prompt, *_ in questions], params["wte"].device
    tokens_BT = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    x_BTC = features(params, tokens_BT, config=config, compute=compute)
    # Only the logits of the letters at the last position of each prompt are needed.
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    x_BC = x_BTC[torch.arange(len(prompts), device=device), last_B]
    all_letters = sorted({token for _, letters, _ in questions for token in letters})
    logits_BA = unembed(x_BC, params["lm_head"][torch.tensor(all_letters, device=device)], config, compute)
    logits = [dict(zip(all_letters, row)) for row in logits_BA.tolist()]
    return [max(letters, key=by_token.__getitem__) for (_, letters, _), by_token in zip(questions, logits)]


# Generated answers


def sample_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    config: ChatEvalConfig,
    check: Callable[[Task, Conversation, str], Any] | None = None,
    *,
    show_progress: bool = False,
) -> list[list[Any]]:
    """Return for each problem whether each of its `config.samples` answers is correct; the engine must be idle.

    The seed of an answer depends on the index of the problem alone.

    Args:
        check: None: `is_correct`; with another, such as `grade`, the results are what it returns.
    """
    group, results, samples = distributed.control_group(), [], config.samples
    size = max(1, ANSWERS_PER_SLOT * engine.slots // samples)
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    own_batches = batches[group.rank :: group.size]
    total = samples * sum(map(len, own_batches))
    with distributed.raise_on_any_failure(), _progress_bar(task, total, show_progress, "answer") as bar:
        check = check or is_correct
        check(task, task.row(indices[0]), "")  # raises now, before anything is generated
        for batch in own_batches:
            rows = [task.row(index) for index in batch]
            requests = []
            for index, row in zip(batch, rows):
                prompt = tuple(_prompt(tokenizer, row, engine.config))
                for seed in range(config.seed + index * samples, config.seed + (index + 1) * samples):
                    requests.append(Request(prompt, config.max_tokens, config.temperature, config.top_k, seed))
            texts = []
            for completion in infer.complete(engine, requests):
                texts.append(answer_text(tokenizer, completion.tokens))
                bar.update(1)
            for n, (index, row) in enumerate(zip(batch, rows)):
                answers = texts[n * samples : (n + 1) * samples]
                results.append([index, [check(task, row, text) for text in answers]])
    return _gather(results)


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of an answer without tool calls and their results, which is what tasks check."""
    return plain_text(chat_format.content(tokenizer, ids))


def is_correct(task: Task, row: Conversation, text: str) -> bool:
    """Return whether the answer to a row is correct; raises UserError if the task cannot check answers."""
    if task.is_correct is None:
        raise UserError(f"{task.name}: cannot check answers")
    return task.is_correct(row, text)


def grade(task: Task, row: Conversation, text: str) -> list[bool]:
    """Return whether the answer to a row is correct, and whether it is by the task's lenient check, if it has one."""
    correct = is_correct(task, row, text)
    return [correct, task.is_correct_lenient(row, text) if task.is_correct_lenient else correct]


# Ranks


def _progress_bar(task: Task, total: int, show: bool, unit: str = "problem") -> progress.Bar:
    """Return a progress bar of this rank's share of a task; the other ranks' shares are similar."""
    label = TITLES.get(task.name, task.name)
    return progress.Bar(total, label=label, unit=unit, enabled=None if show else False)


def _gather(results: list[Any]) -> list[Any]:
    """Return the values of all ranks' [index, value], ordered by index."""
    gathered = [pair for part in distributed.all_gather_object(results) for pair in part]
    return [value for _, value in sorted(gathered)]
