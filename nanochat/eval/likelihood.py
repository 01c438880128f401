"""Log-likelihood of answers to many prompts; a prefix that the prompts of a group share is computed once.

The prompts of a group become one row of a batch: the shared prefix, then all continuations, each of which attends to
the prefix and to itself. The ranks share the batches, which do not depend on how many ranks there are.

Shape suffixes: B rows of a batch, T tokens of a row, Q tokens of its continuations, R target tokens, N query heads,
K key/value heads, H head width, C width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import distributed, model, tree
from nanochat.model import Attend, Compute, ModelConfig, PackedPositions, ParamsLike

CPU_TOKENS, GPU_TOKENS = 2048, 32768  # of a batch; on a CPU, larger ones outgrow the caches
LOGIT_CHUNK = 1024  # positions whose logits exist at once
MAX_PADDING = 1 / 8  # of a batch, unless it is small
PREFIX, PADDING, PREFIX_PADDING = -1, -2, -3  # segment ids of tokens outside of continuations


class Prompt(NamedTuple):
    """Token ids with an answer in them: ids[start:end], start >= 1."""

    ids: list[int]
    start: int
    end: int


class Scored(NamedTuple):
    """The summed loss of an answer, how many of its tokens are the argmax, and how many it has."""

    nats: float
    n_correct_greedy: int
    n_tokens: int


class SequenceLogprobs(NamedTuple):
    """Log-probabilities of a sequence of T tokens, in nats, float32."""

    logprobs: np.ndarray  # (T - 1,) of each token after the first
    top_ids: np.ndarray  # (T, K), the K most likely tokens after each token, most likely first
    top_logprobs: np.ndarray  # (T, K)


class PackedRow(NamedTuple):
    """A row of a batch: the prefix that prompts share, or all of a single prompt, and the rest of each prompt."""

    skipped: int  # tokens at the start that are out of reach
    prefix: list[int]
    continuations: list[list[int]]
    targets: list[tuple[int, int, int]]  # of answers: (index in the row of the token before, token id, prompt number)


class Batch(NamedTuple):
    """Rows as tensors: the prefixes padded to one width, then the continuations padded."""

    tokens_BT: Tensor
    order: PackedPositions | None  # None if every row is a single prompt from its first token on
    prefix_width: int
    segment_ids_BT: Tensor  # index of the continuation that a token belongs to, or PREFIX, PADDING, PREFIX_PADDING
    row_R: Tensor  # position of the token before each target
    column_R: Tensor
    target_R: Tensor  # token ids
    prompt_R: Tensor  # numbers of prompts


@torch.no_grad()
def score(
    params: ParamsLike,
    config: ModelConfig,
    groups: Sequence[Sequence[Prompt]],
    *,
    tokens_per_batch: int | None = None,
    compute: Compute = Compute(),
) -> list[list[Scored]]:
    """Return the score of each prompt of each group. Collective: all ranks pass the same and get the same.

    Args:
        params: full or (with `compute.all_gather`) this rank's shards.
        groups: prompts that may share a prefix. Equal prompts of a group get equal scores, to the last bit.
        tokens_per_batch: computed at once, padding included; a longer row is a batch of its own. None: by device.
    """
    rows, numbers = pack_rows(groups, receptive_tokens(config))
    nested, device = tree.nest(tree.flatten(params)), params["wte"].device
    batches = make_batches(rows, tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS))
    results, group = [], distributed.control_group()
    for first in range(group.rank, len(batches) + group.rank, group.size):
        surplus = first >= len(batches)
        # Ranks that hold shards of the parameters gather them in every batch, so all need the same number of batches.
        if not surplus or compute.all_gather is not None:
            batch = assemble(batches[0 if surplus else first])
            losses = _target_losses(nested, config, batch, compute, device)
            results += [] if surplus else [(batch.prompt_R, *losses)]
    sums = torch.zeros(2, sum(map(len, groups)), dtype=torch.float64)
    for prompt_R, nats_R, correct_R in results:  # copied at the end, so that a GPU does not wait for Python
        sums.index_add_(1, prompt_R, torch.stack([nats_R.cpu().double(), correct_R.cpu().double()]))
    totals = distributed.all_reduce_sum(sums.flatten().tolist())
    nats, correct = totals[: sums.shape[1]], totals[sums.shape[1] :]
    return [
        [Scored(nats[n], int(correct[n]), p.end - p.start) for n, p in zip(group_numbers, group)]
        for group_numbers, group in zip(numbers, groups)
    ]


@torch.no_grad()
def token_logprobs(
    params: ParamsLike,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    *,
    top: int = 1,
    tokens_per_batch: int | None = None,
    compute: Compute = Compute(),
) -> Iterator[dict[int, SequenceLogprobs]]:
    """Yield the log-probabilities of all tokens of sequences by their index, one batch after the other; not collective.

    What sequences that begin alike share is computed once. A batch is computed when it is asked for.

    Args:
        top: alternatives of each token, at least 1.
    """
    nested, device = tree.nest(tree.flatten(params)), params["wte"].device
    tokens_per_batch = tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    rows, prefix_of = [], {}  # index of a sequence -> number of its prefix
    for group in _group_by_prefix(sequences, tokens_per_batch):
        prefix_of |= dict.fromkeys(group, len(sequences) + len(rows))
        rows.append(_pack_whole([list(sequences[i]) for i in group], group, len(sequences) + len(rows)))
    for batch in map(assemble, make_batches(rows, tokens_per_batch)):
        parts = []
        for logits, target in _target_logits(nested, config, batch, compute, device):
            logprobs = F.log_softmax(logits, -1)
            parts.append((logprobs.gather(1, target[:, None])[:, 0], *reversed(logprobs.topk(top))))
        values = [torch.cat(x).cpu().numpy() for x in zip(*parts)]
        numbers = batch.prompt_R.numpy()
        result = {}
        for i in (int(number) for number in np.unique(numbers) if number < len(sequences)):
            where = np.concatenate([np.flatnonzero(numbers == number) for number in (prefix_of[i], i)])
            nats, ids, alternatives = (x[where] for x in values)
            result[i] = SequenceLogprobs(nats[:-1], ids, alternatives)
        yield result


def _group_by_prefix(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Return the indices of sequences in groups that share at least half of each, of at most `max_tokens` in all."""
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        first, ids = list(sequences[groups[-1][0] if groups else i]), list(sequences[i])
        shared = min(common_prefix_length([first, ids]), len(first) - 1, len(ids) - 1)
        if groups and shared and 2 * shared >= max(len(first), len(ids)) and used + len(ids) <= max_tokens:
            groups[-1].append(i)
            used += len(ids)
        else:
            groups.append([i])
            used = len(ids)
    return groups


