"""Reinforcement learning from rewards: sample answers, reward them, and make them more or less likely.

On policy: each step samples from the parameters that it updates. There is no reference model, no clipping and no value
network. An answer's advantage is its reward minus the mean reward of all answers to the same prompt, and

    loss = mean over prompts of  −Σ advantage · log p(token) / N

where the sum is over the N tokens that the model sampled for the prompt; prompt and tool-output tokens have weight 0.
It is `loss.next_token` with a weight for each token.

Source: REINFORCE (Williams, 1992) with the group's mean as its baseline, as in GRPO (arXiv 2402.03300) without the
division by the deviation (arXiv 2503.20783).
"""

import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat import distributed, infer
from nanochat.config import UserError
from nanochat.data import Conversation, Tokenizer, chat_format
from nanochat.distributed import sharding
from nanochat.eval import ChatEvalConfig, chat_eval
from nanochat.infer import Engine, Request
from nanochat.model import IGNORE, Params
from nanochat.optim import Hparams
from nanochat.tasks import Task
from nanochat.train.config import RolloutConfig
from nanochat.train.step import Metrics, TrainState

Reward = Callable[[Conversation, str], float]  # (row of the task, answer as plain text) -> reward
MAX_K = 8  # of pass@k


class Rollout(NamedTuple):
    """An answer and its reward."""

    prompt: tuple[int, ...]
    tokens: list[int]
    sampled: list[bool]  # which tokens the model drew, not a tool
    finish: str  # "stop" or "length"
    text: str  # of the answer, as the reward sees it
    reward: float


def correct_reward(task: Task) -> Reward:
    """Return the reward that is 1 for a correct answer, else 0."""
    if task.kind != "generative" or task.is_correct is None:
        raise UserError(f"task {task.name}: cannot score answers; use a generative task such as gsm8k or arithmetic")
    return lambda row, text: float(chat_eval.is_correct(task, row, text))


def prompt_batches(
    task: Task, tok: Tokenizer, sequence_len: int, prompts_per_step: int, state: Mapping[str, Any] | None = None
) -> Generator[tuple[dict[str, Any], dict[str, Any], dict[str, float]], None, None]:
    """Yield ({"numbers": of a step's prompts}, the state after it, statistics) without end, as `train.fit` reads.

    Number n stands for row n mod size of the task. Prompts longer than `sequence_len` are counted: see `rollouts`.
    """
    for numbers, position in row_numbers(task.name, task.size, prompts_per_step, state):
        read, n = position["read"], position.get("shortened", 0)
        rows = [task.row(number % task.size) for number in numbers]
        n += sum(len(chat_format.prompt(tok, row["messages"][:-1])) > sequence_len for row in rows)
        if n:
            what = f"{n:,} of {read:,} prompts ({n / read:.1%}) shortened: longer than {sequence_len} tokens"
            keep = "a base model with a longer model.sequence_len keeps them"
            position |= {"shortened": n, "skipped": [f"{what}; {keep}"]}
        yield {"numbers": numbers}, {"position": dict(position)}, {"epoch": read / task.size}


def row_numbers(
    name: str, size: int, per_step: int, state: Mapping[str, Any] | None
) -> Generator[tuple[list[int], dict[str, Any]], None, None]:
    """Yield (the numbers of a step's rows, the position after it) without end, from where `state` is."""
    position = dict(state["position"]) if state else {"read": 0, "task": name, "size": size}
    if (position["task"], position["size"]) != (name, size):
        raise UserError(
            f"cannot resume with {size} rows of {name}: the run has {position['size']} of {position['task']}"
        )
    while True:
        read = position["read"]
        position["read"] = read + per_step
        yield list(range(read, read + per_step)), position


