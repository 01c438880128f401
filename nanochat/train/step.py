"""Training as a pure step on a state, and the loop around it that every stage uses."""

import contextlib
import functools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import distributed, optim, transform, tree
from nanochat.config import UserError
from nanochat.distributed import ShardingPlan, sharding
from nanochat.metrics import logger
from nanochat.model import ParamSpec
from nanochat.optim import Hparams, OptState

PROBLEM = 1000  # above all signals
NO_EMA = TensorDict({}, batch_size=[])
MAX_SKIPPED_STEPS = 50  # consecutive steps without a finite loss before skipping gives up

Batch = Mapping[str, Tensor]
Stats = Mapping[str, float]  # of a batch
Metrics = dict[str, Any]  # 0-d tensors and numbers


class TrainState(NamedTuple):
    """Everything that a step reads and changes, and that a checkpoint holds."""

    step: Tensor  # 0-d int64, steps done
    params: TensorDict
    opt_state: OptState
    scaler: TensorDict  # {"scale": 0-d float32 factor on the loss, 1 unless in float16; "good_steps": 0-d int64}
    ema: TensorDict = NO_EMA  # {"params": their float32 average, "steps": 0-d int64}, see `build.with_ema`


ValueAndGrad = Callable[[TensorDict, Batch, Tensor], tuple[TensorDict, tuple[Tensor, Tensor]]]
Update = Callable[[TrainState, TensorDict, Tensor, Tensor, Hparams], tuple[TrainState, Metrics]]
TrainStep = Callable[[TrainState, Sequence[Any], Hparams], tuple[TrainState, Metrics]]
StepFn = Callable[[TrainState, Any, int, Stats], tuple[TrainState, Metrics]]
Schedule = Callable[[int, Stats], Hparams]


def init(
    params: TensorDict,
    spec: Mapping[str, ParamSpec],
    compute_dtype: torch.dtype = torch.float32,
    sharding_plan: ShardingPlan | None = None,
) -> TrainState:
    """Return the state before the first step, on the device of `params` (the meta device included)."""
    device = tree.leaves(params)[0].device
    step = torch.zeros((), dtype=torch.int64, device=device)
    zeros = None if sharding_plan is None else functools.partial(sharding.zeros, sharding_plan, device=device)
    return TrainState(step, params, optim.init(params, spec, zeros), init_scaler(compute_dtype, device))


def init_scaler(compute_dtype: torch.dtype, device: torch.device) -> TensorDict:
    """Return the loss scale before the first step: 2**16 for float16, else 1."""
    scale = torch.full((), 2.0**16 if compute_dtype == torch.float16 else 1.0, device=device)
    good_steps = torch.zeros((), dtype=torch.int64, device=device)
    return TensorDict({"scale": scale, "good_steps": good_steps}, batch_size=[])


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    hparams: Hparams,
    *,
    value_and_grad: ValueAndGrad,
    update: Update,
    gather: Callable[[TensorDict], TensorDict] = lambda params: params,
) -> tuple[TrainState, Metrics]:
    """Return the state after one optimizer step, and {"loss", "grad_norm": 0-d float32, "finite": 0-d bool}.

    Where loss or gradient are not finite, only `step` and `scaler` change.

    Args:
        batches: this rank's micro-batches of equal size, whose gradients are averaged. hparams: see `optim.update`.
        value_and_grad: from `gradient`. update: from `make_update`; decides what changes in place.
        gather: parameters between steps -> parameters to compute with, see `sharding.gather`.
    """
    scale, params = state.scaler["scale"], gather(state.params)
    grads, (_, loss) = value_and_grad(params, batches[0], scale)
    total_dtype = torch.float32 if len(batches) > 1 else None  # a sum of many in bfloat16 would lose the late ones
    for name in [tuple(name.split(".")) for name in tree.flatten(grads)]:
        # One by one: no second copy of all is in memory.
        grads[name] = grads[name].to(total_dtype or state.params[name].dtype)
    for batch in batches[1:]:
        more, (_, value) = value_and_grad(params, batch, scale)
        tree.map(lambda total, g: total.add_(g), grads, more)  # nobody else has the sum: in place
        del more  # before the next ones are computed
        loss = loss + value
    del params  # gathered ones take memory that the update can use
    return update(state, grads, 1 / (len(batches) * scale), loss / len(batches), hparams)


