"""Reinforcement learning from rewards: answers are sampled, rewarded, and made more or less likely.

    play = functools.partial(rollouts, decoder, tok, task, right(task), how=RolloutConfig(), seed=42)
    state, metrics = step(state, [{"numbers": range(16)}], hparams, play=play, train_step=…, …)

On policy: each step's answers come from the parameters that it changes. There is no reference model, no clipping and no
value network: an answer's advantage is its reward less the mean reward of all answers to the same example, and

    loss = mean over examples of  −Σ advantage · log p(token) / N

where the sum is over the N tokens that the model has sampled for the example. Prompts, and what tools have put into the
answers, are read and not learned. It is `loss.next_token` with a weight for each token.

Source: REINFORCE (Williams, 1992) with the group's mean as its baseline, as in GRPO (arXiv 2402.03300) without the
division by the deviation (arXiv 2503.20783); spec/training.md.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nanochat import distributed, infer
from nanochat.config import UserError
from nanochat.data import Conversation, Tokenizer, chat_format
from nanochat.distributed import ControlGroup, sharding
from nanochat.eval import ChatEvalConfig, chat_eval
from nanochat.infer import Engine, Request
from nanochat.model import IGNORE, Params
from nanochat.optim import Hparams
from nanochat.tasks import Task
from nanochat.train.config import RolloutConfig
from nanochat.train.step import TrainState

Reward = Callable[[Conversation, str], float]  # (row of the task, answer as plain text) -> how good it is
MAX_K = 8  # of pass@k


class Rollout(NamedTuple):
    """An answer, and what came of it.

    Attributes:
        prompt: the ids that it follows. tokens: of the answer. sampled: which of them the model drew; a tool forced the
            others. finish: "stop" or "length".
        text: what is judged. reward: of it.
    """

    prompt: tuple[int, ...]
    tokens: list[int]
    sampled: list[bool]
    finish: str
    text: str
    reward: float


def correct_reward(task: Task) -> Reward:
    """Return the reward that is 1 for a right answer, else 0.

    Raises:
        UserError: the task does not tell right from wrong.
    """
    if task.kind != "generative" or task.is_correct is None:
        raise UserError(f"task {task.name}: nothing judges its answers; name a generative one, as gsm8k or arithmetic")
    return lambda row, text: float(chat_eval.is_correct(task, row, text))


def prompt_batches(
    task: Task, examples: int, state: Mapping[str, Any] | None = None
) -> Generator[tuple[dict[str, Any], dict[str, Any], dict[str, float]], None, None]:
    """Yield ({"numbers": of the examples of a step}, the state after it, statistics) without end, as `train.fit` reads.

    Examples are counted through: number n is row n mod size of the task.

    Raises:
        UserError: `state` is of another task.
    """
    position = state["position"] if state else {"read": 0, "task": task.name, "size": task.size}
    if (position["task"], position["size"]) != (task.name, task.size):
        raise UserError(
            f"cannot go on with {task.size} rows of {task.name}: the run has {position['size']} of {position['task']}"
        )
    read = position["read"]
    while True:
        numbers = list(range(read, read + examples))
        read += examples
        yield {"numbers": numbers}, {"position": {**position, "read": read}}, {"epoch": read / task.size}


def seed_of(seed: int, number: int, sample: int) -> int:
    """Return the seed of one answer's draws: a function of the run's seed, the example's number and the sample's."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number} {sample}".encode(), digest_size=7).digest(), "big")