def seed_of(seed: int, number: int, sample: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {number} {sample}".encode(), digest_size=7).digest(), "big")


def rollouts(
    engine: Engine,
    tok: Tokenizer,
    task: Task,
    reward: Reward,
    numbers: Sequence[int],
    *,
    config: RolloutConfig,
    seed: int,
) -> list[list[Rollout]]:
    """Return the answers to each of the prompts; they depend on their numbers and the seed alone.

    (Up to rounding: the shapes of the engine's matmuls follow its load.)
    """
    rows = [task.row(number % task.size) for number in numbers]
    limit = engine.config.sequence_len
    prompts = [tuple(chat_format.prompt(tok, row["messages"][:-1])[-limit:]) for row in rows]
    requests = [
        Request(prompt, config.max_tokens, config.temperature, config.top_k, seed_of(seed, number, sample))
        for number, prompt in zip(numbers, prompts)
        for sample in range(config.samples_per_prompt)
    ]
    answers = []
    for i, completion in enumerate(infer.complete(engine, requests)):
        text = chat_eval.answer_text(tok, completion.tokens)
        row = rows[i // config.samples_per_prompt]
        answers.append(Rollout(requests[i].prompt, *completion, text, float(reward(row, text))))
    return [answers[i : i + config.samples_per_prompt] for i in range(0, len(answers), config.samples_per_prompt)]


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return the rewards of the answers to one prompt minus their mean."""
    if min(rewards) == max(rewards):  # a rounded mean would leave a gradient
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


class Row(NamedTuple):
    """A training sequence: its ids and the weight of each in the loss, 0 if it was not sampled."""

    ids: list[int]
    weights: list[float]


def weighted(group: Sequence[Rollout]) -> list[Row]:
    """Return the rows of the answers to one prompt; the weight of a sampled token is advantage / N.

    An answer with advantage 0 has no gradient and no row: a prompt that is always or never solved costs nothing.
    """
    count = sum(sum(answer.sampled) for answer in group)
    rows = []
    for answer, advantage in zip(group, advantages([answer.reward for answer in group])):
        if advantage:
            weights = [0.0] * len(answer.prompt) + [advantage / count * drawn for drawn in answer.sampled]
            rows.append(Row([*answer.prompt, *answer.tokens], weights))
    return rows


def micro_batches(
    rows: Sequence[Row], n_batches: int, batch_rows: int, scale: float, pad_tokens: int | None, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the rows, sorted by length, as micro-batches for `loss.next_token`.

    Args:
        rows: at most n_batches · batch_rows; padding fills up the rest. scale: factor on all weights.
        pad_tokens: sequence lengths are this number times a power of two, so that few shapes are compiled; None: the
            longest row's.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    ordered += [Row([0, 0], [0.0, 0.0])] * (n_batches * batch_rows - len(ordered))
    batches = []
    for start in range(0, len(ordered), batch_rows):
        batch = padded(ordered[start : start + batch_rows], pad_tokens)
        batch["weights"] *= scale
        batches.append({name: x.to(device) for name, x in batch.items()})
    return batches


def padded(rows: Sequence[Row], pad_tokens: int | None = None) -> dict[str, Tensor]:
    """Return rows as one batch for `loss.next_token`; see `micro_batches`."""
    width = max(len(row.ids) for row in rows) - 1
    if pad_tokens:
        width = pad_tokens * 2 ** max((width - 1) // pad_tokens, 0).bit_length()
    ids = torch.zeros(len(rows), width + 1, dtype=torch.int64)
    weights = torch.zeros(len(rows), width + 1)
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = torch.tensor(row.ids)
        weights[r, : len(row.ids)] = torch.tensor(row.weights)
    inputs, targets, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]
    batch = {"inputs": inputs, "targets": targets.masked_fill(weights == 0, IGNORE), "weights": weights}
    return {name: x.contiguous() for name, x in batch.items()}


def rl_step(
    state: TrainState,
    batches: Sequence[Mapping[str, Any]],
    hparams: Hparams,
    *,
    rollout_fn: Callable[[Params, Sequence[int]], list[list[Rollout]]],
    train_step: Callable[..., tuple[TrainState, Metrics]],
    batch_rows: int,
    pad_tokens: int | None = None,
    full_params: Callable[[Params], Params] = sharding.full_params,
) -> tuple[TrainState, Metrics]:
    """Return the state after one step on one batch of `batches`, and its metrics, as `train.train_step` does.

    If all answers to each prompt have the same reward there is no gradient, and only the step count changes.

    Args:
        rollout_fn: (full parameters, numbers of prompts) -> answers to each.
        batch_rows: of a micro-batch, on one rank. pad_tokens: see `micro_batches`.
        full_params: parameters of the state -> those of the model, on every rank.
    """
    group, numbers, started = distributed.control_group(), batches[0]["numbers"], time.perf_counter()
    params = full_params(state.params)
    with distributed.raise_on_any_failure():
        groups = rollout_fn(params, numbers[group.rank :: group.size])
    seconds = time.perf_counter() - started
    del params
    rows = [row for group in groups for row in weighted(group)]
    rollout_metrics = summary(groups, seconds)
    n_batches = distributed.all_reduce_max(-(-len(rows) // batch_rows))
    if not n_batches:
        nothing = {"loss": 0.0, "grad_norm": 0.0, "finite": True}
        return state._replace(step=state.step + 1), nothing | rollout_metrics
    # The step averages over micro-batches and ranks what is a sum here.
    scale = n_batches * group.size / len(numbers)
    micro = micro_batches(rows, n_batches, batch_rows, scale, pad_tokens, state.step.device)
    state, metrics = train_step(state, micro, hparams)
    return state, metrics | rollout_metrics


def summary(groups: Sequence[Sequence[Rollout]], seconds: float) -> Metrics:
    """Return the metrics of all ranks' answers, given this rank's and the seconds that they took."""
    answers = [answer for group in groups for answer in group]
    sums = [
        len(answers),
        len(groups),
        sum(answer.reward for answer in answers),
        sum(len(answer.tokens) for answer in answers),
        sum(answer.finish == "stop" for answer in answers),
        sum(len({answer.reward for answer in group}) > 1 for group in groups),
    ]
    n_answers, n_prompts, reward, tokens, finished, mixed = distributed.all_reduce_sum(sums)
    seconds = distributed.all_reduce_max(round(seconds * 1e6)) / 1e6  # of the slowest rank
    return {
        "rl/reward": reward / n_answers,
        "rl/answer_tokens": tokens / n_answers,
        "rl/finished": finished / n_answers,  # before the length limit
        "rl/mixed": mixed / n_prompts,  # with different rewards, so that there is a gradient
        "tokens": tokens,
        "perf/rollout_seconds": seconds,
        "perf/rollout_tokens_per_second": tokens / seconds,
    }


def pass_at_k(engine: Engine, tok: Tokenizer, task: Task, problems: int, config: RolloutConfig) -> dict[str, float]:
    """Return {"rl/pass_at_1": …, "rl/pass_at_8": …}: the fraction of problems that one of the first k answers solves.

    Beside it {"rl/pass_at_1-lenient": …, "rl/pass_at_8-lenient": …} of a task that has a lenient check.

    Args:
        problems: how many rows of the task, the first ones. config: of the sampling; its seeds are always the same.
    """
    settings = {name: getattr(config, name) for name in ("temperature", "top_k", "max_tokens")}
    sampling = ChatEvalConfig(samples=MAX_K, **settings)
    grades = chat_eval.sample_answers(engine, tok, task, range(min(problems, task.size)), sampling, chat_eval.grade)

    def passed(column: int, k: int) -> float:
        return sum(any(grade[column] for grade in answers[:k]) for answers in grades) / len(grades)

    values = {f"rl/pass_at_{k}": passed(0, k) for k in range(1, MAX_K + 1)}
    if task.is_correct_lenient:
        values |= {f"rl/pass_at_{k}-lenient": passed(1, k) for k in (1, MAX_K)}
    return values
