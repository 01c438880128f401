"""Continuous batching: many requests, each a row of one KV cache, decoded together one token at a time.

    engine = infer.start(params, config, tokenizer, slots=8)
    for completion in infer.complete(engine, [infer.Request(prompt), ...]):
        print(tokenizer.decode(completion.tokens))

`prefill` computes the keys and values of a prompt before its row takes part.
The device keeps what a row's next step needs: its cache, its last drawn token and its sampling settings. Each step the
host reads the drawn ids, advances tool calls (`tool_use`), and sends one id per row: a forced token, or RESUME for a
row that was waiting. On a GPU the next step starts before the host has read the last one; a row whose token may need an
answer from the host then waits for one step. A CUDA graph is recorded per shape; shapes are few, since the number of
rows and their length are rounded up, and rows move into free slots.

Source: Orca (Yu et al., OSDI 2022).
"""

import dataclasses
import functools
import itertools
import types
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import compile_fn
from nanochat.infer import grammar, prefill, sampling, tool_use
from nanochat.infer import request as requests
from nanochat.infer.request import Completion, Event, Request
from nanochat.model import Compute, ModelConfig, ParamsLike, kv_cache

NO_TOKEN, RESUME = -1, -2  # what the host sends a row, besides a token to take
ROW_STATE = dict(token=torch.int64, live=torch.bool, temperature=torch.float32, top_k=torch.int64, seed=torch.int64)
MIN_SPAN, MIN_COMPILED_SPAN = 32, 256  # tokens; each further size is one more to compile
CHUNK = {"cpu": 8, "cuda": 256}  # tokens of a prompt that take no longer than a decode step


@dataclasses.dataclass(eq=False)
class _Row:
    """The host's side of an active request."""

    key: Hashable
    request: Request
    slot: int  # -1 until its prompt has been computed
    length: int  # in tokens, with the prompt and what is still to feed
    max_length: int
    feed: deque[int]  # what to send it in the next steps; it draws after the last
    open_call: tuple[int, ...] | None = None
    grammar: Any = None  # the state of an answer in a grammar, see `grammar.start`


# A dispatched step: the ids that it draws, when the host may read them, and (slot, row) of the rows that take one.
_PendingStep = tuple[Tensor, torch.cuda.Event | None, list[tuple[int, _Row]]]


@dataclasses.dataclass(eq=False)
class Engine:
    """State of the engine, made by `start` and changed by the functions of this file."""

    params: dict[str, Any]
    config: ModelConfig
    compute: Compute
    tools: tool_use.ToolTokens
    context: int  # tokens per row, prompt included
    slots: int
    row_sizes: list[int]  # the numbers of rows, and of tokens that they attend to, which a step is computed for
    span_sizes: list[int]
    async_depth: int
    owns_params: bool
    cache: dict[str, Any]
    prefill: prefill.Prefill
    row_state: dict[str, Tensor]
    filters: dict[str, Tensor] | None  # of `sampling.draw_filtered`, from the first request on that needs it
    step_fn: Callable[..., Tensor]
    graphs: dict[tuple[Any, ...], tuple[Any, Tensor, Tensor]] | None
    active: dict[Hashable, _Row] = dataclasses.field(default_factory=dict)
    pending: deque[_PendingStep] = dataclasses.field(default_factory=deque)


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
    async_depth: int | None = None,
    copy_params: bool = False,
    chunk: int | None = None,
    prefix_tokens: int | None = None,
) -> Engine:
    """Return an engine without requests.

    Args:
        params: full parameters; matrices are cast to `dtype`.
        slots: rows decoded at once; allocates their cache.
        context: tokens per row, prompt included; None: the model's sequence_len.
        device, dtype: None: those of the embedding.
        compile: compile the decode step, and record CUDA graphs on a GPU.
        exact: always compute all slots at the full context. Otherwise shapes follow the load, and with them the
            rounding of matrix products, so that a seed may give another token where two are almost equally likely.
        async_depth: steps dispatched before the last one is read, 0 or 1; None: 1 on a GPU.
        copy_params: own all parameters, so that `load_params_` may overwrite them.
        chunk: tokens of a prompt that `step` computes between two tokens of other rows; None: as CHUNK has it.
        prefix_tokens: size of the prefix cache, a further one beside that of the slots; None: `context`.
    """
    device = torch.device(device or params["wte"].device)
    dtype = dtype or params["wte"].dtype
    assert isinstance(dtype, torch.dtype)
    context = context or config.sequence_len
    limit = model.CONTEXT_LIMIT * config.sequence_len
    if slots < 1 or not 2 <= context <= limit:
        raise UserError(f"slots={slots}, context={context}: expected at least 1 slot and a context of 2 … {limit}")
    chunk = CHUNK.get(device.type, CHUNK["cuda"]) if chunk is None else chunk
    prefixes = prefill.PrefixCache(context if prefix_tokens is None else prefix_tokens)
    if chunk < 1 or prefixes.max_tokens < 0:
        raise UserError(f"chunk={chunk}, prefix_tokens={prefix_tokens}: expected at least 1 and 0 tokens")
    model.config_of(params, config)
    stored = {
        # Casting a matrix in each step would read it twice.
        name: x.detach().to(device, dtype if x.dim() > 1 else x.dtype, copy=copy_params)
        for name, x in tree.flatten(params).items()
    }
    tools, compute = tool_use.tool_tokens(tokenizer), Compute(dtype)
    cache = kv_cache.empty(config, slots, context, dtype=dtype, device=device)
    step_fn = compile_fn(_step_of(config), dynamic=None) if compile else _step_
    fused = model.fuse_qkv(tree.nest(stored))
    return Engine(
        params=fused,
        config=config,
        compute=compute,
        tools=tools,
        context=context,
        slots=slots,
        row_sizes=[slots] if exact else _sizes(1, slots),
        span_sizes=[context] if exact else _sizes(MIN_COMPILED_SPAN if compile else MIN_SPAN, context),
        async_depth=async_depth if async_depth is not None else int(device.type == "cuda"),
        owns_params=copy_params,
        cache=tree.nest(tree.flatten(cache)),
        prefill=prefill.Prefill(fused, config, compute, device, context, chunk, exact, prefixes),
        row_state={name: torch.zeros(slots, dtype=dtype, device=device) for name, dtype in ROW_STATE.items()},
        filters=None,
        step_fn=functools.partial(step_fn, config=config, compute=compute, blocking=tools.blocking),
        graphs={} if compile and device.type == "cuda" else None,
    )


