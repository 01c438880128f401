"""Direct preference optimization: of two answers to a prompt, the chosen one becomes more likely than the rejected one.

With h = (log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected)), where π_ref is the model that
training starts from and log π(answer) is the sum over the answer's tokens, the loss of a pair is

    dpo   -(1 - ε)·log σ(β·h) - ε·log σ(-β·h)        ε: label smoothing
    ipo   (h - 1 / (2β))²

plus α·(-log π(chosen) / tokens of chosen), α: `nll_weight`. Either loss asks for a difference alone, and may meet it by
making both answers less likely; with α the chosen one becomes what the model writes.
Source: DPO (Rafailov et al. 2023, arXiv 2305.18290), with TRL's label smoothing; IPO (arXiv 2310.12036), which TRL
applies to log-probabilities per token (`length_normalized`); α is that of iterative RPO (Pang et al. 2024, arXiv
2404.19733) and TRL's `rpo_alpha`.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import distributed, jsonl, model
from nanochat.data import Tokenizer, chat_format
from nanochat.distributed import Runtime
from nanochat.model import IGNORE, Params, loss
from nanochat.tasks import Preference
from nanochat.train.rl import Row, padded, row_numbers


class Pair(NamedTuple):
    """Two rendered answers to a prompt; the weight of a token is 1 if it is of the answer and supervised."""

    chosen: Row
    rejected: Row


class Objective(NamedTuple):
    """Which loss; see the formulas above."""

    loss: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    nll_weight: float = 0.0


def render(
    rows: Iterable[Preference], tok: Tokenizer, max_tokens: int, too_long: chat_format.TooLong
) -> tuple[list[Pair], int]:
    """Return the pairs of which both answers have tokens among the first `max_tokens`, and the number of the others."""
    pairs, skipped = [], 0
    for row in rows:
        given = [
            {key: x for key, x in message.items() if key not in chat_format.SWITCHES} | {"weight": 0}
            for message in row["prompt"]
        ]
        sides = []
        for answer in (row["chosen"], row["rejected"]):
            ids, mask = chat_format.render(tok, {"messages": [*given, *answer]})
            kept = chat_format.kept_tokens(tok, ids, max_tokens, too_long)
            sides.append(Row(ids[:kept], [float(x) for x in mask[:kept]]))
        if all(any(side.weights[1:]) for side in sides) and sides[0] != sides[1]:
            pairs.append(Pair(*sides))
        else:
            skipped += 1
    return pairs, skipped


def pair_losses(log_probs: Tensor, reference: Tensor, tokens: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return (loss, β·h) of each pair, (n,), differentiable in `log_probs`.

    Args:
        log_probs, reference: (2n,) sums over answers, chosen and rejected in turns. tokens: (2n,) of the answers.
    """
    ratio = log_probs - reference
    ratio = ratio / tokens if objective.length_normalized else ratio
    h, beta, epsilon = ratio[0::2] - ratio[1::2], objective.beta, objective.label_smoothing
    if objective.loss == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    else:
        losses = -(1 - epsilon) * F.logsigmoid(beta * h) - epsilon * F.logsigmoid(-beta * h)
    return losses - objective.nll_weight * log_probs[0::2] / tokens[0::2], beta * h


