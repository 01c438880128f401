"""Continuous batching: many requests, each a row of one KV cache, decoded together one token at a time.

    engine = infer.start(params, config, tokenizer, slots=8)
    for event in infer.run(engine, [infer.Request(prompt), ...]):
        print(event.key, event.token)

Rows are independent: each starts when a slot is free, and leaves after its own number of tokens. The device keeps what
a row's next step needs: its cache, its last drawn token and its sampling settings. Each step the host copies the drawn
ids, advances each row's tool calls (`tool_use`), and sends one id per row: a forced token, or RESUME for a row that was
waiting. On a GPU the next step starts before the host has read the last one; a row whose token may need an answer from
the host then waits for one step.

There are few shapes: the number of rows and their length are rounded up, and rows move into free slots. The step is
compiled, and replayed as a CUDA graph per shape on a GPU.

Source: Orca (Yu et al., OSDI 2022).
"""

import dataclasses
import functools
from collections import defaultdict, deque
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

NO_TOKEN, RESUME = -1, -2  # what the host sends a row, besides a token to take
# The ways of drawing tokens that are compiled; see `sampling.draw`.
USUAL, GENERAL = {"candidates": 64, "full_vocab": False}, {"candidates": 256, "full_vocab": True}
MIN_SPAN = {True: 256, False: 32}  # slots, compiled or not: each size is one more to compile
MIN_PREFILL = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: at least one id.
        max_tokens: limit on new tokens, tool results included.
        temperature: 0 takes the most likely token. top_k: draw among the k most likely tokens; 0: among all.
        seed: the same seed gives the same tokens, whatever else is decoded.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


class Event(NamedTuple):
    """One new token of a row.

    Attributes:
        key: of the request, as given to `admit`.
        sampled: False for a token of a tool result.
        finish: None before the last token; then "stop" (<|assistant_end|> or <|bos|>) or "length" (max_tokens or the
            context is used up).
    """

    key: Hashable
    token: int
    sampled: bool
    finish: str | None


class Completion(NamedTuple):
    """All new tokens of a request, which of them were sampled, and how it finished; see `Event`."""

    tokens: list[int]
    sampled: list[bool]
    finish: str

    @property
    def content(self) -> list[int]:
        """The tokens without the one that stopped it."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


@dataclasses.dataclass(eq=False)
class _Row:
    """The host's side of a row."""

    key: Hashable
    request: Request
    slot: int
    feed: deque[int]  # tokens to take before it draws again
    resume: bool = False  # it waits with the token that it drew
    open_call: tuple[int, ...] | None = None
    n_new: int = 0
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.n_new


class _PendingStep(NamedTuple):
    """A dispatched step: its result, when it may be read, and the rows that take a token from it."""

    drawn_B: Tensor
    ready: torch.cuda.Event | None
    rows: list[tuple[int, _Row]]


