"""The engine: many requests, each a row of one cache, decoded together a token at a time.

    decoder = generate.start(params, config, tokenizer, slots=8)
    for event in generate.run(decoder, [Request(prompt), ...]):
        print(event.key, event.token)

A row is independent of the others: it comes when a slot is free, takes its own number of tokens and goes (continuous
batching). The device keeps what a row's next step needs: its cache, the token it drew and its settings. The host takes
one small copy of the drawn ids a step, follows each row through its tool calls (`tools`), and sends one id a row back,
which says what the device cannot know: a forced token, or that a row which waited goes on. On a GPU the next step
starts before the host has seen the last one; a row whose token may need an answer then waits by itself for one step.

Shapes are few: the rows in use and the slots they fill are each rounded up, and the last row moves into a gap.
The step is compiled; on a GPU it is replayed as a CUDA graph, one a shape.

Source: continuous batching after Orca (Yu et al., OSDI 2022).
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import compile as compiling
from nanochat.infer import sampling, tool_use
from nanochat.model import Compute, ModelConfig, ParamsLike, kv_cache

NO_TOKEN, RESUME = -1, -2  # what the host says to a row, besides a token to take
USUAL, GENERAL = {"candidates": 64, "whole": False}, {"candidates": 256, "whole": True}  # draws that are compiled for
SMALLEST_SPAN = {True: 256, False: 32}  # slots, compiled or not: each size is one more to compile
SMALLEST_PREFILL = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
        prompt: at least one id. max_tokens: at most so many follow, forced ones included.
        temperature: 0 takes the most likely token. top_k: draw among so many of the most likely, 0 among all.
        seed: of the draws; the same seed gives the same tokens, whatever else is decoded.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


class Event(NamedTuple):
    """One more token of a row.

    Attributes:
        key: of the row, as given to `admit`. token: its id. sampled: False where a tool forced it.
        finish: None before the last token of a row; then "stop" (the token is <|assistant_end|> or <|bos|>) or
            "length" (max_tokens, or the context, is used up).
    """

    key: Hashable
    token: int
    sampled: bool
    finish: str | None


@dataclasses.dataclass(eq=False)
class _Row:
    """The host's side of a row: where it is, what is to be fed, and how far it has come."""

    key: Hashable
    request: Request
    slot: int
    feed: deque[int]  # tokens that it takes before it draws again
    resume: bool = False  # it waits, with the token that it drew itself
    call: tuple[int, ...] | None = None
    made: int = 0
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.made


class _PendingStep(NamedTuple):
    """A step under way: its result, when it may be read, and the rows that take a token from it."""

    drawn_B: Tensor
    ready: torch.cuda.Event | None
    rows: list[tuple[int, _Row]]


@dataclasses.dataclass(eq=False)
class Engine:
    """The state of the engine; made by `start`, changed by the functions here alone.

    Attributes:
        context: tokens of a row, prompt included.
    """

    params: dict[str, Any]
    config: ModelConfig
    compute: Compute
    rules: tool_use.ToolTokens
    context: int
    slots: int
    exact: bool
    lag: int
    own: bool
    least_span: int
    cache: dict[str, Any]
    rows: dict[str, Tensor]
    step: Callable[..., Tensor]
    graphs: dict[tuple[Any, ...], tuple[Any, Tensor, Tensor]] | None
    active: dict[Hashable, _Row] = dataclasses.field(default_factory=dict)
    flights: deque[_PendingStep] = dataclasses.field(default_factory=deque)
    prefilled: tuple[tuple[int, ...], dict[str, Any]] | None = None  # the last prompt and its cache, for its samples


