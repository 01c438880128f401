"""Prefill: the keys and values of prompts, many short ones together, long ones in chunks, common beginnings once.

`advance` is called between two decode steps. Where others decode it computes `chunk` tokens at most, so that their
tokens keep coming while a long prompt is computed. It works in memory of its own, where position p is in slot p;
`load_row_` then copies a prompt into its row of the engine's cache, whose layers keep no more than their window.

What is computed is kept in blocks, the oldest of which are dropped. A block is found by its tokens and by the block
before it, so it holds what the same tokens in the same place had. Of several prompts that begin with the same new
block, one is computed first and the others wait for it.

Rounding: the shape of a matrix product has an influence on the last bits of its result. If `exact`, prompts are
computed one by one, in chunks that begin at multiples of `chunk`, and these are the blocks: what a prompt gets is then
a function of the prompt, bit for bit, whatever else is computed or kept.

Source: chunks as in Sarathi-Serve (Agrawal et al., arXiv 2403.02310), blocks as in vLLM's automatic prefix caching.
"""

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.model import Compute, ModelConfig, ParamsLike, decode_features, gpt
from nanochat.model.kv_cache import CacheLike

BLOCK = 32  # tokens
MIN_WIDTH = 16  # tokens; widths are this times a power of two
MAX_TOGETHER = 2048  # tokens of prompts that are computed at once
# In letters: L layers, 2 for keys and values, B rows, S positions, K key/value heads, H head width.

BlockKey = tuple[int, tuple[int, ...]]  # number of the block before it, or -1, and its tokens


class Block(NamedTuple):
    key: BlockKey
    number: int
    kv_L2SKH: Tensor


@dataclasses.dataclass(eq=False)
class PrefixCache:
    """The blocks, least recently used first."""

    max_tokens: int
    blocks: OrderedDict[BlockKey, Block] = dataclasses.field(default_factory=OrderedDict)
    numbers: itertools.count = dataclasses.field(default_factory=itertools.count)
    tokens: int = 0  # in all blocks
    hits: int = 0  # prompts that began with a block
    tokens_saved: int = 0  # that did not have to be computed


class Prefilled(NamedTuple):
    """A prompt that has been computed, but for its last token, which the first decode step is fed."""

    key: Hashable
    tokens: tuple[int, ...]
    kv_L2SKH: Tensor  # S is at least the number of tokens
    before_C: Tensor


class _Work(NamedTuple):
    """A prompt that is being computed: its first `start` tokens are, and belong to these blocks."""

    key: Hashable
    tokens: tuple[int, ...]
    start: int
    blocks: list[Block]

    def next_key(self, block: int) -> BlockKey:
        first = sum(b.kv_L2SKH.shape[2] for b in self.blocks)
        return self.blocks[-1].number if self.blocks else -1, self.tokens[first : first + block]