@dataclasses.dataclass(eq=False)
class Engine:
    """State of the engine, made by `start` and changed by the functions of this file.

    Attributes:
        context: tokens per row, prompt included.
        prefilled: the last prompt and its cache, which further samples of it reuse.
    """

    params: dict[str, Any]
    config: ModelConfig
    compute: Compute
    tools: tool_use.ToolTokens
    context: int
    slots: int
    exact: bool
    async_depth: int
    owns_params: bool
    min_span: int
    cache: dict[str, Any]
    row_state: dict[str, Tensor]
    step_fn: Callable[..., Tensor]
    graphs: dict[tuple[Any, ...], tuple[Any, Tensor, Tensor]] | None
    active: dict[Hashable, _Row] = dataclasses.field(default_factory=dict)
    pending: deque[_PendingStep] = dataclasses.field(default_factory=deque)
    prefilled: tuple[tuple[int, ...], dict[str, Any]] | None = None


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
    async_depth: int | None = None,
    copy_params: bool = False,
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
        evaluate: expression of a tool call -> result, or None.
        async_depth: steps dispatched before the last one is read, 0 or 1; None: 1 on a GPU.
        copy_params: own all parameters, so that `load_params_` may overwrite them.

    Raises:
        UserError: slots or context out of range.
    """
    device = torch.device(device or params["wte"].device)
    dtype = dtype or params["wte"].dtype
    assert isinstance(dtype, torch.dtype)
    context = context or config.sequence_len
    limit = model.CONTEXT_LIMIT * config.sequence_len
    if slots < 1 or not 2 <= context <= limit:
        raise UserError(f"slots={slots}, context={context}: expected at least 1 slot and a context of 2 … {limit}")
    model.config_of(params, config)
    stored = {
        # Casting a matrix in each step would read it twice.
        name: x.detach().to(device, dtype if x.dim() > 1 else x.dtype, copy=copy_params)
        for name, x in tree.flatten(params).items()
    }
    cache = kv_cache.empty(config, slots, context, dtype=dtype, device=device)
    dtypes = {"token": torch.int64, "live": torch.bool, "temperature": torch.float32}
    dtypes |= {"top_k": torch.int64, "seed": torch.int64}
    return Engine(
        params=model.fuse_qkv(tree.nest(stored)),
        config=config,
        compute=Compute(dtype),
        tools=tool_use.tool_tokens(tokenizer, evaluate),
        context=context,
        slots=slots,
        exact=exact,
        async_depth=async_depth if async_depth is not None else int(device.type == "cuda"),
        owns_params=copy_params,
        min_span=MIN_SPAN[compile],
        cache=tree.nest(tree.flatten(cache)),
        row_state={name: torch.zeros(slots, dtype=dtype, device=device) for name, dtype in dtypes.items()},
        step_fn=compiling.compile_fn(_step_, device=device, dynamic=None) if compile else _step_,
        graphs={} if compile and device.type == "cuda" else None,
    )


@torch.no_grad()
def load_params_(engine: Engine, params: ParamsLike) -> None:
    """Overwrite the engine's parameters; compiled code and CUDA graphs stay valid.

    Raises:
        ValueError: the parameters are of another config, the engine does not own its parameters, or requests are
            active.
    """
    if not engine.owns_params:
        raise ValueError("the engine shares its parameters with the caller: start it with copy_params=True")
    if engine.active:
        raise ValueError(f"{len(engine.active)} requests are active: finish or cancel them first")
    model.config_of(params, engine.config)
    new = tree.flatten(model.fuse_qkv(params))
    for name, x in tree.flatten(engine.params).items():
        x.copy_(new[name])
    engine.prefilled = None


def free_slots(engine: Engine) -> int:
    """Return the number of requests that can be admitted now."""
    return engine.slots - len(engine.active)


@torch.no_grad()
def admit(engine: Engine, key: Hashable, request: Request) -> None:
    """Give a request a free slot and prefill its prompt; the same prompt twice in a row is computed once.

    Raises:
        UserError: the prompt is empty, too long, or has an unknown id; another field is out of range; no slot is free;
            or the key is in use.
    """
    prompt = request.prompt
    if not prompt or not all(0 <= token < engine.config.vocab_size for token in prompt):
        raise UserError(
            f"prompt of {len(prompt)} tokens: expected at least one, within 0 … {engine.config.vocab_size - 1}"
        )
    if len(prompt) >= engine.context:
        raise UserError(f"prompt of {len(prompt)} tokens: the context of {engine.context} leaves no room for an answer")
    if key in engine.active or not free_slots(engine):
        raise UserError(f"request {key}: {'its key is in use' if key in engine.active else 'no slot is free'}")
    if request.max_tokens < 1:
        raise UserError(f"max_tokens={request.max_tokens}: expected at least 1")
    if not (request.temperature >= 0 and request.top_k >= 0 and -(2**63) <= request.seed < 2**63):
        raise UserError(
            f"temperature={request.temperature}, top_k={request.top_k}, seed={request.seed}: expected 0 or more for "
            "the first two, and a seed of 64 bits"
        )
    if engine.prefilled is None or engine.prefilled[0] != prompt:
        engine.prefilled = (prompt, _prefill(engine, prompt[:-1]))
    taken = {row.slot for row in engine.active.values()}
    slot = next(i for i in range(engine.slots) if i not in taken)
    kv_cache.copy_row_(engine.cache, slot, engine.prefilled[1])
    top_k = request.top_k if request.temperature > 0 else 1
    values = {"temperature": request.temperature, "top_k": top_k, "seed": request.seed, "live": False}
    for name, value in values.items():
        engine.row_state[name][slot] = value
    engine.active[key] = _Row(key, request, slot, deque([prompt[-1]]))


def _prefill(engine: Engine, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Return a cache with one row that holds these tokens."""
    width = _round_up(max(len(tokens), 1), MIN_PREFILL, engine.context)
    config, compute, device = engine.config, engine.compute, engine.row_state["token"].device
    cache = kv_cache.empty(config, 1, width, dtype=compute.dtype or torch.float32, device=device)
    if not tokens:
        return tree.nest(tree.flatten(cache))
    padded_BT = torch.tensor([[*tokens, *[0] * (width - len(tokens))]], device=device)
    added_B = torch.tensor([len(tokens)], device=device)
    return model.decode_features(
        engine.params, padded_BT, cache, added_B=added_B, empty_cache=True, config=config, compute=compute
    )[1]


