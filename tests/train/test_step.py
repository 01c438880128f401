"""The training step: pure or in place, accumulated, compiled, non-finite steps; and the training loop."""

import dataclasses
import functools
import itertools
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from small_model import CONFIG, Unchanged, assert_trees_close, random_batch, random_params
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import model, optim, train, transform, tree
from nanochat.config import UserError
from nanochat.data import prefetch
from nanochat.distributed import Runtime, compile_fn, sharding
from nanochat.model import Compute, ModelConfig, attention, loss
from nanochat.train import Progress, TrainState
from nanochat.train import step as steps

CPU = Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.float32)
CUDA = Runtime(0, 0, 1, 1, 0, torch.device("cuda"), torch.bfloat16)


def hparams_of(config: ModelConfig) -> optim.Hparams:
    return optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), config.n_embd))


HPARAMS = hparams_of(CONFIG)


def new_state(compute_dtype: torch.dtype = torch.float32, stored: torch.dtype = torch.float32) -> TrainState:
    return train.init(random_params(dtype=stored), model.spec(CONFIG), compute_dtype)


def poisoned_loss(params: TensorDict, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's loss; with batch["poison"] 1 it is nan, with 2 it is finite and its gradient is not."""
    value, aux = loss.next_token(params, batch, config=CONFIG)
    poison = int(batch["poison"][0])
    if poison == 1:
        value = value * torch.nan
    if poison == 2:
        value = value + (0 * params["smear_lambda"]).sqrt().sum()
    return value, aux


def batch_of(rows: int = 4, seed: int = 0, poison: int = 0) -> dict[str, Tensor]:
    """Return a batch without masked targets, so that micro-batches have equal weights."""
    ids = random_batch(rows=rows, seed=seed)["inputs"]
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "poison": torch.full((rows,), poison)}


def make_step(*, donate: bool = False, compute_dtype: torch.dtype = torch.float32) -> Any:
    return functools.partial(
        train.train_step,
        value_and_grad=train.gradient(poisoned_loss),
        update=train.make_update(compute_dtype=compute_dtype, donate=donate),
    )


def copy_of(state: TrainState) -> TrainState:
    return tree.map(lambda x: x.clone(), state)


def assert_equal(a: Any, b: Any) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


# --- one step -------------------------------------------------------------------------------------------------------