@dataclasses.dataclass(eq=False)
class Prefill:
    """State of the prefill, changed by the functions of this file."""

    params: ParamsLike
    config: ModelConfig
    compute: Compute
    device: torch.device
    context: int
    chunk: int
    exact: bool
    prefixes: PrefixCache
    waiting: dict[Hashable, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # prompts, in their order
    partial: tuple[_Work, Tensor] | None = None  # a long prompt, and its keys and values, (L, 2, 1, S, K, H)

    @property
    def block(self) -> int:
        return self.chunk if self.exact else BLOCK


def add(state: Prefill, key: Hashable, prompt: tuple[int, ...]) -> None:
    state.waiting[key] = prompt[:-1]


def remove(state: Prefill, key: Hashable) -> None:
    """Forget a prompt; an unknown key is ignored."""
    state.waiting.pop(key, None)
    if state.partial and state.partial[0].key == key:
        state.partial = None


def clear(state: Prefill) -> None:
    """Forget all blocks: the parameters have changed."""
    state.prefixes.blocks.clear()
    state.prefixes.tokens = 0


def advance(state: Prefill, others_decode: bool, everything: bool = False) -> list[Prefilled]:
    """Compute prompts, and return those that are complete.

    Args:
        others_decode: compute one chunk only; otherwise, until some prompt is complete.
        everything: compute all prompts, whoever waits for that.
    """
    is_short = others_decode and not everything
    done: list[Prefilled] = []
    while state.partial or (state.waiting and (everything or not done)):
        if state.partial:
            group = [state.partial[0]]
        else:
            group = _next_group(state, state.chunk if is_short else MAX_TOGETHER)
            done += [_from_blocks(state, work) for work in group if work.start == len(work.tokens)]
            group = [work for work in group if work.start < len(work.tokens)]
        if group:
            done += _compute(state, group, state.chunk if is_short or state.exact else state.context)
            if is_short:
                break
    return done


def _next_group(state: Prefill, limit: int) -> list[_Work]:
    """Take the next prompts: those that are in blocks altogether, and some that can be computed at once."""
    complete, group, new_blocks, group_shape = [], [], set(), None
    for key, tokens in state.waiting.items():
        work = _match(state, key, tokens)
        if work.start == len(tokens):
            complete.append(work)
            continue
        shape, new_block = (work.start, _width(state, len(tokens) - work.start)), work.next_key(state.block)
        fits = not state.exact and shape == group_shape and (len(group) + 1) * shape[1] <= limit
        is_new = not state.prefixes.max_tokens or new_block not in new_blocks
        if not group or (fits and is_new):
            group_shape = shape
            group.append(work)
            new_blocks.add(new_block)
    for work in (*complete, *group):
        del state.waiting[work.key]
        if work.start:
            state.prefixes.hits += 1
            state.prefixes.tokens_saved += work.start
    return [*complete, *group]


def _compute(state: Prefill, group: Sequence[_Work], limit: int) -> list[Prefilled]:
    """Compute the next tokens of prompts that have the same start; returns them, but for one that is not complete."""
    start, n_rows = group[0].start, len(group)
    n_left = max(len(work.tokens) for work in group) - start
    config, device = state.config, state.device
    if state.partial is None:
        room = max(_width(state, n_left), -(-n_left // state.chunk) * state.chunk)
        shape = (config.n_layer, 2, n_rows, start + room, config.n_kv_head, config.head_dim)
        kv = torch.empty(shape, dtype=state.compute.dtype or torch.float32, device=device)
        for row, work in enumerate(group):
            if work.blocks:
                kv[:, :, row, :start] = torch.cat([block.kv_L2SKH for block in work.blocks], dim=2)
    else:
        kv = state.partial[1]
    n_time = min(n_left, limit)
    width = min(_width(state, n_time), limit, kv.shape[3] - start)
    new = [work.tokens[start : start + n_time] for work in group]
    cache = {
        "length": torch.full((n_rows,), start, device=device),
        "before": torch.stack([_before(state, work.tokens[:start]) for work in group]),
        "layers": {str(i): {"k": kv[i, 0], "v": kv[i, 1]} for i in range(config.n_layer)},
    }
    padded_BT = _on_device([[*tokens, *[0] * (width - len(tokens))] for tokens in new], device)
    settings = {"config": config, "compute": state.compute}
    decode_features(state.params, padded_BT, cache, start=start, cache_only=True, **settings)
    group = [
        _keep_blocks(state, work, start + len(tokens), kv[:, :, row])
        for row, (work, tokens) in enumerate(zip(group, new))
    ]
    state.partial = (group[0], kv) if n_time < n_left else None
    return [
        Prefilled(work.key, work.tokens, kv[:, :, row], _before(state, work.tokens))
        for row, work in enumerate(group)
        if work.start == len(work.tokens)
    ]


def load_row_(cache: CacheLike, row: int, prefilled: Prefilled) -> None:
    """Overwrite a row of the engine's cache."""
    length = len(prefilled.tokens)
    cache["length"][row] = length
    cache["before"][row] = prefilled.before_C
    for i, layer in cache["layers"].items():
        for x, new_SKH in zip((layer["k"], layer["v"]), prefilled.kv_L2SKH[int(i)]):
            first = max(0, length - x.shape[1])
            if first == 0:
                x[row, :length] = new_SKH[:length]
            else:  # a ring
                position_S = torch.arange(first, length, device=x.device)
                x[row, position_S % x.shape[1]] = new_SKH[first:length]


def _width(state: Prefill, n_tokens: int) -> int:
    """Return the padded number of tokens: few different ones, within the context."""
    width = MIN_WIDTH
    while width < n_tokens:
        width *= 2
    return max(n_tokens, min(width, state.context))


def _before(state: Prefill, tokens: tuple[int, ...]) -> Tensor:
    """Return what the cache keeps of the last token; zeros if there is none."""
    last = _on_device(tokens[-1:] or [0], state.device)
    return gpt.embed(state.params, last, state.compute)[0] * bool(tokens)


def _on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return a tensor on the device, without waiting for the steps that it still has to compute."""
    x = torch.tensor(values)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# Blocks


def _match(state: Prefill, key: Hashable, tokens: tuple[int, ...]) -> _Work:
    """Return a prompt with the blocks that it begins with."""
    work = _Work(key, tokens, 0, [])
    while work.start < len(tokens) and (block := state.prefixes.blocks.get(work.next_key(state.block))):
        work = work._replace(start=work.start + block.kv_L2SKH.shape[2], blocks=[*work.blocks, block])
    _touch(state.prefixes, work.blocks)
    return work


def _keep_blocks(state: Prefill, work: _Work, end: int, kv_L2SKH: Tensor) -> _Work:
    """Return a prompt of which the tokens up to `end` have been computed, with the blocks that they complete."""
    prefixes, blocks = state.prefixes, work.blocks
    first = sum(block.kv_L2SKH.shape[2] for block in blocks)
    while prefixes.max_tokens and first < (last := min(first + state.block, len(work.tokens))) <= end:
        key = work.next_key(state.block)
        if key not in prefixes.blocks:
            prefixes.blocks[key] = Block(key, next(prefixes.numbers), kv_L2SKH[:, :, first:last].clone())
            prefixes.tokens += last - first
        blocks.append(prefixes.blocks[key])
        first = last
    _touch(prefixes, blocks)
    while prefixes.tokens > prefixes.max_tokens:
        _, block = prefixes.blocks.popitem(last=False)
        prefixes.tokens -= block.kv_L2SKH.shape[2]
    return work._replace(start=end)


def _touch(prefixes: PrefixCache, blocks: Sequence[Block]) -> None:
    """Make blocks the last ones to be dropped, each after those that are only found through it."""
    for block in reversed(blocks):
        if block.key in prefixes.blocks:
            prefixes.blocks.move_to_end(block.key)


def _from_blocks(state: Prefill, work: _Work) -> Prefilled:
    """Return a prompt that is in blocks altogether."""
    shape = (state.config.n_layer, 2, 0, state.config.n_kv_head, state.config.head_dim)
    empty = torch.empty(shape, dtype=state.compute.dtype or torch.float32, device=state.device)
    kv = torch.cat([empty, *(block.kv_L2SKH for block in work.blocks)], dim=2)
    return Prefilled(work.key, work.tokens, kv, _before(state, work.tokens))