def start(
    params: ParamsLike,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    slots: int,
    context: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    exact: bool = False,
    evaluate: tool_use.Evaluate = tool_use.calculate,
    lag: int | None = None,
    own: bool = False,
) -> Engine:
    """Return an engine without a request.

    Args:
        params: whole, on any device; matrices are cast to `dtype`.
        slots: rows that are decoded at once; their cache is allocated here.
        context: tokens of a row, prompt included; None: the model's sequence_len.
        device, dtype: where and in what to compute; None: those of the embedding table.
        compile: compile the decode step (and record it as CUDA graphs on a GPU).
        exact: always compute all slots to the full context. Otherwise shapes follow the load, and with them the
            rounding of matrix products: a seed may then give another token where two are equally likely to within it.
        evaluate: of tool calls.
        lag: steps that run ahead of the host, 0 or 1; None: 1 on a GPU.
        own: copy what needs no cast too, so that `load_params_` may write over it; otherwise it is the caller's memory.

    Raises:
        UserError: slots or context are out of range.
    """
    device = torch.device(device or params["wte"].device)
    dtype = dtype or params["wte"].dtype
    assert isinstance(dtype, torch.dtype)
    context = context or config.sequence_len
    limit = model.CONTEXT_LIMIT * config.sequence_len
    if slots < 1 or not 2 <= context <= limit:
        raise UserError(f"slots={slots}, context={context}: expected at least 1 slot and a context of 2 … {limit}")
    config = model.config_of(params, config)
    stored = {name: _stored(x, device, dtype, own) for name, x in tree.flatten(params).items()}
    whole = model.fuse_qkv(tree.nest(stored))
    cache = kv_cache.empty(config, slots, context, dtype=dtype, device=device)
    step: Callable[..., Tensor] = _step_
    if compile:
        step = compiling.compile_fn(_step_, device=device, dynamic=None)
    kinds = {"token": torch.int64, "live": torch.bool, "temperature": torch.float32}
    kinds |= {"top_k": torch.int64, "seed": torch.int64}
    return Engine(
        params=whole,
        config=config,
        compute=Compute(dtype),
        rules=tool_use.tool_tokens(tokenizer, evaluate),
        context=context,
        slots=slots,
        exact=exact,
        lag=lag if lag is not None else int(device.type == "cuda"),
        own=own,
        least_span=SMALLEST_SPAN[compile],
        cache=tree.nest(tree.flatten(cache)),
        rows={name: torch.zeros(slots, dtype=kind, device=device) for name, kind in kinds.items()},
        step=step,
        graphs={} if compile and device.type == "cuda" else None,
    )


def _stored(x: Tensor, device: torch.device, dtype: torch.dtype, own: bool) -> Tensor:
    """Return a parameter as a step reads it: a matrix that were cast in each step would be read twice."""
    return x.detach().to(device, dtype if x.dim() > 1 else x.dtype, copy=own)


@torch.no_grad()
def load_params_(decoder: Engine, params: ParamsLike) -> None:
    """Give the engine other parameters of the same shape, in the place of the old ones.

    What is compiled, and on a GPU recorded, goes on with them: a policy in training is played by one engine.

    Raises:
        ValueError: the parameters are not of the engine's configuration, its memory is not its own, or a request is
            under way.
    """
    if not decoder.own:
        raise ValueError("the engine shares its parameters with the caller: start it with own=True")
    if decoder.active:
        raise ValueError(
            f"{len(decoder.active)} requests are under way: their cache is of the parameters that are here"
        )
    model.config_of(params, decoder.config)
    new = tree.flatten(model.fuse_qkv(params))
    for name, x in tree.flatten(decoder.params).items():
        x.copy_(new[name])
    decoder.prefilled = None


def free(decoder: Engine) -> int:
    """Return the number of requests that can be admitted now."""
    return decoder.slots - len(decoder.active)


@torch.no_grad()
def admit(decoder: Engine, key: Hashable, request: Request) -> None:
    """Give a request a free slot and compute its prompt; a prompt that follows itself is computed once.

    Raises:
        UserError: the prompt is empty, leaves no room in the context, or holds an id that the model does not have;
            another field is out of range; no slot is free, or the key is in use.
    """
    prompt = request.prompt
    if not prompt or not all(0 <= token < decoder.config.vocab_size for token in prompt):
        raise UserError(
            f"prompt of {len(prompt)} tokens: expected at least one, within 0 … {decoder.config.vocab_size - 1}"
        )
    if len(prompt) >= decoder.context:
        raise UserError(
            f"prompt of {len(prompt)} tokens: the context of {decoder.context} leaves no room for an answer"
        )
    if key in decoder.active or not free(decoder):
        raise UserError(f"request {key}: {'its key is in use' if key in decoder.active else 'no slot is free'}")
    if request.max_tokens < 1:
        raise UserError(f"max_tokens={request.max_tokens}: expected at least 1")
    if not (request.temperature >= 0 and request.top_k >= 0 and -(2**63) <= request.seed < 2**63):
        raise UserError(
            f"temperature={request.temperature}, top_k={request.top_k}, seed={request.seed}: expected 0 or more of the "
            "first two, and a seed of 64 bits"
        )
    if decoder.prefilled is None or decoder.prefilled[0] != prompt:
        decoder.prefilled = (prompt, _prefill(decoder, prompt[:-1]))
    taken = {row.slot for row in decoder.active.values()}
    slot = next(i for i in range(decoder.slots) if i not in taken)
    kv_cache.copy_row_(decoder.cache, slot, decoder.prefilled[1])
    top_k = request.top_k if request.temperature > 0 else 1
    values = {"temperature": request.temperature, "top_k": top_k, "seed": request.seed, "live": False}
    for name, value in values.items():
        decoder.rows[name][slot] = value
    decoder.active[key] = _Row(key, request, slot, deque([prompt[-1]]))