def cancel(engine: Engine, key: Hashable) -> None:
    """Remove a row and free its slot; unknown keys are ignored, since the row may just have finished."""
    row = engine.active.pop(key, None)
    if row is not None:
        row.done = True
        engine.row_state["live"][row.slot] = False


@torch.no_grad()
def step(engine: Engine) -> list[Event]:
    """Decode one token of every row, and return the events of the step dispatched `async_depth` steps before.

    A row that takes forced tokens has no event in that step; it had all of them when its tool call ended.
    """
    if engine.active:
        engine.pending.append(_dispatch_step(engine))
    if len(engine.pending) > engine.async_depth or not engine.active:
        return _collect_step(engine, engine.pending.popleft()) if engine.pending else []
    return []


def run(engine: Engine, requests: Sequence[Request]) -> Generator[Event, None, None]:
    """Yield the events of any number of requests as they come; keys are their indices.

    If the caller stops early, active requests are cancelled.

    Raises:
        UserError: see `admit`.
    """
    waiting, n_started = deque(enumerate(requests)), 0
    try:
        while waiting or engine.active:
            while waiting and free_slots(engine):
                admit(engine, *waiting.popleft())
                n_started += 1
            yield from step(engine)
    finally:
        for key in range(n_started):
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
    """Compile, and on a GPU record, the step for every shape, instead of at the first request that needs it.

    Takes minutes if the compiler's cache is cold. The engine must have no requests.
    """
    assert not engine.active
    for n_rows in [engine.slots] if engine.exact else _round_up_values(1, engine.slots):
        for span in [engine.context] if engine.exact else _round_up_values(engine.min_span, engine.context):
            for draw_settings in (USUAL, GENERAL):
                _run_step(engine, torch.full((n_rows,), NO_TOKEN), n_rows, span=span, **draw_settings)


def _round_up(n: int, least: int, most: int) -> int:
    """Return the smallest least·2ⁱ that is at least `n`, or `most`."""
    while least < n:
        least *= 2
    return min(least, most)


def _round_up_values(least: int, most: int) -> list[int]:
    values = [min(least, most)]
    while values[-1] < most:
        values.append(_round_up(values[-1] + 1, least, most))
    return values


def _dispatch_step(engine: Engine) -> _PendingStep:
    """Start a step of all rows without waiting for it."""
    n_used, longest = _compact_slots(engine), max(row.length for row in engine.active.values()) + engine.async_depth
    n_rows = engine.slots if engine.exact else _round_up(n_used, 1, engine.slots)
    span = engine.context if engine.exact else _round_up(longest, engine.min_span, engine.context)
    control, rows = [NO_TOKEN] * n_rows, []
    for row in engine.active.values():
        if row.feed:
            control[row.slot] = row.feed.popleft()
        elif row.resume:
            control[row.slot], row.resume = RESUME, False
        if not row.feed:
            rows.append((row.slot, row))
    draw_settings = _draw_settings([row.request for row in engine.active.values()], engine.config.vocab_size)
    drawn_B, ready = _run_step(engine, torch.tensor(control), n_rows, span=span, **draw_settings)
    return _PendingStep(drawn_B, ready, rows)


def _draw_settings(requests: Sequence[Request], vocab_size: int) -> dict[str, Any]:
    """Return the cheapest settings of `sampling.draw` that serve all requests."""
    top_ks = [request.top_k for request in requests if request.temperature > 0]
    if all(0 < top_k <= USUAL["candidates"] for top_k in top_ks):
        return USUAL
    return GENERAL if max(top_ks) <= GENERAL["candidates"] else GENERAL | {"candidates": vocab_size}