def test_step_is_pure_and_updates_all_parameters():
    state, batch = new_state(), batch_of()
    with Unchanged(state, batch, HPARAMS):
        new, metrics = make_step()(state, [batch], HPARAMS)
    assert new.step == 1 and new.opt_state["step"] == 1
    moved = tree.map(lambda a, b: not torch.equal(a, b), new.params, state.params)
    assert all(tree.leaves(moved))
    assert_equal(new.scaler, state.scaler)
    value = loss.next_token(state.params, batch, config=CONFIG)[0]
    assert torch.equal(metrics["loss"], value) and bool(metrics["finite"])
    grads, _ = transform.value_and_grad(lambda p: loss.next_token(p, batch, config=CONFIG)[0])(state.params)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in tree.leaves(grads)))
    assert math.isclose(metrics["grad_norm"], norm, rel_tol=1e-5)
    assert not any(x.requires_grad for x in tree.leaves((new, metrics)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_step_overwrites_state_with_the_same_values(dtype: torch.dtype):
    state = new_state(dtype, stored=dtype)
    addresses = [x.data_ptr() for x in tree.leaves(state[1:3])]
    pure, inplace = (make_step(compute_dtype=dtype, donate=donate) for donate in (False, True))
    for seed in (0, 1):
        want, wanted_metrics = pure(copy_of(state), [batch_of(seed=seed)], HPARAMS)
        state, metrics = inplace(state, [batch_of(seed=seed)], HPARAMS)
        assert [x.data_ptr() for x in tree.leaves(state[1:3])] == addresses
        assert_equal(state, want)
        assert_equal(metrics, wanted_metrics)


@pytest.mark.parametrize("n_batches", [1, 3])
def test_matrices_are_cast_once_a_step_with_the_same_numbers(n_batches: int):
    runtime = dataclasses.replace(CPU, compute_dtype=torch.bfloat16)
    step, _, _ = train.build_step_functions(train.StageConfig(compile=False), CONFIG, runtime)
    batches = [{k: x for k, x in batch_of(seed=seed).items() if k != "poison"} for seed in range(n_batches)]
    matrices = [n for n, row in model.spec(CONFIG).items() if row.matmul and n != "lm_head"]
    state, casts = new_state(torch.bfloat16, torch.bfloat16), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                casts.extend(n for n in matrices if args[0].data_ptr() == state.params[tuple(n.split("."))].data_ptr())
            return func(*args, **(kwargs or {}))

    want, wanted_metrics = step(copy_of(state), batches, HPARAMS, gather=lambda params: params)
    with Casts():
        got, metrics = step(state, batches, HPARAMS)
    assert sorted(casts) == sorted(matrices)
    assert_equal(got, want)
    assert_equal(metrics, wanted_metrics)


def test_micro_batches_match_one_large_batch():
    batch = batch_of(rows=6)
    parts = train.split_batch(batch, 2)
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)
    assert [len(part["inputs"]) for part in parts] == [2, 2, 2]
    whole, metrics = make_step()(new_state(), [batch], HPARAMS)
    accumulated, more = make_step()(new_state(), parts, HPARAMS)
    torch.testing.assert_close(metrics, more)
    # One step of Muon and AdamW divides by the size of the gradient: rounding is all that may differ.
    assert_trees_close(accumulated.params, whole.params, rtol=1e-3)
    assert_trees_close(accumulated.opt_state, whole.opt_state, rtol=1e-4)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("poison", [1, 2])
def test_nonfinite_step_keeps_parameters_and_moments(poison: int, donate: bool):
    state, _ = make_step()(new_state(), [batch_of()], HPARAMS)  # moments that are not zero
    before = copy_of(state)
    new, metrics = make_step(donate=donate)(state, [batch_of(), batch_of(poison=poison)], HPARAMS)
    assert not metrics["finite"]
    assert metrics["loss"].isfinite() == (poison == 2)
    assert not metrics["grad_norm"].isfinite()
    assert_equal(new[1:], before[1:])
    assert new.step == 2 and new.opt_state["step"] == 1, "the data moves on, the moments' count does not"


def test_micro_batches_hold_one_sum_and_one_gradient():
    alive: list[weakref.ref] = []
    value_and_grad = train.gradient(poisoned_loss)

    def watched(*args: Any) -> Any:
        assert not any(ref() is not None for ref in alive[n_leaves:]), "gradients of the micro-batch before"
        grads, aux = value_and_grad(*args)
        alive.extend(map(weakref.ref, tree.leaves(grads)))
        return grads, aux

    state = new_state(torch.bfloat16, stored=torch.bfloat16)
    n_leaves = len(tree.leaves(state.params))
    _, metrics = make_step()(state, train.split_batch(batch_of(rows=6), 2), HPARAMS, value_and_grad=watched)
    assert len(alive) == 3 * n_leaves and metrics["finite"]
    assert all(ref() is None for ref in alive), "the sum is in float32: bfloat16 gradients are freed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_step_reads_nothing_from_the_device(dtype: torch.dtype):
    """On the meta device, which has no values to read: item, nonzero and copies to the CPU raise."""
    state = train.init(tree.to(random_params(), "meta"), model.spec(CONFIG), dtype)
    state = state._replace(ema=train.build.init_ema(state.params, None))
    update = train.build.with_ema(train.make_update(compute_dtype=dtype, donate=True), 0.9, None)
    loss_fn = functools.partial(loss.next_token, config=CONFIG, chunk_tokens=4)
    step = functools.partial(train.train_step, value_and_grad=train.gradient(loss_fn), update=update)
    batch = tree.to({name: x for name, x in batch_of().items() if name != "poison"}, "meta")
    state, metrics = train.scheduled(step, 2, schedule=lambda *_: HPARAMS)(state, batch, 0, {})
    assert [name for name, x in metrics.items() if not isinstance(x, Tensor)] == ["lr_factor", "muon_momentum"]
    with pytest.raises(RuntimeError, match="meta"):
        int(state.step)


def test_torch_func_trains_like_autograd_with_the_chunked_loss(monkeypatch: pytest.MonkeyPatch):
    settings = [train.StageConfig(compile=False, train=train.TrainConfig(grad=g)) for g in ("autograd", "torch_func")]
    steps = [train.build_step_functions(config, CONFIG, CPU)[0] for config in settings]
    batches = train.split_batch({name: x for name, x in batch_of().items() if name != "poison"}, 2)
    want, got = ([step(new_state(), batches, HPARAMS)] for step in steps)
    assert_equal(got, want)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the chunked loss was called")

    monkeypatch.setattr(loss, "chunked", refuse)
    for step in steps:
        with pytest.raises(AssertionError, match="the chunked loss was called"):
            step(new_state(), batches, HPARAMS)


def test_torch_func_refuses_what_it_cannot_differentiate(monkeypatch: pytest.MonkeyPatch):
    config = train.StageConfig(train=train.TrainConfig(grad="torch_func"))
    flex = dataclasses.replace(config, train=dataclasses.replace(config.train, attention="flex"))
    with pytest.raises(UserError, match=r"train\.attention=flex has no gradient by torch\.func"):
        train.build_step_functions(flex, CONFIG, CPU)
    monkeypatch.setattr(sharding, "gather_layer", lambda *_: dict)
    with pytest.raises(UserError, match=r"sharding\.mode=\w+ gathers each layer inside of the gradient"):
        train.build_step_functions(config, CONFIG, CPU)
    less = dataclasses.replace(config, train=dataclasses.replace(config.train, memory_budget=0.5))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"train\.memory_budget=0\.5 has no effect with train\.grad=torch_func"):
        train.build_step_functions(less, CONFIG, CPU)


