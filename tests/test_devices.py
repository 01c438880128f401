"""What a GPU has to do as the CPU does; each test runs on the CPU too, where it shows that it would notice.

`pytest -m gpu` runs the CUDA side of these and of the tests beside the code: five minutes on one H100 with an empty
compiler cache. On CUDA the engine and the steps are compiled, on the CPU not: that is tested elsewhere.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded_steps
import tiny_run
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_engine import TOKENIZER, prompt, rows
from small_model import random_batch, random_params
from torch.utils._python_dispatch import TorchDispatchMode

from experiments import pretrain
from nanochat import distributed, model, train, tree
from nanochat.config import UserError
from nanochat.distributed import Runtime, ShardingConfig, ShardingPlan, runtime, sharding
from nanochat.infer import Engine, Request, engine
from nanochat.model import Compute, ModelConfig, attention, kv_cache, loss
from nanochat.train import planner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
# Of two heads of 64: kernels on CUDA take no less. Windows of 128 and 256, and rows that fp8 accepts.
CONFIG = ModelConfig(256, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)


def here(device: str, dtype: torch.dtype | None = None) -> Runtime:
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    return dataclasses.replace(runtime.init(device), compute_dtype=dtype)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Let float32 be float32 on the GPU as well: `runtime.init` allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        yield
    torch.set_float32_matmul_precision(before)


# Decoding


def start(params: Any, device: str, **settings: Any) -> Engine:
    options = {"slots": 3, "context": 512, "device": device, "compile": device == "cuda", "async_depth": 1}
    return engine.start(params, CONFIG, TOKENIZER, **options | settings)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (slot, old slot) of rows that are moved."""
    moved, copy_row_ = [], kv_cache.copy_row_
    monkeypatch.setattr(kv_cache, "copy_row_", lambda c, new, old: (moved.append((new, old)), copy_row_(c, new, old)))
    return moved


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_equals_rows_alone_on_the_cpu(device: str, dtype: torch.dtype, moves: list[Any]) -> None:
    """Rows that come, go and move; spans that grow; up to the first token that is as likely as the next best one."""
    params = random_params(CONFIG, dtype=dtype, noise=0.3)
    lengths = ((3, 20), (150, 9), (254, 20), *((n, n - 12) for n in range(20, 32)))  # spans of 256 and 512 if compiled
    requests = [Request(prompt(n, n), max_tokens=m, temperature=0.0) for n, m in lengths]
    alone = start(params, "cpu", slots=1, compile=False, dtype=dtype)
    least = 0.005 if dtype == torch.float32 else 0.1  # between log-probabilities, beyond what rounding moves
    llm = start(params, device, dtype=dtype, slots=4)
    got, compared = rows(engine.run(llm, requests)), 0
    assert 254 + len(got[2]) > 256 + llm.async_depth and moves, "a span and a move less than meant"
    for key, request in enumerate(requests):
        for i, event in enumerate(engine.run(alone, [dataclasses.replace(request, logprobs=2)])):
            assert event.logprobs
            best, second = (p for _, p in event.logprobs.top[:2])
            if best - second < least:
                break
            assert got[key][i] == event.token, f"request {key}, token {i}"
            compared += 1
    print(f"{compared} of {sum(map(len, got.values()))} tokens compared")
    assert compared > (100 if dtype == torch.float32 else 40)