def gradient(
    loss_fn: Callable[..., tuple[Tensor, Any]], *, grad: str = "autograd", compile: Callable[[Any], Any] | None = None
) -> ValueAndGrad:
    """Return (params, batch, scale) -> (gradients of scale·loss, (scale·loss, loss)).

    Args:
        loss_fn: (params, batch) -> (0-d loss, aux). grad: see `config.TrainConfig`.
        compile: `distributed.compile_fn` with its settings bound, or None.
    """
    compile = compile or (lambda f: f)

    def scaled(params: TensorDict, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = loss_fn(params, batch)
        return loss * scale, loss

    if grad == "torch_func":
        return compile(torch.func.grad_and_value(scaled, has_aux=True))
    # Only the loss is compiled: AOTAutograd keeps its partitioner, and custom backwards work.
    return transform.value_and_grad(compile(scaled), has_aux=True)


def make_update(
    *,
    compute_dtype: torch.dtype = torch.float32,
    compile: bool = False,
    donate: bool = False,
    sharding_plan: ShardingPlan | None = None,
) -> Update:
    """Return (state, grads, grad_scale, loss, hparams) -> (state, metrics), which skips a non-finite step.

    Loss and gradients, which are given up, are a rank's own; all ranks take or skip a step alike, by their means.

    Args:
        compute_dtype: Muon orthogonalizes in bfloat16 if this is bfloat16; float16 has a dynamic loss scale.
        compile: whether the donating update is compiled.
        donate: write the new state into the memory of the old one, which the caller gives up, instead of allocating
            a second one (as jax.jit's donate_argnums).
    """
    muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else None
    rules = optim.compiled() if compile and donate else None
    ranks = 1 if sharding_plan is None else sharding_plan.ranks

    @torch.no_grad()
    def update(
        state: TrainState, grads: TensorDict, grad_scale: Tensor, loss: Tensor, hparams: Hparams
    ) -> tuple[TrainState, Metrics]:
        sharding.reduce_(sharding_plan, grads)
        grad_scale = grad_scale / ranks
        loss, norm = sharding.mean_loss_and_grad_norm(sharding_plan, loss, grads)
        grad_norm = norm * grad_scale
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        step, params, opt_state, scaler, ema = state
        options: Any = {"grad_scale": grad_scale, "skip": ~finite, "muon_dtype": muon_dtype}
        if donate:
            optim.update_(grads, opt_state, params, hparams, rules=rules, sharding_plan=sharding_plan, **options)
        else:
            params, opt_state = optim.update(grads, opt_state, params, hparams, sharding_plan=sharding_plan, **options)
        scaler = _rescale(scaler, finite) if compute_dtype == torch.float16 else scaler
        metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite}
        return TrainState(step + 1, params, opt_state, scaler, ema), metrics

    return update


def _rescale(scaler: TensorDict, finite: Tensor, patience: int = 2000) -> TensorDict:
    """Return the loss scale halved after a non-finite step, doubled after `patience` finite ones."""
    good = torch.where(finite, scaler["good_steps"] + 1, 0)
    grown = good >= patience
    scale = torch.where(finite, torch.where(grown, scaler["scale"] * 2, scaler["scale"]), scaler["scale"] / 2)
    return TensorDict({"scale": scale, "good_steps": torch.where(grown, 0, good)}, batch_size=[])


def scheduled(train_step: TrainStep, rows: int | None = None, *, schedule: Schedule) -> StepFn:
    """Return the loop's step: (state, batch, number of the step, statistics of the batch) -> (state, metrics).

    Args:
        rows: of a micro-batch; None: the batch is not split. schedule: (number, statistics) -> hyperparameters.
    """

    def step_fn(state: TrainState, batch: Any, number: int, stats: Stats) -> tuple[TrainState, Metrics]:
        hparams = schedule(number, stats)
        state, metrics = train_step(state, [batch] if rows is None else split_batch(batch, rows), hparams)
        lr_factor = float(hparams["smear"]["lr"]) / optim.SMEAR_LR  # the one learning rate that no setting changes
        known = {"lr_factor": lr_factor, "muon_momentum": float(hparams[optim.MATRIX]["momentum"])}
        return state, metrics | known | {"loss_scale": state.scaler["scale"]}

    return step_fn


def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """Return a batch as micro-batches of `rows` rows each."""
    parts = {name: x.split(rows) for name, x in batch.items()}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


class NonFiniteLossError(UserError):
    """The loss or the gradient is not finite; the state is still that of before the step."""