def preference_loss(
    params: model.ParamsLike, batch: Mapping[str, Tensor], *, objective: Objective, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (mean loss of the pairs, {}), with the arguments of `loss.next_token`.

    Args:
        batch: "inputs" and "targets" (2n, T), chosen and rejected in turns; "reference" (2n,) log-probabilities.
    """
    log_probs = -loss.per_token(params, batch, **options).sum(1)
    tokens = (batch["targets"] != IGNORE).sum(1)
    return pair_losses(log_probs, batch["reference"], tokens, objective)[0].mean(), {}


@torch.no_grad()
def log_probs(params: Params, rows: Sequence[Row], batch_rows: int, device: torch.device) -> list[float]:
    """Return the log-probability of each row's answer."""
    values, order = [0.0] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        batch = {name: x.to(device) for name, x in padded([rows[i] for i in part]).items()}
        for i, value in zip(part, (-loss.per_token(params, batch).sum(1)).tolist()):
            values[i] = value
    return values


def reference_log_probs(
    folder: Path, base: str, pairs: Sequence[Pair], params: Callable[[], Params], batch_rows: int, runtime: Runtime
) -> Tensor:
    """Return the log-probabilities of (chosen, rejected) under the base, (pairs, 2) float32. A collective call.

    They are computed once and kept in `folder`, by the base's fingerprint and the content of the pairs.

    Args:
        params: gives the base's parameters.
    """
    file = folder / f"reference_{hashlib.sha256(repr((base, pairs)).encode()).hexdigest()[:16]}.json"
    if not distributed.broadcast_object(file.exists()):
        print(f"reference: log-probabilities of {len(pairs):,} pairs, once; kept in {file}", flush=True)
        rows = [row for pair in pairs[runtime.rank :: runtime.world_size] for row in pair]
        parts = distributed.all_gather_object(log_probs(params(), rows, batch_rows, runtime.device))
        values = torch.empty(len(pairs), 2)
        for rank, part in enumerate(parts):
            values[rank :: runtime.world_size] = torch.tensor(part).view(-1, 2)
        if runtime.is_main:
            jsonl.write_atomic(file, json.dumps(values.tolist()))
        distributed.barrier()
    with distributed.raise_on_any_failure():
        return torch.tensor(json.loads(file.read_text("utf-8"))).view(-1, 2)


def batches(
    pairs: Sequence[Pair],
    reference: Tensor,
    name: str,
    pairs_per_step: int,
    pad_tokens: int | None,
    runtime: Runtime,
    state: Mapping[str, Any] | None = None,
) -> Generator[tuple[dict[str, Tensor], dict[str, Any], dict[str, float]], None, None]:
    """Yield (this rank's batch for `preference_loss`, the state after it, statistics) without end, in order.

    Args:
        name: stands for the pairs and their reference, which must be the same when a run is resumed.
        pad_tokens: see `rl.micro_batches`.
    """
    pin = runtime.device.type == "cuda"  # or the copy would wait for the step before
    for numbers, position in row_numbers(name, len(pairs), pairs_per_step, state):
        chosen = [number % len(pairs) for number in numbers]
        rows = [row for i in chosen for row in pairs[i]]
        batch = padded(rows, pad_tokens) | {"reference": reference[chosen].flatten()}
        del batch["weights"]
        mine = [2 * n + side for n in range(runtime.rank, pairs_per_step, runtime.world_size) for side in (0, 1)]
        stats = {"epoch": numbers[0] / len(pairs), "tokens": float(sum(len(row.ids) for row in rows))}
        pinned = {name: x[mine].pin_memory() if pin else x[mine] for name, x in batch.items()}
        moved = {name: x.to(runtime.device, non_blocking=True) for name, x in pinned.items()}
        yield moved, {"position": dict(position)}, stats


@torch.no_grad()
def evaluate(
    params: Params, base: Params, pairs: Sequence[Pair], objective: Objective, batch_pairs: int, runtime: Runtime
) -> dict[str, float]:
    """Return what held-out pairs say about a model. A collective call.

    "accuracy": share of pairs with h > 0 (with h = 0 half, so 50% at the start); "margin": mean β·h; mean
    "log_prob_chosen" and "log_prob_rejected"; "loss"; "kl": KL(π ‖ π_ref) in nats at a token of the answers, exact.
    """
    sums = torch.zeros(8, dtype=torch.float64)
    mine = pairs[runtime.rank :: runtime.world_size]
    for start in range(0, len(mine), batch_pairs):
        part = [row for pair in mine[start : start + batch_pairs] for row in pair]
        batch = {name: x.to(runtime.device) for name, x in padded(part).items()}
        log_p, log_q = (F.log_softmax(model.apply(p, batch["inputs"]), -1) for p in (params, base))
        counted, targets = batch["targets"] != IGNORE, batch["targets"].clamp_min(0)[..., None]
        own, reference = ((x.gather(-1, targets)[..., 0] * counted).sum(1) for x in (log_p, log_q))
        kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * counted).sum()
        losses, margins = pair_losses(own, reference, counted.sum(1), objective)
        won = (margins > 0).float() + (margins == 0).float() / 2
        values = [won, margins, own[0::2], own[1::2], losses, kl, counted, torch.ones(len(part) // 2)]
        sums += torch.stack([x.cpu().double().sum() for x in values])
    *means, kl, tokens, count = distributed.all_reduce_sum(sums.tolist())
    names = ("accuracy", "margin", "log_prob_chosen", "log_prob_rejected", "loss")
    return {name: x / count for name, x in zip(names, means)} | {"kl": kl / tokens}