def _pack_whole(sequences: Sequence[list[int]], numbers: Sequence[int], prefix_number: int) -> PackedRow:
    """Return a row whose targets are what follows each token, and id 0 after the last one, for its alternatives."""
    if len(sequences) == 1:
        (ids,) = sequences
        return PackedRow(0, ids, [], [(t, token, numbers[0]) for t, token in enumerate([*ids[1:], 0])])
    cut = min(common_prefix_length(sequences), min(map(len, sequences)) - 1)
    targets, offset = [(t, sequences[0][t + 1], prefix_number) for t in range(cut - 1)], 0
    for ids, number in zip(sequences, numbers):
        targets.append((cut - 1, ids[cut], number))
        targets += [(offset + t, token, number) for t, token in enumerate([*ids[cut + 1 :], 0], start=cut)]
        offset += len(ids) - cut
    return PackedRow(0, sequences[0][:cut], [ids[cut:] for ids in sequences], targets)


def receptive_tokens(config: ModelConfig) -> int:
    """Return how many tokens before it a token depends on: each layer's window, and one for the smear."""
    return sum(config.windows) + 1


def pack_rows(groups: Sequence[Sequence[Prompt]], reach: int) -> tuple[list[PackedRow], list[list[int]]]:
    """Return (rows that hold every prompt, the number of each prompt by group); equal prompts of a group share one.

    `reach` tokens before an answer are kept.
    """
    rows, numbers, count = [], [], 0
    for group in groups:
        keys = [(tuple(prompt.ids), prompt.start, prompt.end) for prompt in group]
        first = {key: count + n for n, key in reversed(list(enumerate(keys)))}
        distinct = sorted(set(first.values()))
        rows += _pack_group([group[n - count] for n in distinct], distinct, reach)
        numbers.append([first[key] for key in keys])
        count += len(group)
    return rows, numbers


def _pack_group(prompts: Sequence[Prompt], numbers: Sequence[int], reach: int) -> Iterator[PackedRow]:
    # The token before an answer predicts it, so it belongs to the continuation.
    cut = min(common_prefix_length([p.ids for p in prompts]), min(p.start for p in prompts) - 1)
    if len(prompts) == 1 or cut < 1:
        for (ids, start, end), number in zip(prompts, numbers):
            skipped = max(start - 1 - reach, 0)
            targets = [(t - 1 - skipped, ids[t], number) for t in range(start, end)]
            yield PackedRow(skipped, ids[skipped:], [], targets)
        return
    skipped = max(cut - reach, 0)
    targets, offset = [], -skipped
    for (ids, start, end), number in zip(prompts, numbers):
        targets += [(offset + t - 1, ids[t], number) for t in range(start, end)]
        offset += len(ids) - cut
    yield PackedRow(skipped, prompts[0].ids[skipped:cut], [p.ids[cut:] for p in prompts], targets)