@torch.no_grad()
def load_params_(engine: Engine, params: ParamsLike) -> None:
    """Overwrite the parameters of an idle engine; compiled code and CUDA graphs stay valid."""
    if not engine.owns_params:
        raise ValueError("the engine shares its parameters with the caller: start it with copy_params=True")
    if engine.active:
        raise ValueError(f"{len(engine.active)} requests are active: finish or cancel them first")
    model.config_of(params, engine.config)
    new = tree.flatten(model.fuse_qkv(params))
    for name, x in tree.flatten(engine.params).items():
        x.copy_(new[name])
    prefill.clear(engine.prefill)


def free_slots(engine: Engine) -> int:
    """Return the number of requests that can be admitted now."""
    return engine.slots - len(engine.active)


def admit(engine: Engine, key: Hashable, request: Request) -> None:
    """Give a request one of the free slots; the next steps compute its prompt and decode it."""
    requests.check(request, engine.config.vocab_size, engine.context)
    if key in engine.active or not free_slots(engine):
        raise UserError(f"request {key}: {'its key is in use' if key in engine.active else 'no slot is free'}")
    n_prompt = len(request.prompt)
    max_length = min(n_prompt + request.max_tokens, engine.context)
    engine.active[key] = _Row(key, request, -1, n_prompt, max_length, deque([request.prompt[-1]]))
    if request.grammar:
        engine.active[key].grammar = grammar.start(engine.tools.tokenizer, request.grammar)
    prefill.add(engine.prefill, key, request.prompt)


def _start_decoding(engine: Engine, prefilled: prefill.Prefilled) -> None:
    """Let a row whose prompt has been computed take part in the next step."""
    row = engine.active[prefilled.key]
    request, used = row.request, {other.slot for other in engine.active.values()}
    row.slot = slot = min(set(range(engine.slots)) - used)
    prefill.load_row_(engine.cache, slot, prefilled)
    top_k = request.top_k if request.temperature > 0 else 1
    state = {"live": False, "temperature": request.temperature, "top_k": top_k, "seed": request.seed}
    for name, value in state.items():
        engine.row_state[name][slot] = value
    if request.is_filtered:
        _allocate_filters_(engine)
    if engine.filters is not None:
        sampling.set_filters_(engine.filters, slot, request)


def cancel(engine: Engine, key: Hashable) -> None:
    """Remove a row and free its slot; unknown keys are ignored, since the row may just have finished."""
    prefill.remove(engine.prefill, key)
    if (row := engine.active.pop(key, None)) and row.slot >= 0:
        engine.row_state["live"][row.slot] = False