def test_embeddings_stay_in_half_precision():
    state = new_state(torch.bfloat16, stored=torch.bfloat16)
    want, wanted_metrics = make_step()(new_state(), [batch_of()], HPARAMS)
    new, metrics = make_step(compute_dtype=torch.bfloat16)(state, [batch_of()], HPARAMS)
    assert [x.dtype for x in tree.leaves(new)] == [x.dtype for x in tree.leaves(state)]
    assert math.isclose(metrics["loss"], wanted_metrics["loss"], rel_tol=0.02)
    assert math.isclose(metrics["grad_norm"], wanted_metrics["grad_norm"], rel_tol=0.05)
    assert (new.params["lm_head"] - want.params["lm_head"]).abs().mean() < 0.1 * 0.04  # of a step of 0.04


# --- float16's loss scale -------------------------------------------------------------------------------------------


def test_update_is_unscaled():
    state, plain = new_state(torch.float16), new_state()
    assert state.scaler["scale"] == 2.0**16 and plain.scaler["scale"] == 1
    half, metrics = make_step(compute_dtype=torch.float16)(state, train.split_batch(batch_of(), 2), HPARAMS)
    want, wanted_metrics = make_step()(plain, train.split_batch(batch_of(), 2), HPARAMS)
    assert_equal(half[:3], want[:3])  # a power of two: not even the rounding differs
    assert_equal(metrics, wanted_metrics)
    assert half.scaler["good_steps"] == 1