def common_prefix_length(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix: that of the lexicographically first and last."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def make_batches(rows: Sequence[PackedRow], tokens_per_batch: int) -> list[list[PackedRow]]:
    """Return the rows in batches of similar lengths, the longest first, so that running out of memory shows at once."""
    sizes = [(len(row.prefix), sum(map(len, row.continuations))) for row in rows]
    batches: list[list[PackedRow]] = []
    width, used = (0, 0), 0
    for i in sorted(range(len(rows)), key=lambda i: sizes[i], reverse=True):
        wider = (max(width[0], sizes[i][0]), max(width[1], sizes[i][1]))
        size = sum(wider) * (len(batches[-1]) + 1) if batches else 0
        padding = size - used - sum(sizes[i])
        sparse = padding > MAX_PADDING * size and size > MAX_PADDING * tokens_per_batch
        if not batches or size > tokens_per_batch or sparse:
            batches.append([])
            wider, used = sizes[i], 0
        batches[-1].append(rows[i])
        width, used = wider, used + sum(sizes[i])
    return batches


def assemble(rows: Sequence[PackedRow]) -> Batch:
    """Return rows as the tensors of a batch, on the CPU."""
    prefix_width = max(len(row.prefix) for row in rows)
    shape = (len(rows), prefix_width + max(sum(map(len, row.continuations)) for row in rows))
    tokens, position, previous = torch.zeros(3, *shape, dtype=torch.int64)
    segment_ids = torch.full(shape, PADDING)
    previous[:, 1:prefix_width] = torch.arange(prefix_width - 1)
    segment_ids[:, :prefix_width] = PREFIX_PADDING
    targets = []
    for b, row in enumerate(rows):
        length, start = len(row.prefix), prefix_width
        position[b, :prefix_width] = torch.arange(row.skipped, row.skipped + prefix_width)
        tokens[b, :length], segment_ids[b, :length] = torch.tensor(row.prefix), PREFIX
        for number, ids in enumerate(row.continuations):
            span = slice(start, start + len(ids))
            tokens[b, span], segment_ids[b, span] = torch.tensor(ids), number
            position[b, span] = torch.arange(row.skipped + length, row.skipped + length + len(ids))
            previous[b, span] = torch.arange(start - 1, start - 1 + len(ids))
            previous[b, start] = length - 1
            start += len(ids)
        gap = prefix_width - length
        targets += [(b, t + gap * (t >= length), token, prompt) for t, token, prompt in row.targets]
    columns = torch.tensor(targets, dtype=torch.int64).view(-1, 4).unbind(1)
    packed = any(row.continuations or row.skipped for row in rows)
    order = PackedPositions(position, previous) if packed else None
    return Batch(tokens, order, prefix_width, segment_ids, columns[0], columns[1], columns[2], columns[3])


def _target_losses(
    params: dict[str, Any], config: ModelConfig, batch: Batch, compute: Compute, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the loss of each target in nats, and whether it is the argmax; (R,) each, on the device."""
    nats, correct = [], []
    for logits, target in _target_logits(params, config, batch, compute, device):
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        correct.append(logits.argmax(-1) == target)
    return torch.cat(nats), torch.cat(correct)


def _target_logits(
    params: dict[str, Any], config: ModelConfig, batch: Batch, compute: Compute, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits (R, V), targets (R,)) of the batch in chunks."""
    order, packed = None, compute
    if batch.order is not None:
        order = PackedPositions(*(x.to(device) for x in batch.order))
        segment_ids_BT = batch.segment_ids_BT.to(device)
        attend = _packed_attention(segment_ids_BT, order.position_ids_BT, batch.prefix_width, compute.attend)
        packed = dataclasses.replace(compute, attend=attend)
    since = int(batch.column_R.min()) if len(batch.column_R) else 0
    x_BTC = model.features(
        params, batch.tokens_BT.to(device), positions=order, logits_from=since, config=config, compute=packed
    )
    x_RC, target_R = x_BTC[batch.row_R.to(device), batch.column_R.to(device) - since], batch.target_R.to(device)
    lm_head_VC = model.get_param(params, "lm_head", compute)
    for x, target in zip(x_RC.split(LOGIT_CHUNK), target_R.split(LOGIT_CHUNK)):
        yield model.unembed(x, lm_head_VC, config, compute), target


def _packed_attention(segment_ids_BT: Tensor, position_BT: Tensor, prefix_width: int, attend: Attend) -> Attend:
    """Return the attention of packed rows: `attend` within the prefix; a continuation sees the prefix and itself."""
    segment_ids_BQ1, position_BQ1 = segment_ids_BT[:, prefix_width:, None], position_BT[:, prefix_width:, None]
    segment_ids_B1T, distance_BQT = segment_ids_BT[:, None], position_BQ1 - position_BT[:, None]
    visible_BQT = ((segment_ids_B1T == segment_ids_BQ1) | (segment_ids_B1T == PREFIX)) & (distance_BQT >= 0)

    @functools.cache
    def mask(window: int) -> Tensor:
        return (visible_BQT & (distance_BQT <= window))[:, None]

    def attend_packed(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        prefix = attend(q_BTNH[:, :prefix_width], k_BTKH[:, :prefix_width], v_BTKH[:, :prefix_width], window)
        groups = q_BTNH.shape[2] // k_BTKH.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k_BTKH, v_BTKH))
        q = q_BTNH[:, prefix_width:].transpose(1, 2)
        continuations = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(window))
        return torch.cat([prefix, continuations.transpose(1, 2)], dim=1)

    return attend_packed