def rollouts(
    decoder: Engine,
    tok: Tokenizer,
    task: Task,
    reward: Reward,
    numbers: Sequence[int],
    *,
    how: RolloutConfig,
    seed: int,
) -> list[list[Rollout]]:
    """Return `how.samples` answers to each of the examples, which depend on their numbers and the seed alone.

    That is so up to the rounding of the engine's products, whose shapes follow its load (see `generate.start`).

    Args:
        decoder: with the parameters of the policy, and no request. numbers: see `batches`. seed: of the run.
    """
    rows = [task.row(number % task.size) for number in numbers]
    limit = decoder.config.sequence_len
    prompts = [tuple(chat_format.prompt(tok, row["messages"][:-1])[-limit:]) for row in rows]
    requests = [
        Request(prompt, how.max_tokens, how.temperature, how.top_k, seed_of(seed, number, sample))
        for number, prompt in zip(numbers, prompts)
        for sample in range(how.samples)
    ]
    tokens: list[list[int]] = [[] for _ in requests]
    sampled: list[list[bool]] = [[] for _ in requests]
    finish = [""] * len(requests)
    for event in infer.run(decoder, requests):
        i = cast(int, event.key)
        tokens[i].append(event.token)
        sampled[i].append(event.sampled)
        finish[i] = event.finish or ""

    def made(i: int) -> Rollout:
        text = chat_eval.answer_text(tok, tokens[i])
        row = rows[i // how.samples]
        return Rollout(requests[i].prompt, tokens[i], sampled[i], finish[i], text, float(reward(row, text)))

    every = [made(i) for i in range(len(requests))]
    return [every[i : i + how.samples] for i in range(0, len(every), how.samples)]


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return each reward less the mean of all: of answers to one example."""
    if min(rewards) == max(rewards):  # a mean that is rounded would teach something
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


RolloutFn = Callable[[Params, Sequence[int]], list[list[Rollout]]]


class Row(NamedTuple):
    """A sequence to learn from: its ids, and the weight of each, 0 for what was not sampled."""

    ids: list[int]
    weights: list[float]


def weighted(group: Sequence[Rollout]) -> list[Row]:
    """Return the rows of the answers to one example; the weight of a sampled token is advantage / N.

    An answer with the mean reward has no gradient, and no row: an example that is always solved, or never, costs
    nothing.
    """
    count = sum(sum(one.sampled) for one in group)
    rows = []
    for one, advantage in zip(group, advantages([one.reward for one in group])):
        if advantage:
            weights = [0.0] * len(one.prompt) + [advantage / count * drawn for drawn in one.sampled]
            rows.append(Row([*one.prompt, *one.tokens], weights))
    return rows


def micro_batches(
    rows: Sequence[Row], n_batches: int, batch_rows: int, scale: float, pad_tokens: int | None, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the rows as micro-batches for `loss.next_token`, those of one length beside each other.

    Args:
        rows: at most n_batches · batch_rows; rows of padding fill up the rest. scale: factor on all weights.
        pad_tokens: a width is this number, doubled until it is enough: few shapes to compile for; None: as wide as the
            longest row needs.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    ordered += [Row([0, 0], [0.0, 0.0])] * (n_batches * batch_rows - len(ordered))
    found = []
    for start in range(0, len(ordered), batch_rows):
        part = ordered[start : start + batch_rows]
        width = max(len(row.ids) for row in part) - 1
        if pad_tokens:
            width = pad_tokens * 2 ** max((width - 1) // pad_tokens, 0).bit_length()
        ids = torch.zeros(batch_rows, width + 1, dtype=torch.int64)
        weights = torch.zeros(batch_rows, width + 1)
        for r, row in enumerate(part):
            ids[r, : len(row.ids)] = torch.tensor(row.ids)
            weights[r, : len(row.ids)] = torch.tensor(row.weights)
        inputs, targets, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]
        batch = {"inputs": inputs, "targets": targets.masked_fill(weights == 0, IGNORE), "weights": weights * scale}
        found.append({name: x.contiguous().to(device) for name, x in batch.items()})
    return found


def rl_step(
    state: TrainState,
    batches: Sequence[Mapping[str, Any]],
    hparams: Hparams,
    *,
    play: RolloutFn,
    train_step: Callable[..., tuple[TrainState, dict[str, Tensor]]],
    batch_rows: int,
    pad_tokens: int | None = None,
    line: ControlGroup = ControlGroup(),
    show: Callable[[list[list[Rollout]]], None] = lambda played: None,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Return the state after one step on one batch of `batches`, and its metrics, as `train.train_step` does.

    Where no example has answers of different rewards there is no gradient: nothing but the number of steps changes.

    Args:
        play: (whole parameters, numbers of examples) -> answers to each. train_step: with its functions bound.
        batch_rows: of a micro-batch, of one rank. pad_tokens: see `micro_batches`.
        line: the ranks, which share the examples evenly. show: is given this rank's answers.

    Raises:
        UserError: an answer cannot be judged, on whatever rank.
    """
    numbers, started = batches[0]["numbers"], time.perf_counter()
    params = sharding.whole(state.params)
    with distributed.raise_on_any_failure(line):
        played = play(params, numbers[line.rank :: line.size])
    seconds = time.perf_counter() - started
    del params
    show(played)
    rows = [row for group in played for row in weighted(group)]
    found = summary(played, seconds)
    n_batches = distributed.all_reduce_max(-(-len(rows) // batch_rows))
    if not n_batches:
        zero = torch.zeros(())
        nothing = {"loss": zero, "grad_norm": zero, "finite": torch.tensor(True)}
        return state._replace(step=state.step + 1), nothing | found
    # The step takes the mean over micro-batches and ranks of what is summed up here.
    scale = n_batches * line.size / len(numbers)
    micro = micro_batches(rows, n_batches, batch_rows, scale, pad_tokens, state.step.device)
    state, metrics = train_step(state, micro, hparams)
    return state, metrics | found


def summary(played: Sequence[Sequence[Rollout]], seconds: float) -> dict[str, Tensor]:
    """Return the metrics of all ranks' answers.

    Args:
        played: this rank's. seconds: that it took to generate and judge them.

    Returns:
        {"rl/reward": mean reward; "rl/answer_tokens": mean length; "rl/finished": share of answers that ended by
        themselves; "rl/mixed": share of examples with answers of different rewards, the others teach nothing;
        "tokens": sampled and forced; "perf/rollout_seconds", "perf/rollout_tokens_per_second": of the slowest rank}.
    """
    answers = [one for group in played for one in group]
    sums = [
        len(answers),
        len(played),
        sum(one.reward for one in answers),
        sum(len(one.tokens) for one in answers),
        sum(one.finish == "stop" for one in answers),
        sum(len({one.reward for one in group}) > 1 for group in played),
    ]
    n_answers, n_examples, reward, tokens, finished, mixed = distributed.all_reduce_sum(sums)
    seconds = distributed.all_reduce_max(round(seconds * 1e6)) / 1e6
    found = {
        "rl/reward": reward / n_answers,
        "rl/answer_tokens": tokens / n_answers,
        "rl/finished": finished / n_answers,
        "rl/mixed": mixed / n_examples,
        "tokens": tokens,
        "perf/rollout_seconds": seconds,
        "perf/rollout_tokens_per_second": tokens / seconds,
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def pass_at_k(
    decoder: Engine,
    tok: Tokenizer,
    task: Task,
    problems: int,
    how: RolloutConfig,
    line: ControlGroup = ControlGroup(),
    *,
    most: int = MAX_K,
) -> dict[str, float]:
    """Return {"rl/pass_at_1": …, "rl/pass_at_8": …}: the share of problems that any of the first k answers solves.

    Args:
        decoder: with the parameters of the policy, and no request. task: whose first `problems` rows are asked.
        how: the sampling; the seeds are the same each time. most: k goes from 1 to this.
    """
    settings = {name: getattr(how, name) for name in ("temperature", "top_k", "max_tokens")}
    sampling = ChatEvalConfig(samples=most, **settings)
    found = chat_eval.sample_answers(decoder, tok, task, range(min(problems, task.size)), sampling, line)
    return {f"rl/pass_at_{k}": sum(any(row[:k]) for row in found) / len(found) for k in range(1, most + 1)}