def test_loss_scale_of_float16_alone_halves_and_doubles():
    state, _ = make_step(compute_dtype=torch.bfloat16)(new_state(torch.bfloat16), [batch_of(poison=1)], HPARAMS)
    assert (state.scaler["scale"], state.scaler["good_steps"]) == (1.0, 0)
    step = make_step(compute_dtype=torch.float16, donate=True)
    state, _ = step(new_state(torch.float16), [batch_of(poison=1)], HPARAMS)
    assert (state.scaler["scale"], state.scaler["good_steps"]) == (2.0**15, 0)
    state, _ = step(state, [batch_of()], HPARAMS)
    state, _ = step(state, [batch_of(poison=2)], HPARAMS)
    assert (state.scaler["scale"], state.scaler["good_steps"]) == (2.0**14, 0), "the count starts anew"
    state.scaler["good_steps"].fill_(1998)
    state, _ = step(state, [batch_of()], HPARAMS)
    assert (state.scaler["scale"], state.scaler["good_steps"]) == (2.0**14, 1999)
    state, _ = step(state, [batch_of()], HPARAMS)
    assert (state.scaler["scale"], state.scaler["good_steps"]) == (2.0**15, 0)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
def test_compiled_gradients_match_eager_with_chunked_loss():
    config = ModelConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    params, scale = random_params(config), torch.tensor(4.0)
    loss_fn = functools.partial(loss.next_token, config=config, chunk_tokens=12)  # 12, 12 and 8 tokens
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (train.gradient(loss_fn, compile=c) for c in (None, compile_fn))
    for seed in (0, 1):
        batch = random_batch(config, seed=seed)
        with Unchanged(params, batch):
            grads, values = compiled(params, batch, scale)
        wanted_grads, wanted = eager(params, batch, scale)
        torch.testing.assert_close(values, wanted)
        # With two layers, what is backed out is the last layer's own output: that gradient is zero but for rounding.
        assert_trees_close(grads, wanted_grads, rtol=1e-4, atol=1e-6)
        # Micro-batches are added into these in place: no two may share memory.
        assert len({g.untyped_storage().data_ptr() for g in tree.leaves(grads)}) == len(tree.leaves(grads))
    assert counters["stats"]["unique_graphs"] == 1, "the second batch compiled anew"


# --- advice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, depth, micro_batches, advice",
    [("base", 12, 64, True), ("base", 12, 8, False), ("rl", 12, 64, False), ("base", 2, 64, False)],
)
def test_many_micro_batches_and_a_cheap_optimizer_are_worth_a_line(stage, depth, micro_batches, advice, capsys):
    shape = model.from_depth(depth, vocab_size=32768, sequence_len=2048 if depth > 2 else 16)
    tokens = 8 * micro_batches * shape.sequence_len
    train.build.advise_accumulation(stage, model.spec(shape), micro_batches, model.flops_per_token(shape) * tokens)
    printed = capsys.readouterr().out
    assert printed.count("\n") == advice and (f"a step is {micro_batches} micro-batches" in printed) == advice


# --- the loop -------------------------------------------------------------------------------------------------------


class Run:
    """A loop over seeded batches that records its calls."""

    def __init__(
        self, poisons: dict[int, int] | None = None, stop_after: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.poisons, self.stop_after, self.dtype = poisons or {}, stop_after, dtype
        self.saved: list[tuple[TrainState, Progress]] = []
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.scheduled: list[tuple[int, float]] = []

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Any, dict[str, float]]]:
        for i in itertools.count():
            yield batch_of(seed=i, poison=self.poisons.get(i, 0)), {"next": i + 1}, {"epoch": i / 10}

    def schedule(self, step: int, stats: Any) -> optim.Hparams:
        self.scheduled.append((step, stats["epoch"]))
        return HPARAMS

    def after_step(self, state: TrainState, progress: Progress, numbers: dict[str, float]) -> Progress:
        assert int(state.step) == progress.step
        self.steps.append((progress.step, numbers))
        if progress.step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return progress._replace(ema=numbers["loss"])

    def fit(self, num_steps: int, **options: Any) -> tuple[TrainState, Progress]:
        with train.stop_on_signals() as stop:
            return train.fit(
                new_state(self.dtype),
                Progress(),
                self.batches(),
                num_steps=num_steps,
                step_fn=train.scheduled(make_step(donate=True, compute_dtype=self.dtype), 2, schedule=self.schedule),
                after_step=self.after_step,
                save=lambda state, progress: self.saved.append((copy_of(state), progress)),
                stop=stop,
                **options,
            )