def _compact_slots(engine: Engine) -> int:
    """Move the last rows into free slots where that halves the batch; returns the number of slots in use."""
    rows = sorted(engine.active.values(), key=lambda row: row.slot)
    fewest = _round_up(len(rows), 1, engine.slots)
    free = iter(sorted(set(range(fewest)) - {row.slot for row in rows}))
    for row in rows:
        if row.slot < fewest or engine.exact:
            continue
        slot, source = next(free), row.slot
        kv_cache.copy_row_(engine.cache, slot, engine.cache, source)
        for x in engine.row_state.values():
            x[slot] = x[source]
        # A pending step may still draw for the old slot: it runs before this copy, and is read by its old slot.
        row.slot = slot
    return max(row.slot for row in rows) + 1


def _run_step(
    engine: Engine, control_B: Tensor, n_rows: int, **shape_settings: Any
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Run the step for the first rows; returns the drawn ids on the host, and the event after which they are valid."""
    cache = kv_cache.first_rows(engine.cache, n_rows)
    row_state = {name: x[:n_rows] for name, x in engine.row_state.items()}
    settings = {"config": engine.config, "compute": engine.compute, "blocking": engine.tools.blocking, **shape_settings}
    if engine.graphs is None:
        drawn_B = engine.step_fn(engine.params, cache, row_state, control_B.to(row_state["token"].device), **settings)
        return drawn_B.cpu(), None
    shape = (n_rows, *shape_settings.values())
    if shape not in engine.graphs:
        engine.graphs[shape] = _capture_graph(engine, cache, row_state, settings)
    graph, input_B, output_B = engine.graphs[shape]
    input_B.copy_(control_B.pin_memory(), non_blocking=True)
    graph.replay()
    host_B = torch.empty(n_rows, dtype=output_B.dtype, pin_memory=True)
    host_B.copy_(output_B, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host_B, ready


def _capture_graph(
    engine: Engine, cache: dict[str, Any], row_state: dict[str, Tensor], settings: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """Return (CUDA graph, its input, its output) of the step at this shape.

    The warm-up steps are real ones; what they change is restored, but for keys and values: those are written beyond
    each row's length, or to the slot of a ring that the next token overwrites.
    """
    input_B = torch.full_like(row_state["token"], NO_TOKEN)
    changed = [cache["length"], cache["before"], row_state["token"], row_state["live"]]
    saved = [x.clone() for x in changed]

    def call() -> Tensor:
        return engine.step_fn(engine.params, cache, row_state, input_B, **settings)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    for x, old in zip(changed, saved):
        x.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output_B = call()
    return graph, input_B, output_B


def _collect_step(engine: Engine, pending: _PendingStep) -> list[Event]:
    """Read a step's result and advance its rows."""
    if pending.ready is not None:
        pending.ready.synchronize()
    drawn, events = pending.drawn_B.tolist(), []
    for slot, row in pending.rows:
        if row.done or drawn[slot] == NO_TOKEN:
            continue
        token = drawn[slot]
        row.open_call, forced = tool_use.step(engine.tools, row.open_call, token)
        row.feed.extend((token, *forced) if forced else ())
        row.resume = token == engine.tools.call_end and not forced
        for i, new in enumerate((token, *forced)):
            row.n_new += 1
            full = row.n_new >= row.request.max_tokens or row.length >= engine.context
            finish = "stop" if new in engine.tools.stops else "length" if full else None
            events.append(Event(row.key, new, i == 0, finish))
            if finish:
                cancel(engine, row.key)
                break
    return events


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
    candidates: int,
    full_vocab: bool,
) -> Tensor:
    """Take one step of every row, in place; returns the drawn ids (B,), NO_TOKEN for a waiting row.

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
    drawn_B = sampling.draw(
        logits_BTV[:, 0],
        temperature_B=row_state["temperature"],
        top_k_B=row_state["top_k"],
        seed_B=row_state["seed"],
        position_B=new["length"],
        candidates=candidates,
        full_vocab=full_vocab,
    )
    tree.map(lambda old, x: old.copy_(x), cache, new)
    row_state["token"].copy_(torch.where(live_B, drawn_B, token_B))
    # No torch.tensor(blocking): a CUDA graph cannot copy from the host.
    continues_B = functools.reduce(torch.logical_and, [drawn_B != token for token in blocking])
    row_state["live"].copy_(live_B & continues_B)
    return torch.where(live_B, drawn_B, NO_TOKEN)