@torch.no_grad()
def step(engine: Engine, prefill_all: bool = False, others_wait: bool = False) -> list[Event]:
    """Start to decode one token of every row; returns the events of the step started `async_depth` steps before.

    Args:
        prefill_all: compute all new prompts before; otherwise so little that rows, here or elsewhere, do not wait.
    """
    others_wait |= any(row.slot >= 0 for row in engine.active.values())
    for prefilled in prefill.advance(engine.prefill, others_wait, prefill_all):
        _start_decoding(engine, prefilled)
    rows, events = [row for row in engine.active.values() if row.slot >= 0], []
    constrained = [row for row in rows if row.grammar]  # the next token of which depends on the last one
    depth = 0 if constrained else engine.async_depth
    if rows:
        n_rows = _round_up(_compact_slots(engine, rows), engine.row_sizes)
        longest = max(row.length for row in rows) + engine.async_depth
        span = _round_up(longest, engine.span_sizes)
        for row in constrained:
            assert engine.filters is not None and row.slot >= 0
            end = engine.tools.tokenizer.special("<|assistant_end|>")
            grammar.mask_(engine.filters["bias"][row.slot], row.grammar, row.request.logit_bias, end)
        control, drawing = [NO_TOKEN] * n_rows, []
        for row in rows:
            if row.feed:
                control[row.slot] = row.feed.popleft()
            if not row.feed:
                drawing.append((row.slot, row))
        way = sampling.cheapest_way([row.request for row in rows])
        drawn_B, ready = _run_step(engine, torch.tensor(control), n_rows, span, way)
        engine.pending.append((drawn_B, ready, drawing))
    while engine.pending and (len(engine.pending) > depth or not rows):
        events += _collect_step(engine, *engine.pending.popleft())
    return events


def run(engine: Engine, requests: Sequence[Request]) -> Generator[Event, None, None]:
    """Yield the events of requests, keyed by their index, as they come; if the caller stops early, cancel them."""
    waiting = deque(enumerate(requests))
    try:
        while waiting or engine.active:
            while waiting and free_slots(engine):
                admit(engine, *waiting.popleft())
            yield from step(engine, prefill_all=True)
    finally:
        for key in tuple(engine.active):
            cancel(engine, key)


def complete(engine: Engine, requests: Sequence[Request]) -> Generator[Completion, None, None]:
    """Yield the completion of each request in their order, as soon as it and those before it are finished."""
    events: defaultdict[Hashable, list[Event]] = defaultdict(list)
    finished: dict[Hashable, Completion] = {}
    following = 0
    for event in run(engine, requests):
        events[event.key].append(event)
        if event.finish:
            new = events.pop(event.key)
            finished[event.key] = Completion([e.token for e in new], [e.sampled for e in new], event.finish)
        while following in finished:
            yield finished.pop(following)
            following += 1


@torch.no_grad()
def warm_up(engine: Engine) -> None:
    """Compile (and record) the step of an idle engine for every shape: minutes, if the compiler's cache is cold."""
    assert not engine.active
    _allocate_filters_(engine)
    ways = [way for way in sampling.WAYS if way != "sorted"]
    for n_rows, span, way in itertools.product(engine.row_sizes, engine.span_sizes, ways):
        _run_step(engine, torch.full((n_rows,), NO_TOKEN), n_rows, span, way)


def _allocate_filters_(engine: Engine) -> None:
    if engine.filters is None:
        device = engine.row_state["token"].device
        engine.filters = sampling.empty_filters(engine.slots, engine.config.vocab_size, device)


