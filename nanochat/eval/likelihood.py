"""The likelihood of given answers to many prompts: beginnings that prompts share are computed once.

Prompts of a group that begin alike become one line of a batch: the beginning, and behind it all the ends, each of which
attends to the beginning and to itself alone. What stands further before an answer than all windows together reach is
left out, and logits are made where an answer is read off and nowhere else. Lines are batched by length and dealt out to
the ranks. What a batch is does not depend on the number of ranks, so neither do the numbers that come out.

Letters in names: B lines of a batch, T tokens of a line, Q tokens of its ends, R places where a token of an answer is
read off, N query heads, K key/value heads, H head width, C width, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import distributed, model, tree
from nanochat.model import Attend, Compute, ModelConfig, PackedPositions, ParamsLike

CPU_TOKENS, GPU_TOKENS = 2048, 32768  # of a batch; on a CPU larger ones outgrow the caches
LOGITS_AT_ONCE = 1024  # positions
MOST_PADDING = 1 / 8  # of a batch that is worth its start
SHARED, PADDING, NO_KEY = -1, -2, -3  # what a token of a line belongs to, if not to an end


class Prompt(NamedTuple):
    """A text with an answer in it: token ids, of which ids[start:end] are the answer; start >= 1."""

    ids: list[int]
    start: int
    end: int


class Scored(NamedTuple):
    """What the model made of an answer: its nats, how many of its tokens were the likeliest, how many it has."""

    nats: float
    hits: int
    tokens: int


class PackedRow(NamedTuple):
    """A line of a batch.

    Attributes:
        skipped: tokens in front that are left out. shared: the beginning; without ends, all of a prompt.
        ends: each the rest of a prompt.
        read: (index in the line of the token before, token of an answer, number of the prompt).
    """

    skipped: int
    shared: list[int]
    ends: list[list[int]]
    read: list[tuple[int, int, int]]


class Batch(NamedTuple):
    """Lines as tensors: the shared parts, filled up, and then the ends, filled up.

    Attributes:
        tokens_BT: ids. order: where they stand; None for lines that are prompts from their first token on.
        shared_tokens: width of the first part.
        member_BT: the end, counted in its line, that a token belongs to, or SHARED, PADDING, NO_KEY.
        row_R, column_R: where an answer's token is read off. target_R: its id. prompt_R: number of its prompt.
    """

    tokens_BT: Tensor
    order: PackedPositions | None
    shared_tokens: int
    member_BT: Tensor
    row_R: Tensor
    column_R: Tensor
    target_R: Tensor
    prompt_R: Tensor


@torch.no_grad()
def score(
    params: ParamsLike,
    config: ModelConfig,
    groups: Sequence[Sequence[Prompt]],
    *,
    padding: int,
    tokens_per_batch: int | None = None,
    compute: Compute = Compute(),
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Scored]]:
    """Return what the model makes of each prompt of each group, on all ranks, which all call this with the same.

    Args:
        params: as from `model.init`, whole or (with `compute.gather`) this rank's parts.
        groups: prompts that may begin alike. Prompts of a group that are the same get the same numbers.
        padding: id to fill up with. tokens_per_batch: computed at once, padding included; a line that is longer
            makes a batch alone; None: what is fast on the device.
    """
    lines, numbers, num_prompts = pack_rows(groups, receptive_tokens(config))
    nested, device = tree.nest(tree.flatten(params)), params["wte"].device
    batches = batched(lines, tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS))
    found = []
    for first in range(0, len(batches), world_size):
        counts = first + rank < len(batches)
        # Ranks that hold parts of the parameters gather them in every batch: all of them need as many.
        if counts or compute.gather is not None:
            batch = assemble(batches[first + rank if counts else 0], padding)
            read = _read(nested, config, batch, compute, device)
            found += [(batch.prompt_R, *read)] * counts
    sums = torch.zeros(2, num_prompts, dtype=torch.float64)
    for prompt_R, nats_R, hit_R in found:  # here at the end, so that a GPU need not wait for Python
        sums.index_add_(1, prompt_R, torch.stack([nats_R.cpu().double(), hit_R.cpu().double()]))
    whole = distributed.all_reduce_sum(sums.flatten().tolist())
    return [
        [Scored(whole[n], int(whole[num_prompts + n]), p.end - p.start) for n, p in zip(own, group)]
        for own, group in zip(numbers, groups)
    ]


def receptive_tokens(config: ModelConfig) -> int:
    """Return how many tokens before it a token's activations depend on: each layer's window, and one for the smear."""
    return sum(config.windows) + 1


def pack_rows(groups: Sequence[Sequence[Prompt]], reach: int) -> tuple[list[PackedRow], list[list[int]], int]:
    """Return the lines that hold all prompts, each prompt's number, by groups, and how many numbers there are.

    Args:
        reach: tokens before an answer that are kept.
    """
    counter = itertools.count()
    lines, numbers = [], []
    for group in groups:
        unique: dict[tuple[tuple[int, ...], int, int], int] = {}
        keys = [(tuple(prompt.ids), prompt.start, prompt.end) for prompt in group]
        for key in keys:
            if key not in unique:
                unique[key] = next(counter)
        chosen = {unique[key]: prompt for key, prompt in zip(keys, group)}
        lines += _pack_group(list(chosen.values()), list(chosen), reach)
        numbers.append([unique[key] for key in keys])
    return lines, numbers, next(counter)


def _pack_group(prompts: Sequence[Prompt], numbers: Sequence[int], reach: int) -> Iterator[PackedRow]:
    # The token before an answer is where it is read off, so it belongs to the end.
    cut = min(common_prefix_length([p.ids for p in prompts]), min(p.start for p in prompts) - 1)
    if len(prompts) == 1 or cut < 1:
        for (ids, start, end), number in zip(prompts, numbers):
            skipped = max(start - 1 - reach, 0)
            yield PackedRow(skipped, ids[skipped:], [], [(t - 1 - skipped, ids[t], number) for t in range(start, end)])
        return
    skipped = max(cut - reach, 0)
    read, moved = [], -skipped
    for (ids, start, end), number in zip(prompts, numbers):
        read += [(moved + t - 1, ids[t], number) for t in range(start, end)]
        moved += len(ids) - cut
    yield PackedRow(skipped, prompts[0].ids[skipped:cut], [p.ids[cut:] for p in prompts], read)


def common_prefix_length(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common beginning: that of the first and the last in order."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def batched(lines: Sequence[PackedRow], tokens_per_batch: int) -> list[list[PackedRow]]:
    """Return the lines in batches of like lengths, the longest first: too little memory then shows at once."""
    sizes = [(len(line.shared), sum(map(len, line.ends))) for line in lines]
    batches: list[list[PackedRow]] = []
    width, used = (0, 0), 0
    for i in sorted(range(len(lines)), key=lambda i: sizes[i], reverse=True):
        wider = (max(width[0], sizes[i][0]), max(width[1], sizes[i][1]))
        size = sum(wider) * (len(batches[-1]) + 1) if batches else 0
        padding = size - used - sum(sizes[i])
        sparse = padding > MOST_PADDING * size and size > MOST_PADDING * tokens_per_batch
        if not batches or size > tokens_per_batch or sparse:
            batches.append([])
            wider, used = sizes[i], 0
        batches[-1].append(lines[i])
        width, used = wider, used + sum(sizes[i])
    return batches


def assemble(lines: Sequence[PackedRow], padding: int) -> Batch:
    """Return lines as the tensors of a batch, on the CPU."""
    n_shared = max(len(line.shared) for line in lines)
    shape = (len(lines), n_shared + max(sum(map(len, line.ends)) for line in lines))
    tokens, member = torch.full(shape, padding), torch.full(shape, PADDING)
    position, before = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    before[:, 1:n_shared] = torch.arange(n_shared - 1)
    member[:, :n_shared] = NO_KEY
    read = []
    for b, line in enumerate(lines):
        start, at = len(line.shared), n_shared
        position[b, :n_shared] = torch.arange(line.skipped, line.skipped + n_shared)
        tokens[b, :start], member[b, :start] = torch.tensor(line.shared), SHARED
        for number, ids in enumerate(line.ends):
            part = slice(at, at + len(ids))
            tokens[b, part], member[b, part] = torch.tensor(ids), number
            position[b, part] = torch.arange(line.skipped + start, line.skipped + start + len(ids))
            before[b, part] = torch.arange(at - 1, at - 1 + len(ids))
            before[b, at] = start - 1
            at += len(ids)
        gap = n_shared - start
        read += [(b, t + gap * (t >= start), target, prompt) for t, target, prompt in line.read]
    columns = torch.tensor(read, dtype=torch.int64).view(-1, 4).unbind(1)
    order = PackedPositions(position, before) if any(line.ends or line.skipped for line in lines) else None
    return Batch(tokens, order, n_shared, member, columns[0], columns[1], columns[2], columns[3])


def _read(
    params: dict[str, Any], config: ModelConfig, batch: Batch, compute: Compute, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the nats of each token that is read off, and whether it is the likeliest, (R,) each on the device."""
    order = None
    inside = compute
    if batch.order is not None:
        order = PackedPositions(*(x.to(device) for x in batch.order))
        attend = _attend_lines(batch.member_BT.to(device), order.position_BT, batch.shared_tokens, compute.attend)
        inside = dataclasses.replace(compute, attend=attend)
    since = int(batch.column_R.min()) if len(batch.column_R) else 0
    how: dict[str, Any] = {"order": order, "since": since, "config": config, "compute": inside}
    x_BTC = model.features(params, batch.tokens_BT.to(device), **how)
    x_RC, target_R = x_BTC[batch.row_R.to(device), batch.column_R.to(device) - since], batch.target_R.to(device)
    lm_head_VC = model.gathered(params, "lm_head", compute)
    nats, hits = [], []
    for x, target in zip(x_RC.split(LOGITS_AT_ONCE), target_R.split(LOGITS_AT_ONCE)):
        logits = model.unembed(x, lm_head_VC, config, compute)
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats), torch.cat(hits)


def _attend_lines(member_BT: Tensor, position_BT: Tensor, n_shared: int, attend: Attend) -> Attend:
    """Return the attention of lines with ends: `attend` among what is shared; an end sees that, and itself."""
    member_BQ1, position_BQ1 = member_BT[:, n_shared:, None], position_BT[:, n_shared:, None]
    member_B1T, distance_BQT = member_BT[:, None], position_BQ1 - position_BT[:, None]
    visible_BQT = ((member_B1T == member_BQ1) | (member_B1T == SHARED)) & (distance_BQT >= 0)

    @functools.cache
    def seen(window: int) -> Tensor:
        return (visible_BQT & (distance_BQT <= window))[:, None]

    def attend_lines(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        shared = attend(q_BTNH[:, :n_shared], k_BTKH[:, :n_shared], v_BTKH[:, :n_shared], window)
        groups = q_BTNH.shape[2] // k_BTKH.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k_BTKH, v_BTKH))
        q = q_BTNH[:, n_shared:].transpose(1, 2)
        ends = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(window))
        return torch.cat([shared, ends.transpose(1, 2)], dim=1)

    return attend_lines