class StopFlag:
    """Set by SIGTERM or SIGINT: the loop finishes its step, saves, and returns."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = 0.0
        self.waiting = False  # for data

    def agreed(self, problem: bool = False) -> bool:
        """Return whether any rank has a signal or a problem, and share the signal. A collective call."""
        code = distributed.all_reduce_max(PROBLEM if problem else int(self.signal or 0))
        if code and code != PROBLEM:
            self.signal = self.signal or signal.Signals(code)
        return bool(code)

    def wait(self, items: Iterator[Any]) -> Any:
        """Return the next item; None at the end, or at a signal, which does not wait and closes a generator."""
        with contextlib.suppress(KeyboardInterrupt):  # raised by the handler while `waiting`
            try:
                self.waiting = True
                return None if self.signal else next(items, None)
            finally:
                self.waiting = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Let the first SIGTERM or SIGINT set the flag and end a wait for data; a SIGINT two seconds later interrupts."""
    flag = StopFlag()

    def handle(number: int, _frame: Any) -> None:
        # torchrun forwards a Ctrl-C that the terminal has already sent, hence the two seconds.
        repeated = flag.signal and number == signal.SIGINT and time.monotonic() - flag.since > 2
        if not flag.signal:
            flag.signal, flag.since = signal.Signals(number), time.monotonic()
        if repeated or flag.waiting:
            flag.waiting = False
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress(NamedTuple):
    """What the loop keeps beside the state; saved with it, so that a resumed run equals an uninterrupted one."""

    step: int = 0  # steps done
    loader: Any = None  # the data loader's state; None before the first step
    ema: Any = None  # running loss, see logger.ema
    noise: Any = None  # see noise_scale.averaged
    skipped_steps: int = 0  # because loss or gradient were not finite
    tokens: int = 0  # of these steps, all ranks together
    timed_tokens: int = 0  # of the steps but the first ten of each start; so timed_seconds
    timed_seconds: float = 0.0
    wall_seconds: float = 0.0  # with evaluations, without the time between a stop and a resume
    done: bool = False  # whether the last step was the run's last


def fit(
    state: TrainState,
    progress: Progress,
    batches: Iterator[tuple[Any, Any, Stats]],
    *,
    num_steps: int | None,
    step_fn: StepFn,
    after_step: Callable[[TrainState, Progress, dict[str, float]], Progress],
    save: Callable[[TrainState, Progress], None],
    stop: StopFlag,
    skip_nonfinite: bool = False,
    needs_state: Callable[[int, Stats], bool] = lambda step, stats: True,
) -> tuple[TrainState, Progress]:
    """Run steps `progress.step` … num_steps - 1, or to the last batch; return the last state and progress.

    Args:
        batches: (batch of a whole step, loader state after it, statistics); all ranks come to its end together.
        step_fn: from `scheduled`; may change `state` in place.
        after_step: logs, saves and evaluates as is due, given the step's numbers; returns the progress, updated.
        save: called before the loop ends by a signal, a UserError of the data or (unless skipped) a non-finite step.
        needs_state: (steps done, statistics of the last batch) -> whether `after_step` reads the parameters. Otherwise
            it is called once the next step is launched, so that the device does not wait for the host.
    """
    launched, stopped, problem, skipped, since = progress.step, False, None, 0, time.perf_counter()
    unread, metrics, began = deque[tuple[Any, ...]](), Metrics(), since - progress.wall_seconds

    def finish(state: TrainState, scaler: TensorDict, loader: Any, read: Any, known: Stats) -> None:
        nonlocal progress, skipped, since
        numbers, ready = read()  # waits for the device, once per step
        skipped = 0 if numbers.pop("finite") else skipped + 1
        if skipped and (not skip_nonfinite or skipped > MAX_SKIPPED_STEPS):
            save(state._replace(step=torch.full_like(state.step, progress.step), scaler=scaler), progress)
            name = "loss" if not math.isfinite(numbers["loss"]) else "gradient"
            raise NonFiniteLossError(f"step {progress.step}: the {name} is not finite")
        total = progress.skipped_steps + bool(skipped)
        progress = progress._replace(
            step=progress.step + 1, loader=loader, skipped_steps=total, wall_seconds=ready - began
        )
        numbers |= {**known, "perf/step_seconds": ready - since}
        since = ready
        progress = after_step(state, progress, numbers)

    while num_steps is None or launched < num_steps:
        started = time.perf_counter()
        try:
            item = stop.wait(batches)
        except UserError as error:
            item, problem = None, error
        stopped = stop.agreed(problem is not None)  # on any rank: all ranks stop here together
        if stopped or item is None:
            break
        batch, loader, stats = item
        scaler, known = state.scaler, {**stats, "perf/data_wait_seconds": time.perf_counter() - started}
        if unread and not skip_nonfinite:  # infinite after a non-finite step, so that this one is skipped as well
            state = state._replace(scaler=scaler.replace(scale=scaler["scale"] / metrics["finite"]))
        state, metrics = step_fn(state, batch, launched, stats)
        unread.append((state, scaler, loader, logger.start_reading(metrics), known))
        launched += 1
        while unread and (len(unread) > 1 or skipped or needs_state(launched, stats)):
            finish(*unread.popleft())
        since = since if unread else time.perf_counter()  # without saving and evaluating
    while unread:
        finish(*unread.popleft())
    if stopped:
        save(state, progress)
        with distributed.raise_on_any_failure():  # the same message on all
            if problem:
                raise problem
    return state, progress