def _sizes(least: int, most: int) -> list[int]:
    """Return every least·2ⁱ below `most`, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def _round_up(n: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= n)


def _compact_slots(engine: Engine, rows: Sequence[_Row]) -> int:
    """Move the last rows into free slots where that halves the batch; returns the number of slots in use."""
    rows = sorted(rows, key=lambda row: row.slot)
    fewest = _round_up(len(rows), engine.row_sizes)
    free = sorted(set(range(fewest)) - {row.slot for row in rows})
    for row, slot in zip((row for row in rows if row.slot >= fewest), free):
        kv_cache.copy_row_(engine.cache, slot, row.slot)
        for x in (*engine.row_state.values(), *(engine.filters or {}).values()):
            x[slot] = x[row.slot]
        # A pending step may still draw for the old slot: it runs before this copy, and is read by its old slot.
        row.slot = slot
    return max(row.slot for row in rows) + 1


def _run_step(
    engine: Engine, control_B: Tensor, n_rows: int, span: int, way: str
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Run the step for the first rows; returns the drawn ids on the host, and the event after which they are valid."""
    cache = kv_cache.first_rows(engine.cache, n_rows)
    tensors = engine.row_state | ((engine.filters or {}) if way == "filtered" else {})
    row_state = {name: x[:n_rows] for name, x in tensors.items()}
    step_fn = functools.partial(engine.step_fn, engine.params, cache, row_state, span=span, way=way)
    if engine.graphs is None:
        return step_fn(control_B.to(row_state["token"].device)).cpu(), None
    shape = (n_rows, span, way)
    if shape not in engine.graphs:
        pool = next(iter(engine.graphs.values()))[0].pool() if engine.graphs else None  # one, since they run in turns
        engine.graphs[shape] = _capture_graph(step_fn, cache, row_state, pool)
    graph, input_B, output_B = engine.graphs[shape]
    input_B.copy_(control_B.pin_memory(), non_blocking=True)
    graph.replay()
    host_B = torch.empty(output_B.shape, dtype=output_B.dtype, pin_memory=True)
    host_B.copy_(output_B, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host_B, ready


def _capture_graph(
    step_fn: Callable[[Tensor], Tensor], cache: dict[str, Any], row_state: dict[str, Tensor], pool: Any
) -> tuple[Any, Tensor, Tensor]:
    """Return (CUDA graph, its input, its output) of the step at this shape, its memory from the pool of others.

    What the warm-up steps change is restored, but for keys and values: each row's next token overwrites those.
    """
    input_B = torch.full_like(row_state["token"], NO_TOKEN)
    changed = [cache["length"], cache["before"], *row_state.values()]
    saved = [x.clone() for x in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_fn(input_B)
    torch.cuda.current_stream().wait_stream(side)
    for x, old in zip(changed, saved):
        x.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output_B = step_fn(input_B)
    return graph, input_B, output_B


def _collect_step(
    engine: Engine, drawn_B: Tensor, ready: torch.cuda.Event | None, rows: Sequence[tuple[int, _Row]]
) -> list[Event]:
    """Read a step's result and advance its rows."""
    if ready is not None:
        ready.synchronize()
    packed = drawn_B if drawn_B.dim() > 1 else None
    drawn, events = (drawn_B if packed is None else packed[:, 0, 0].long()).tolist(), []
    for slot, row in rows:
        token = drawn[slot]
        if token == NO_TOKEN or engine.active.get(row.key) is not row:  # it waits, or has ended meanwhile
            continue
        if row.grammar:
            row.grammar.consume_token(token)
        row.open_call, forced = tool_use.step(engine.tools, row.open_call, token)
        if forced:
            row.feed.extend((token, *forced))
        elif token == engine.tools.call_end:
            row.feed.append(RESUME)
        for i, new in enumerate((token, *forced)):
            row.length += 1
            finish = "stop" if new in engine.tools.stops else "length" if row.length == row.max_length else None
            logprobs = None
            if i == 0 and packed is not None and row.request.logprobs is not None:
                logprobs = sampling.unpack(packed[slot].tolist(), row.request.logprobs)
            events.append(Event(row.key, new, i == 0, finish, logprobs))
            if finish:
                cancel(engine, row.key)
                break
    return events


@functools.lru_cache
def _step_of(config: ModelConfig) -> Callable[..., Tensor]:
    """Return `_step_` under a name of its own, or torch would make the sizes symbolic in which models differ."""
    return types.FunctionType(_step_.__code__.replace(co_name=f"_step_{hash(config)}"), globals())


def _step_(
    params: ParamsLike,
    cache: dict[str, Any],
    row_state: dict[str, Tensor],
    control_B: Tensor,
    *,
    config: ModelConfig,
    compute: Compute,
    blocking: tuple[int, ...],
    span: int,
    way: str,
) -> Tensor:
    """Take one step of every row, in place; returns the drawn ids (B,), NO_TOKEN for a waiting row.

    If the `way` of drawing is filtered, returns what `sampling.pack` makes of them.

    A row waits once it has drawn one of `blocking`, until `control_B` gives it a token or RESUME. It is computed like
    the others, but its length stays, and with it the slot that is written.
    """
    live_B = row_state["live"] | (control_B != NO_TOKEN)
    token_B = torch.where(control_B >= 0, control_B, row_state["token"])
    logits_BTV, new = model.decode(
        params,
        token_B[:, None],
        cache,
        added_B=live_B.long(),
        span=span,
        # Compiled, the copy into the old cache below is only of what is new; eager, it would be of everything.
        inplace=not torch.compiler.is_compiling(),
        config=config,
        compute=compute,
    )
    settings: dict[str, Any] = {f"{name}_B": row_state[name] for name in ("temperature", "top_k", "seed")}
    settings |= sampling.WAYS[way] | {"position_B": new["length"]}
    if way == "filtered":
        drawn_B = sampling.draw_filtered(logits_BTV[:, 0], row_state, fed_B=token_B, is_new_B=live_B, **settings)
    else:
        drawn_B = sampling.draw(logits_BTV[:, 0], **settings)
    tree.map(lambda old, x: old.copy_(x), cache, new)
    row_state["token"].copy_(torch.where(live_B, drawn_B, token_B))
    # No torch.tensor(blocking): a CUDA graph cannot copy from the host.
    continues_B = functools.reduce(torch.logical_and, [drawn_B != token for token in blocking])
    row_state["live"].copy_(live_B & continues_B)
    drawn_B = torch.where(live_B, drawn_B, NO_TOKEN)
    return sampling.pack(drawn_B, logits_BTV[:, 0]) if way == "filtered" else drawn_B