def _prefill(decoder: Engine, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Return the cache of one row with these tokens."""
    width = _rounded(max(len(tokens), 1), SMALLEST_PREFILL, decoder.context)
    device, dtype = decoder.rows["token"].device, decoder.compute.dtype
    cache = kv_cache.empty(decoder.config, 1, width, dtype=dtype or torch.float32, device=device)
    if not tokens:
        return tree.nest(tree.flatten(cache))
    padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))]], device=device)
    added_B = torch.tensor([len(tokens)], device=device)
    how: dict[str, Any] = {"added_B": added_B, "empty_cache": True, "config": decoder.config}
    return model.decode_features(decoder.params, padded, cache, compute=decoder.compute, **how)[1]


def cancel(decoder: Engine, key: Hashable) -> None:
    """Take a row out; its slot is free at once. A key that is not there is ignored: the row may just have ended."""
    row = decoder.active.pop(key, None)
    if row is not None:
        row.done = True
        decoder.rows["live"][row.slot] = False


@torch.no_grad()
def step(decoder: Engine) -> list[Event]:
    """Decode one token of every row, and return what came of the step before the last `lag` ones.

    A row gives no event in a step in which it takes forced tokens, and several when they are decided on.
    """
    if decoder.active:
        decoder.flights.append(_dispatch_step(decoder))
    if len(decoder.flights) > decoder.lag or not decoder.active:
        return _collect_step(decoder, decoder.flights.popleft()) if decoder.flights else []
    return []


def run(decoder: Engine, requests: Sequence[Request]) -> Generator[Event, None, None]:
    """Yield the events of any number of requests, each as soon as it is there; keys are their indices.

    A caller that stops before the end takes nothing with it: what is under way is cancelled.

    Raises:
        UserError: see `admit`.
    """
    waiting, started = deque(enumerate(requests)), 0
    try:
        while waiting or decoder.active:
            while waiting and free(decoder):
                admit(decoder, *waiting.popleft())
                started += 1
            yield from step(decoder)
    finally:
        for key in range(started):
            cancel(decoder, key)


@torch.no_grad()
def warm_up(decoder: Engine) -> None:
    """Compile, and on a GPU record, the step for every load, length and draw: minutes where no compiler's cache helps.

    Without it that happens at the first step of each shape, while somebody waits. Only for a decoder without a request.
    """
    assert not decoder.active
    for n_rows in [decoder.slots] if decoder.exact else _sizes(1, decoder.slots):
        for span in [decoder.context] if decoder.exact else _sizes(decoder.least_span, decoder.context):
            for draws in (USUAL, GENERAL):
                _run(decoder, torch.full((n_rows,), NO_TOKEN), n_rows, span=span, **draws)


def _sizes(least: int, most: int) -> list[int]:
    """Return all that `_rounded` can return."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(_rounded(sizes[-1] + 1, least, most))
    return sizes


def _dispatch_step(decoder: Engine) -> _PendingStep:
    """Start a step of all rows; nothing of it is waited for."""
    count, longest = _fill_gaps(decoder), max(row.length for row in decoder.active.values()) + decoder.lag
    n_rows = decoder.slots if decoder.exact else _rounded(count, 1, decoder.slots)
    span = decoder.context if decoder.exact else _rounded(longest, decoder.least_span, decoder.context)
    control, rows = [NO_TOKEN] * n_rows, []
    for row in decoder.active.values():
        if row.feed:
            control[row.slot] = row.feed.popleft()
        elif row.resume:
            control[row.slot], row.resume = RESUME, False
        if not row.feed:
            rows.append((row.slot, row))
    how = _draws([row.request for row in decoder.active.values()], decoder.config.vocab_size)
    drawn_B, ready = _run(decoder, torch.tensor(control), n_rows, span=span, **how)
    return _PendingStep(drawn_B, ready, rows)


def _draws(requests: Sequence[Request], vocab_size: int) -> dict[str, Any]:
    """Return how `sampling.draw` is to compute these draws: in the usual way, the general one, or by all of the ids."""
    drawn = [request.top_k for request in requests if request.temperature > 0]
    if all(0 < top_k <= USUAL["candidates"] for top_k in drawn):
        return USUAL
    return GENERAL if max(drawn) <= GENERAL["candidates"] else GENERAL | {"candidates": vocab_size}


def _rounded(n: int, least: int, most: int) -> int:
    """Return the smallest of least · 2ⁱ that is at least `n`, or `most`."""
    while least < n:
        least *= 2
    return min(least, most)


def _fill_gaps(decoder: Engine) -> int:
    """Move the last rows into free slots where that halves the batch; returns how many slots are in use."""
    rows = sorted(decoder.active.values(), key=lambda row: row.slot)
    fewest = _rounded(len(rows), 1, decoder.slots)
    gaps = iter(sorted(set(range(fewest)) - {row.slot for row in rows}))
    for row in rows:
        if row.slot < fewest or decoder.exact:
            continue
        slot, source = next(gaps), row.slot
        kv_cache.copy_row_(decoder.cache, slot, decoder.cache, source)
        for x in decoder.rows.values():
            x[slot] = x[source]
        # A step under way may still draw for the old slot: it runs before this copy, and is read by its old slot.
        row.slot = slot
    return max(row.slot for row in rows) + 1


def _run(decoder: Engine, control_B: Tensor, n_rows: int, **how: Any) -> tuple[Tensor, torch.cuda.Event | None]:
    """Run the step of the first rows; returns the drawn ids on the host, and when they are there."""
    cache = kv_cache.first_rows(decoder.cache, n_rows)
    rows = {name: x[:n_rows] for name, x in decoder.rows.items()}
    settings = how | {"config": decoder.config, "compute": decoder.compute, "pauses": decoder.rules.pauses}
    if decoder.graphs is None:
        drawn_B = decoder.step(decoder.params, cache, rows, control_B.to(rows["token"].device), **settings)
        return drawn_B.cpu(), None
    shape = (n_rows, *how.values())
    if shape not in decoder.graphs:
        decoder.graphs[shape] = _record(decoder, cache, rows, settings)
    graph, input_B, output_B = decoder.graphs[shape]
    input_B.copy_(control_B.pin_memory(), non_blocking=True)
    graph.replay()
    host_B = torch.empty(n_rows, dtype=output_B.dtype, pin_memory=True)
    host_B.copy_(output_B, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host_B, ready


def _record(
    decoder: Engine, cache: dict[str, Any], rows: dict[str, Tensor], how: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """Return (CUDA graph, its input, its output) of the step at this shape.

    Warming up is real steps; what they change is put back. Not the keys and values: they lie beyond each row's length,
    or in the slot of a ring that the next token takes.
    """
    input_B = torch.full_like(rows["token"], NO_TOKEN)
    changed = [cache["length"], cache["before"], rows["token"], rows["live"]]
    kept = [x.clone() for x in changed]

    def call() -> Tensor:
        return decoder.step(decoder.params, cache, rows, input_B, **how)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    for x, old in zip(changed, kept):
        x.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output_B = call()
    return graph, input_B, output_B


def _collect_step(decoder: Engine, flight: _PendingStep) -> list[Event]:
    """Read a step's result, and follow each row through it."""
    if flight.ready is not None:
        flight.ready.synchronize()
    drawn, events = flight.drawn_B.tolist(), []
    for slot, row in flight.rows:
        if row.done or drawn[slot] == NO_TOKEN:
            continue
        token = drawn[slot]
        row.call, forced = tool_use.advance(decoder.rules, row.call, token)
        row.feed.extend((token, *forced) if forced else ())
        row.resume = token == decoder.rules.call_end and not forced
        for i, made in enumerate((token, *forced)):
            row.made += 1
            full = row.made >= row.request.max_tokens or row.length >= decoder.context
            finish = "stop" if made in decoder.rules.stops else "length" if full else None
            events.append(Event(row.key, made, i == 0, finish))
            if finish:
                cancel(decoder, row.key)
                break
    return events


def _step_(
    params: ParamsLike,
    cache: dict[str, Any],
    rows: dict[str, Tensor],
    control_B: Tensor,
    *,
    config: ModelConfig,
    compute: Compute,
    pauses: tuple[int, ...],
    span: int,
    candidates: int,
    whole: bool,
) -> Tensor:
    """Take one step of every row, in place; returns the drawn ids (B,), NOTHING for a row that waits.

    A row that waits is computed like the others and leaves no trace: its length stays, and with it the slot that is
    written. It waits once it has drawn one of `pauses`, until `control_B` gives it a token or RESUME.
    """
    live_B = rows["live"] | (control_B != NO_TOKEN)
    token_B = torch.where(control_B >= 0, control_B, rows["token"])
    how: dict[str, Any] = {"span": span, "config": config, "compute": compute}
    # Compiled, the copy into the old cache below is only of what is new; uncompiled, it would be of everything.
    how["inplace"] = not torch.compiler.is_compiling()
    logits_BTV, new = model.decode(params, token_B[:, None], cache, added_B=live_B.long(), **how)
    drawn_B = sampling.draw(
        logits_BTV[:, 0],
        temperature_B=rows["temperature"],
        top_k_B=rows["top_k"],
        seed_B=rows["seed"],
        position_B=new["length"],
        candidates=candidates,
        whole=whole,
    )
    tree.map(lambda old, x: old.copy_(x), cache, new)
    rows["token"].copy_(torch.where(live_B, drawn_B, token_B))
    goes_on_B = functools.reduce(
        torch.logical_and, [drawn_B != token for token in pauses]
    )  # a graph takes no new tensor
    rows["live"].copy_(live_B & goes_on_B)
    return torch.where(live_B, drawn_B, NO_TOKEN)