def scripted_params(texts: list[list[int]]) -> model.Params:
    """Return parameters whose likeliest token after each one is the next of the texts, whatever came before it."""
    params = random_params(CONFIG, noise=0.01)
    vector_VC = F.normalize(torch.randn(CONFIG.padded_vocab, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    params["wte"].copy_(vector_VC)
    params["lm_head"].zero_()
    for text in texts:
        for token, following in itertools.pairwise(text):
            params["lm_head"][following] += vector_VC[token]
    return params


def special(*names: str) -> list[int]:
    return [TOKENIZER.special(f"<|{name}|>") for name in names]


@devices
def test_tool_calls_wait_for_their_result_in_recorded_steps(device: str, moves: list[Any]) -> None:
    call = [*special("python_start"), *b"6*7", *special("python_end")]
    output_start, output_end, end = special("output_start", "output_end", "assistant_end")
    chain = [*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ!?&%$#", end]  # the last to end, in the last slot
    texts = [[*b"abcde", *call], [output_end, *b"xyz", end], chain]
    requests = [Request((*prompt(n, n), first), temperature=0.0) for n, first in zip((4, 9, 30), b"daA")]
    requests.append(Request((ord("H"), ord("c")), temperature=0.0))
    got = rows(engine.run(start(scripted_params(texts), device), requests))
    answer = [*call, output_start, *b"42", output_end, *b"xyz", end]
    assert got == dict(enumerate([[*b"e", *answer], [*b"bcde", *answer], chain[1:], [*b"de", *answer]])) and moves


@devices
def test_recorded_steps_use_reloaded_parameters(device: str) -> None:
    requests = [Request(prompt(n, n), max_tokens=9, temperature=0.0) for n in (5, 12, 12)]
    first, second = random_params(CONFIG), random_params(CONFIG, seed=1)
    want = [rows(engine.run(start(params, device), requests)) for params in (first, second)]
    llm = start(first, device, copy_params=True)
    assert rows(engine.run(llm, requests)) == want[0] != want[1]
    graphs = llm.graphs or {}
    recorded = dict(graphs)
    engine.load_params_(llm, second)
    assert rows(engine.run(llm, requests)) == want[1]
    assert bool(recorded) == (device == "cuda") and all(graphs[shape] is recorded[shape] for shape in recorded)


# Training


class NoReads(TorchDispatchMode):
    """Within, a value that the host reads of a tensor is an error: what makes it wait for a GPU."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise RuntimeError(f"called a synchronizing operation: {op.name()}")
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(NoReads())
        yield


def build(device: str, config: ModelConfig, *, rows: int, kernel: Any, compile: bool, linear: Any = "dense") -> Any:
    """Return (the stage's step, its first state, the runtime)."""
    settings = train.StageConfig(
        compile=compile, train=train.TrainConfig(attention=kernel, linear=linear), device_batch_size=rows
    )
    place = here(device, torch.bfloat16)
    step, _, _ = train.build_step_functions(settings, config, place)
    params = tree.to(random_params(config, dtype=place.compute_dtype, noise=0.1), place.device)
    return step, train.init(params, model.spec(config), place.compute_dtype), place


@devices
def test_a_step_waits_for_nothing_and_takes_the_planned_memory(device: str) -> None:
    """Reading the numbers is the one wait of a step, and comes after it. The CPU counts no memory of tensors."""
    cuda = device == "cuda"
    config = model.from_depth(4, sequence_len=2048, vocab_size=32768) if cuda else CONFIG
    n_rows = 16 if cuda else 2
    gc.collect()
    held = torch.cuda.memory_allocated() if cuda else 0  # by tests before
    step, state, place = build(device, config, rows=n_rows, kernel="flash" if cuda else "sdpa", compile=cuda)
    batches = [tree.to(random_batch(config, n_rows, seed=i), place.device) for i in range(2)]
    hparams = sharded_steps.hparams(0)
    state, metrics = step(state, batches, hparams)  # compiles
    for _ in range(2):
        distributed.synchronize(place.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with no_waits(device):
            state, metrics = step(state, batches, hparams)
    with no_waits(device), pytest.raises(RuntimeError, match="called a synchronizing"):
        float(metrics["loss"])
    assert float(metrics["finite"]) == 1
    if cuda:
        planned = planner.memory(config, planner.Setup(), rows=n_rows, micro_batches=2).allocated
        assert torch.cuda.max_memory_allocated() - held == pytest.approx(planned, rel=0.1)


def losses_of(step: Any, state: Any, place: Runtime, n_steps: int) -> torch.Tensor:
    """Return the losses of steps on new text each, in which a token follows from the one before and a draw of three."""
    values, generator = [], torch.Generator().manual_seed(0)
    for i in range(n_steps):
        ids = torch.randint(3, (2, CONFIG.sequence_len + 1), generator=generator)
        for t in range(1, ids.shape[1]):
            ids[:, t] = (ids[:, t] + 5 * ids[:, t - 1] + 7) % 256
        batch = tree.to(sharded_steps.batch(ids), place.device)
        state, metrics = step(state, [batch], sharded_steps.hparams(min(i, 9)))
        values.append(metrics["loss"].float())
    return torch.stack(values).cpu()


@functools.cache
def exact_losses(device: str, config: ModelConfig, n_steps: int) -> torch.Tensor:
    """Return the losses of steps in float32 with attention in plain operations."""
    place = here(device, torch.float32)
    loss_fn = functools.partial(loss.next_token, config=config, compute=Compute(attend=attention.math))
    update = train.make_update(donate=True)
    step = functools.partial(train.train_step, value_and_grad=train.gradient(loss_fn), update=update)
    params = tree.to(random_params(config, noise=0.1), place.device)
    return losses_of(step, train.init(params, model.spec(config)), place, n_steps)


CASES = [("cpu", "sdpa", "dense", 5), ("cpu", "sdpa", "fp8", 5)]
CASES += [("cuda", kernel, "dense", 40) for kernel in attention.KERNELS if kernel != "math"]
CASES += [("cuda", "sdpa", "fp8", 40)]


@pytest.mark.parametrize(
    ("device", "kernel", "linear", "n_steps"),
    [pytest.param(*case, marks=[pytest.mark.gpu] * (case[0] == "cuda")) for case in CASES],
)
def test_training_in_16_and_8_bits_follows_float32(device: str, kernel: Any, linear: Any, n_steps: int) -> None:
    config = dataclasses.replace(CONFIG, window_pattern="L") if kernel == "cudnn" else CONFIG  # it has no windows
    try:
        step, state, place = build(device, config, rows=2, kernel=kernel, linear=linear, compile=kernel == "flex")
    except UserError as error:
        if kernel in ("sdpa", "flex"):
            raise
        pytest.skip(str(error))
    got, want = losses_of(step, state, place, n_steps), exact_losses(device, config, n_steps)
    assert want[-1] < want[0] - 0.2, "nothing was learned"
    print(f"largest relative difference: {float(((got - want).abs() / want).max()):.1e}")
    assert ((got - want).abs() / want).max() < (0.005 if linear == "dense" else 0.03)


@pytest.mark.slow
@devices
def test_a_stopped_run_resumes_bit_for_bit(device: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic algorithms, which runs on the CPU always have."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition
    place = here(device, torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")

    def run(name: str, *more: str) -> Path:
        steps = ("num_iterations=3", "checkpoint.every_steps=3", "eval.every_steps=none", "eval.prompts=none")
        config = tiny_run.pretrain_config(
            *steps, f"name={name}_{device}", f"device={device}", "train.attention=math", *more
        )
        pretrain.run(config, place)
        return train.run_folder(str(config.name))

    try:
        unbroken = run("unbroken")
        with tiny_run.stop_after(1):
            run("stopped")
        assert tiny_run.saved_steps(train.run_folder(f"stopped_{device}")) == [1]
        tiny_run.assert_same_run(run("stopped", "resume=true"), unbroken)
    finally:
        torch.use_deterministic_algorithms(device == "cpu")


# Collectives


@contextlib.contextmanager
def group_of_one(device: str) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@devices
def test_every_collective_on_a_mesh_of_one(device: str) -> None:
    """A step through every collective of a sharded one equals a step without: NCCL takes all that it is given."""
    place, spec = here(device, torch.float32), model.spec(sharded_steps.CONFIG)
    dims = {name: distributed.shard_dim(row.shape, row.axes, 2) for name, row in spec.items()}
    no_regather = frozenset(name for name, row in spec.items() if row.embedding)
    batch = tree.to(sharded_steps.batch(sharded_steps.data()[0, 0]), place.device)

    def one_step(plan: ShardingPlan | None) -> dict[str, torch.Tensor]:
        state, step = sharded_steps.start(plan)
        state = tree.map(lambda x: x.to(place.device), state)
        state, _ = step(state, [batch, batch], sharded_steps.hparams(0))
        return tree.flatten(sharding.local_shards(state.params))

    want = one_step(None)
    with group_of_one(device), sharded_steps.Counter() as called:
        mesh = sharding._mesh(place.device.type, (1, 1), dist.group.WORLD)
        modes: Any = (("replicate", "layer"), ("zero2", "layer"), ("fsdp", "step"))
        for mode, gather in modes:
            plan = ShardingPlan(ShardingConfig(mode).resolved_mode, mesh, dims, no_regather, gather)
            assert plan.sharded
            got = one_step(plan)
            for name, x in want.items():
                torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6, msg=f"{mode}: {name}")
        x = torch.randn(4, 6, device=place.device, requires_grad=True)
        (gathered,) = sharding._Gather.apply((1,), 1, plan.group("shard"), torch.float32, x)  # of a layer
        gathered.square().sum().backward()
        assert x.grad is not None and torch.equal(gathered, x) and torch.equal(x.grad, 2 * x)
    used = {word.split("(")[0] for word in Path(sharding.__file__).read_text().split("_ops.")[1:]} - {"wait_tensor"}
    assert set(called.counts) == {name.removesuffix("_") for name in used}


# Attention of new lengths


@devices
def test_a_new_length_costs_attention_no_plan(device: str) -> None:
    """The first call of each length beside the second: cuDNN would plan for a tenth of a second and more."""
    place, extra = here(device), {}
    for length in (64, 100, 101, 333, 700, 1500):  # the first loads kernels
        q = torch.randn(1, 4, length, 64, device=place.device, dtype=place.compute_dtype)
        seconds = []
        for _ in range(2):
            distributed.synchronize(place.device)
            begin = time.perf_counter()
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            distributed.synchronize(place.device)
            seconds.append(time.perf_counter() - begin)
        extra[length] = seconds[0] - seconds[1]
    print({length: f"{1e3 * value:.2f} ms" for length, value in extra.items()})
    assert statistics.median([*extra.values()][1:]) < 0.02