def test_fit_runs_all_steps_and_reports_metrics():
    run = Run()
    state, progress = run.fit(3)
    assert progress.step == 3 and int(state.step) == 3 and progress.loader == {"next": 3}
    assert run.scheduled == [(0, 0.0), (1, 0.1), (2, 0.2)] and run.saved == []
    assert [step for step, _ in run.steps] == [1, 2, 3]
    for i, (_, numbers) in enumerate(run.steps):
        timing = {"perf/step_seconds", "perf/data_wait_seconds"}
        assert set(numbers) == {"loss", "grad_norm", "epoch", "lr_factor", "muon_momentum", "loss_scale", *timing}
        assert numbers["epoch"] == i / 10 and numbers["lr_factor"] == pytest.approx(1)
        assert numbers["perf/step_seconds"] >= numbers["perf/data_wait_seconds"] >= 0
    assert progress.ema == run.steps[-1][1]["loss"], "after_step's progress is kept"


def test_stop_at_last_step_is_left_to_after_step():
    run = Run(stop_after=3)
    _, progress = run.fit(3)
    assert progress.step == 3 and run.saved == []


@pytest.mark.parametrize("poison, what", [(1, "loss"), (2, "gradient")])
def test_nonfinite_step_stops_run_with_last_good_state(poison: int, what: str):
    before, progress_before = Run().fit(2)
    run = Run(poisons={2: poison})
    with pytest.raises(train.NonFiniteLossError, match=f"^step 2: the {what} is not finite$"):
        run.fit(5)
    [(saved, progress)] = run.saved
    assert_equal(saved, before)
    assert int(saved.step) == progress.step == 2 and progress.loader == progress_before.loader == {"next": 2}


def test_skip_nonfinite_raises_after_too_many_in_a_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "MAX_SKIPPED_STEPS", 2)
    run = Run(poisons={0: 1, 1: 1, 3: 1, 4: 1, 5: 1})  # two, one good step, three
    with pytest.raises(train.NonFiniteLossError, match="step 5: the loss is not finite"):
        run.fit(9, skip_nonfinite=True)
    assert [progress.step for _, progress in run.saved] == [5]
    assert all(x.isfinite().all() for x in tree.leaves(run.saved[0][0]))


def outcome(run: Run, late: bool, **options: Any) -> tuple[Any, Any]:
    """Return how a run ended, with all that it reported, and its tensors."""
    state, ended = None, None
    try:
        state, ended = run.fit(6, needs_state=lambda step, _: not late, **options)
    except train.NonFiniteLossError as error:
        ended = str(error)
    rows = [(step, {n: x for n, x in numbers.items() if "perf" not in n}) for step, numbers in run.steps]
    ends = [ended, *(progress for _, progress in run.saved)]
    ends = [end._replace(wall_seconds=0.0) if isinstance(end, Progress) else end for end in ends]
    return (rows, ends), [saved for saved, _ in run.saved] if state is None else [state]


@pytest.mark.parametrize(
    "poisons, skip, dtype",
    [
        ({}, False, torch.float32),
        ({2: 1}, False, torch.float32),
        ({2: 2, 3: 1}, False, torch.bfloat16),
        ({1: 1, 2: 2, 4: 1}, True, torch.float16),
        ({0: 1, 2: 1, 3: 2, 4: 1}, True, torch.float32),
    ],
)
def test_numbers_read_a_step_late_are_those_read_at_once(poisons, skip, dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "MAX_SKIPPED_STEPS", 2)
    outcomes = [outcome(Run(poisons, dtype=dtype), late, skip_nonfinite=skip) for late in (False, True)]
    assert repr(outcomes[0][0]) == repr(outcomes[1][0])  # nan equals nan
    assert_equal(*(tensors for _, tensors in outcomes))


def test_next_batch_is_fetched_and_step_launched_before_numbers_are_read():
    def order(late: bool) -> str:
        run: Any = Run()
        events: list[str] = []
        schedule, after_step = run.schedule, run.after_step
        run.schedule = lambda *args: (events.append(f"launch {args[0]}"), schedule(*args))[1]
        run.after_step = lambda *args: (events.append(f"log {args[1].step}"), after_step(*args))[1]
        run.fit(4, needs_state=lambda step, _: not late or step == 3)
        return ", ".join(events)

    assert order(False) == "launch 0, log 1, launch 1, log 2, launch 2, log 3, launch 3, log 4"
    assert order(True) == "launch 0, launch 1, log 1, launch 2, log 2, log 3, launch 3, log 4"


def test_stop_reports_and_saves_the_step_that_is_under_way():
    stopped, whole = (Run(stop_after=after) for after in (2, None))
    (state, progress), (wanted, _) = (run.fit(n, needs_state=lambda *_: False) for run, n in ((stopped, 9), (whole, 3)))
    assert [step for step, _ in stopped.steps] == [1, 2, 3] and progress.step == 3
    assert [row["loss"] for _, row in stopped.steps] == [row["loss"] for _, row in whole.steps]
    [(saved, at)] = stopped.saved
    assert at.loader == {"next": 3} and at.ema == stopped.steps[-1][1]["loss"]
    assert_equal(saved, state)
    assert_equal(saved, wanted)


# --- signals --------------------------------------------------------------------------------------------------------


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_flag_and_handlers_are_restored(number: signal.Signals):
    before = handlers()
    with pytest.raises(ZeroDivisionError), train.stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # once more changes nothing
        assert stop.signal is number
        raise ZeroDivisionError
    assert handlers() == before


def test_second_ctrl_c_interrupts_but_duplicate_signal_does_not(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(steps.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), train.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now = 101.0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT
        now = 103.0
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the loop could not be interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["waits", "spins", "waits in the main thread"])
def test_signal_ends_a_wait_for_data(number: signal.Signals, how: str):
    released, run, began = threading.Event(), Run(), time.monotonic()

    def batches() -> Generator[Any, None, None]:
        yield from itertools.islice(Run().batches(), 2)
        while not released.wait(0 if how == "spins" else 60):
            pass

    run.batches = batches if how.endswith("main thread") else lambda: prefetch(batches(), 1)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    _, progress = run.fit(9)
    released.set()
    assert time.monotonic() - began < 50
    assert [saved.step for _, saved in run.saved] == [progress.step] == [2]


# --- CUDA -----------------------------------------------------------------------------------------------------------


WIDE = ModelConfig(
    sequence_len=512, vocab_size=4096, n_layer=2, n_head=2, n_kv_head=2, n_embd=256, window_pattern="SSSL"
)


@pytest.mark.gpu
@pytest.mark.parametrize(("linear", "tolerance"), [("dense", 0.02), ("fp8", 0.1)])
def test_compiled_gradients_on_cuda_are_close_to_plain_float32(linear: Any, tolerance: float):
    batch = {name: x.cuda() for name, x in random_batch(WIDE).items()}
    plain = Compute(torch.float32, attend=attention.math)
    params = tree.to(random_params(WIDE, noise=0.02), "cuda")
    plain_loss = functools.partial(loss.next_token, config=WIDE, compute=plain)
    wanted, _ = transform.value_and_grad(plain_loss, has_aux=True)(params, batch)
    params = tree.to(random_params(WIDE, dtype=torch.bfloat16, noise=0.02), "cuda")
    stage = train.StageConfig(train=train.TrainConfig(linear=linear), device_batch_size=2)
    value_and_grad = train.build_step_functions(stage, WIDE, CUDA)[0].keywords["value_and_grad"]
    grads, _ = value_and_grad(params, batch, torch.ones((), device="cuda"))
    want = torch.cat([g.flatten().double() for g in tree.leaves(wanted)])
    got = torch.cat([g.flatten().double() for g in tree.leaves(grads)])
    assert (got - want).norm() < tolerance * want.norm()
