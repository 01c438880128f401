"""The sections of bench_train's what=gpu: each measures or checks one subject, and prints and reports the numbers."""

import contextlib
import dataclasses
import functools
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import _bench, _jobs, _trace, bench_train
from experiments._bench import Limits, TrainStepBench
from experiments.bench_train import Config
from nanochat import distributed, model, optim, train, transform, tree
from nanochat.distributed import GIB, Runtime
from nanochat.model import Compute, ModelConfig, attention, linear, loss
from nanochat.text import table
from nanochat.train import StageConfig, planner

MEMORY_SHARE = 0.9  # of the free memory that a planned batch may take: one that fails costs a compilation
ATTENTION_SHARE = 0.65  # of a large product's rate: what FlashAttention-3 reports on Hopper, forward and backward
# Bytes/s of the data sheets, to predict a copy.
BANDWIDTH = {"NVIDIA B200": 8e12, "NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.0e12}


class Bench(NamedTuple):
    """What a section works with.

    Attributes:
        folder: of the results. report: keeps a row of numbers. limits: of the machine, measured on the first call.
        seconds_left: until the section is stopped.
    """

    config: Config
    runtime: Runtime
    folder: Path
    report: Callable[..., None]
    limits: Callable[[], Limits]
    seconds_left: Callable[[], float]

    @property
    def cuda(self) -> bool:
        return self.runtime.device.type == "cuda"

    def shape(self, depth: int) -> ModelConfig:
        return bench_train.resolve(dataclasses.replace(self.config, depth=depth))[1]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def release(bench: Bench) -> None:
    """Drop compiled code and cached memory, so that measurements do not affect each other."""
    torch.compiler.reset()
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


# Section limits


def limits_section(bench: Bench) -> None:
    """Measure what the machine reaches, beside its data sheet."""
    gpu = distributed.hardware.gpu_spec(_bench.device_name(bench.runtime))
    sheet = {"matmul": gpu and gpu.half_flops, "fp8": gpu and gpu.fp8_flops, "copy": gpu and BANDWIDTH.get(gpu.device)}
    # A large product is limited by power to about four fifths of the data sheet; a copy reaches nine tenths.
    shares = {"matmul": 0.8, "fp8": 0.75, "copy": 0.9}
    print(f"{_bench.device_name(bench.runtime)}, torch {torch.__version__}, {bench.runtime.compute_dtype}")
    for what, value in bench.limits()._asdict().items():
        if value is None:
            print(f"  {what:8} not available: this {bench.runtime.device.type} device has no float8 products")
            continue
        data_sheet = sheet[what]
        predicted = shares[what] * data_sheet if data_sheet else None
        text = f"predicted {shares[what] * data_sheet / 1e12:.4g} of {data_sheet / 1e12:.4g}" if data_sheet else "-"
        print(f"  {what:8} {value / 1e12:8.4g} {'TB/s' if what == 'copy' else 'TFLOP/s':8} ({text})")
        bench.report(what=what, value=value, predicted=predicted, data_sheet=data_sheet)


# Section check


def check_section(bench: Bench) -> None:
    """Run the tests that need a GPU, and meanwhile compare gradients and the loss in fp8."""
    log = bench.folder / "pytest.txt"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rf", bench.config.gpu.tests]
    with log.open("w") as file:
        tests = subprocess.Popen(command, cwd=_jobs.ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            check_gradients(bench)
            check_fp8_loss(bench)
            with contextlib.suppress(subprocess.TimeoutExpired):
                tests.wait(max(bench.seconds_left() - 20, 1))
            code = tests.poll()
        finally:
            if tests.poll() is None:
                tests.kill()
                tests.wait()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    outcome = {0: "passed", 5: "none selected", None: "stopped: no time left"}.get(code, "failed")
    last = lines[-1] if lines else "no output"
    print(f"  pytest -m gpu: {outcome}: {last} ({log})")
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:10]:
        print(f"    {line[:200]}")
    bench.report(what="pytest", outcome=outcome, last=last)


def small_shape(bench: Bench) -> ModelConfig:
    """Return a model small enough for a reference in float32."""
    shape = bench.shape(4)
    n_head = max(256 // shape.head_dim, 1)
    length, vocab_size = min(shape.sequence_len, 512), min(shape.vocab_size, 4096)
    return ModelConfig(length, vocab_size, 4, n_head, n_head, n_head * shape.head_dim, "SSSL")


def train_step(bench: Bench, shape: ModelConfig, rows: int, kind: Any) -> Any:
    settings = dataclasses.replace(bench.config.train, linear=kind)
    stage = StageConfig(compile=bench.config.compile, train=settings, device_batch_size=rows)
    return train.build_step_functions(stage, shape, bench.runtime)[0]


def nonzero_params(shape: ModelConfig, runtime: Runtime, dtype: torch.dtype) -> Any:
    """Return parameters without zeros, which would hide half of the gradients; the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    flat = {}
    for name, x in tree.flatten(model.init(shape, 0)).items():
        stored = model.storage_dtype(model.spec(shape)[name], dtype)
        flat[name] = (x + 0.02 * torch.randn(x.shape, generator=generator)).to(runtime.device, stored)
    return model.with_config(tree.unflatten(flat), shape)


def counting_batch(shape: ModelConfig, rows: int, runtime: Runtime, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return rows that a model can learn: each counts up from a random id by a random step of 1 to 4."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(shape.vocab_size, (rows, 1), generator=generator)
    step = torch.randint(1, 5, (rows, 1), generator=generator)
    ids = ((start + step * torch.arange(shape.sequence_len + 1)) % shape.vocab_size).to(runtime.device)
    return {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def verdict(within: bool) -> str:
    return "as predicted" if within else "MORE THAN PREDICTED"


def check_gradients(bench: Bench) -> None:
    """Compare the gradients of the step's loss with those of plain operations in float32."""
    shape, rows, runtime = small_shape(bench), 2, bench.runtime
    scale, batch = torch.ones((), device=runtime.device), counting_batch(shape, rows, runtime)
    plain = functools.partial(loss.next_token, config=shape, compute=Compute(torch.float32, attend=attention.math))
    params = nonzero_params(shape, runtime, torch.float32)
    grads, (reference_loss, _) = transform.value_and_grad(plain, has_aux=True)(params, batch)
    want = {name: g.double() for name, g in tree.flatten(grads).items()}
    norm = sum(float(g.square().sum()) for g in want.values()) ** 0.5
    for kind, predicted in {"dense": 0.02, "fp8": 0.1}.items():
        if kind not in bench.config.gpu.linears:
            continue
        value_and_grad = train_step(bench, shape, rows, kind).keywords["value_and_grad"]
        grads, (value, _) = value_and_grad(nonzero_params(shape, runtime, runtime.compute_dtype), batch, scale)
        got = {name: g.double() for name, g in tree.flatten(grads).items()}
        errors = {name: float((got[name] - g).norm() / g.norm().clamp_min(1e-30)) for name, g in want.items()}
        error = sum(float((got[name] - g).square().sum()) for name, g in want.items()) ** 0.5 / norm
        worst = max(errors, key=lambda name: errors[name])
        print(
            f"  gradients, {kind} in {runtime.compute_dtype}, compile={bench.config.compile}, against plain float32: "
            f"off by {error:.2%} of the norm (predicted under {predicted:.0%}: {verdict(error <= predicted)}); worst "
            f"{worst} {errors[worst]:.1%}; loss {float(value):.4f} / {float(reference_loss):.4f}"
        )
        bench.report(what=f"gradients {kind}", error=error, predicted=predicted, worst=worst, loss=float(value))


def check_fp8_loss(bench: Bench, steps: int = 40) -> None:
    """Train a small model with dense and with fp8 linear layers, and compare the final losses."""
    if "fp8" not in bench.config.gpu.linears:
        return
    shape, rows, runtime = small_shape(bench), 16 if bench.cuda else 2, bench.runtime
    losses = {}
    for kind in ("dense", "fp8"):
        step = train_step(bench, shape, rows, kind)
        params = model.init(shape, 0, device=runtime.device, dtype=runtime.compute_dtype)
        state = train.init(params, model.spec(shape), runtime.compute_dtype)
        hparams = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), shape.n_embd))
        history = []
        for i in range(steps if bench.cuda else 4):
            state, metrics = step(state, [counting_batch(shape, rows, runtime, i)], hparams)
            history.append(metrics["loss"])
        losses[kind] = statistics.mean(float(x) for x in history[-5:])
    change = losses["fp8"] / losses["dense"] - 1
    print(
        f"  loss of a short run: dense {losses['dense']:.4f}, fp8 {losses['fp8']:.4f}: {change:+.2%} (predicted within "
        f"2%: {verdict(abs(change) <= 0.02)}); linear layers in {linear.choose('fp8', runtime.device)[1]}"
    )
    bench.report(what="fp8 loss", **losses, change=change, predicted=0.02)


# Section train


def train_section(bench: Bench, depth: str, kind: Any) -> None:
    """Time the step of a depth at the largest batch that runs, alone and with gradient accumulation."""
    config, runtime, shape = bench.config, bench.runtime, bench.shape(int(depth))
    batches = sorted(config.gpu.batches, reverse=True) if bench.cuda else [min(config.gpu.batches)]
    room = torch.cuda.mem_get_info(runtime.device)[0] if bench.cuda else 0
    setup = planner.Setup(
        dtype=runtime.compute_dtype, fp8=kind == "fp8", chunk_tokens=config.train.chunk_tokens or 8192
    )
    for rows in batches:
        planned = planner.memory(shape, setup, rows=rows, micro_batches=1).allocated
        if bench.cuda and planned > MEMORY_SHARE * room and rows > min(batches):
            print(f"  batch {rows}: planned {planned / GIB:.1f} GiB of {room / GIB:.1f}: skipped")
            continue
        parts = _bench.roofline(shape, rows, bench.limits(), runtime.compute_dtype, setup.fp8)
        floor = sum(parts.values())
        print(f"  predicted: {describe(parts)}; in all at least {1000 * floor:.1f} ms", flush=True)
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats(runtime.device)
        settings = dataclasses.replace(config.train, linear=kind)
        settings = dataclasses.replace(config, depth=int(depth), batch_size=rows, train=settings)
        try:
            step, result = _bench.measure(*bench_train.resolve(settings), runtime)
            break
        except torch.OutOfMemoryError as error:
            problem = first_line(error)[:160]
        print(f"  batch {rows}: {problem}", flush=True)  # not in the handler, which keeps the tensors alive
        bench.report(what="out of memory", depth=int(depth), linear=kind, rows=rows, planned=planned)
        release(bench)
    else:
        print("  no batch fits")
        return
    which = {"depth": int(depth), "linear": kind, "rows": rows}
    bench.report(**result, **which, what="step", predicted_seconds=floor, planned_bytes=planned, kernels=step.kernels)
    peak, seconds = result["peak_memory_bytes"], result["step_seconds"]
    print(
        f"  depth {depth} {result['precision']}, {rows} rows: {result['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{result['mfu']:.1%} ({result['mfu_limit']}), step {1000 * seconds:.1f} ms: {seconds / floor:.2f} x the "
        f"prediction; compiled in {result['compile_seconds']:.0f} s"
    )
    off = f"{peak / planned - 1:+.1%}" if bench.cuda else "not compared: on CPU the peak is the whole process's"
    print(f"  memory: peak {peak / GIB:.2f} GiB, planned {planned / GIB:.2f} ({off})", flush=True)
    if int(depth) == config.gpu.profile_depth and kind == config.gpu.linears[0]:
        profile(bench, step, seconds, parts, f"d{depth}_{kind}")
    time_accumulated(bench, step, rows * shape.sequence_len, result, which)


def describe(parts: Mapping[str, float]) -> str:
    """Return the parts of a prediction, in milliseconds."""
    return ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items() if seconds) + " ms"


def time_accumulated(
    bench: Bench, step: TrainStepBench, tokens: int, result: Mapping[str, Any], which: Mapping[str, Any]
) -> None:
    """Time a step of as many micro-batches as pretraining takes on one GPU: the optimizer's share is smaller."""
    n = max(bench.config.gpu.step_tokens // tokens, 1)
    if n == 1 or bench.seconds_left() < 4 * n * result["step_seconds"] + 10:
        return
    repeated = step.repeat(n)
    try:
        times = [_bench.timed(lambda: repeated(step.state), bench.runtime) for _ in range(3)]
    except torch.OutOfMemoryError:
        print(f"  {n} micro-batches: out of memory (their sum is in float32)")
        return
    seconds = statistics.median(times[1:])
    rate = n * tokens / seconds
    mfu = result["mfu"] * rate / result["tokens_per_second"]
    print(f"  with {n} micro-batches a step: {rate:,.0f} tokens/s, MFU {mfu:.1%}", flush=True)
    bench.report(what="accumulated", **which, micro_batches=n, step_seconds=seconds, tokens_per_second=rate, mfu=mfu)


def profile(bench: Bench, bench_step: TrainStepBench, seconds: float, parts: Mapping[str, float], name: str) -> None:
    """Print the time of a step by kernel, idle gaps, and waits of the host."""
    step = functools.partial(bench_step.step, bench_step.state)
    if not bench.cuda:
        print("  by operation (kernels, gaps and host synchronizations: skipped, no GPU):")
        print(table(_trace.top_ops(step, bench.runtime, 5)))
        return
    path = bench.folder / f"trace_{name}.json.gz"
    found = _trace.profile(_trace.trace(step, bench.runtime, path=path))
    idle = max(1 - found.busy_seconds / seconds, 0.0)
    print(
        f"  profile: GPU busy {1000 * found.busy_seconds:.1f} of {1000 * seconds:.1f} ms: idle {idle:.1%} (predicted "
        f"under 3%); while profiled idle {1000 * found.idle_seconds:.1f} ms; {path}"
    )
    kinds = [(kind, value, "") for kind, value in found.kinds.items()]
    kernels = [(kernel[:90], value, f"{calls} calls") for kernel, value, calls in found.top[:20]]
    print(table([[n, f"{v / found.busy_seconds:.1%}", f"{1000 * v:.2f} ms", calls] for n, v, calls in kinds + kernels]))
    print(f"    predicted: {describe(parts)}")
    for gap, before, after in found.gaps[:5]:
        print(f"    gap of {1e6 * gap:.0f} us between {before[:50]} and {after[:50]}")
    syncs = _bench.host_syncs(step)
    print(f"  host synchronizations within a step: {len(syncs)} (predicted: 0)")
    print("\n".join(f"    {line}" for line in sorted(set(syncs))[:8]))
    bench.report(what="profile", name=name, idle_share=idle, syncs=syncs, predicted=dict(parts), **found._asdict())


# Sections attention and linear


def attention_section(bench: Bench) -> None:
    """Time every attention kernel forward and backward, per window and number of heads, beside the roofline."""
    device, dtype = bench.runtime.device, bench.runtime.compute_dtype
    missing: set[tuple[str, int]] = set()
    for depth in bench.config.gpu.depths:
        shape = bench.shape(depth)
        length, tokens = shape.sequence_len, 2**16 if bench.cuda else shape.sequence_len
        size = (tokens // length, length, shape.n_head, shape.head_dim)
        for window in sorted(set(shape.windows)):
            inputs = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
            grad = torch.randn(size, device=device, dtype=dtype)
            keys = min(window, length)
            flops = 14 * shape.n_embd * (keys - keys**2 / (2 * length)) * tokens
            predicted = flops / bench.limits().matmul / ATTENTION_SHARE
            print(f"  {shape.n_head} heads, window {window}: predicted {1000 * predicted:.3f} ms: "
                  f"{ATTENTION_SHARE:.0%} of a matmul's rate", flush=True)  # fmt: skip
            for name in [n for n in attention.KERNELS if n != "math" and (n, window) not in missing]:
                if bench.seconds_left() < 15:
                    print("  no time left for the rest")
                    return
                with attention_kernel(name, window, length, device, bench.config.compile) as attend:
                    try:
                        seconds, error = time_attention(attend, inputs, grad, window, device)
                    except Exception as problem:  # whatever a package, a compiler or a driver raises
                        missing.add((name, window))  # nor at another number of heads
                        print(f"    {name:10} failed: {type(problem).__name__}: {first_line(problem)[:120]}")
                        continue
                speed = flops / seconds
                print(f"    {name:10} {1000 * seconds:8.3f} ms  {speed / 1e12:7.1f} TFLOP/s  error {error:.1e}")
                bench.report(
                    what=name, heads=shape.n_head, window=window, seconds=seconds, flops_per_second=speed,
                    predicted_seconds=predicted, error=error,
                )  # fmt: skip


@contextlib.contextmanager
def attention_kernel(
    name: str, window: int, length: int, device: torch.device, compile: bool
) -> Iterator[Callable[..., Any]]:
    """Yield an attention kernel as training uses it, built at its first call; restore global state afterwards."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        built = attention.build({window: name}, length, device)
        if not compile or name not in ("sdpa", "flex"):  # the others are one operation
            return built
        torch.compiler.reset()
        return torch.compile(built, fullgraph=True, dynamic=False)

    try:
        yield lambda *inputs: kernel()(*inputs, window)
    finally:
        if name == "fa3_torch" and hasattr(torch.nn.attention, "restore_flash_attention_impl"):
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def time_attention(
    attend: Callable[..., Any], inputs: list[torch.Tensor], grad: torch.Tensor, window: int, device: torch.device
) -> tuple[float, float]:
    """Return seconds of forward and backward, and the error of output and gradients in the first row."""

    def step() -> list[torch.Tensor]:
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    got = [x[:1].detach().float() for x in step()]
    first = [x[:1].detach().float().requires_grad_() for x in inputs]
    plain = attention.math(first[0], first[1], first[2], window)
    want = [plain.detach(), *torch.autograd.grad(plain, first, grad[:1].float())]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want))
    if not error < 0.02:
        raise ValueError(f"its results are off by {error:.1%}")
    return _bench.seconds_of({"step": step}, device)["step"], error


def linear_section(bench: Bench) -> None:
    """Time the three products of a layer in the compute dtype and in fp8, with quantization."""
    device, dtype = bench.runtime.device, bench.runtime.compute_dtype
    fp8, description = linear.choose("fp8", device)
    print(f"  forward and both gradients; fp8 is {description}")
    sizes: dict[tuple[int, int], int] = {}
    for depth in bench.config.gpu.depths[:2]:
        shape, tokens = bench.shape(depth), 2**16 if bench.cuda else 256
        c = shape.n_embd
        sizes |= {(c, c): tokens, (4 * c, c): tokens, (c, 4 * c): tokens}
        sizes |= {(shape.padded_vocab, c): min(8192, tokens)}  # the loss computes logits in chunks
    for (out, width), n in sizes.items():
        if bench.seconds_left() < 15:
            print("  no time left for the rest")
            return
        x, grad = (torch.randn(n, side, device=device, dtype=dtype) for side in (width, out))
        weight = torch.randn(out, width, device=device)
        kinds = {"dense": linear.dense, "fp8": fp8}
        seconds = _bench.seconds_of(
            {name: three_products(f, x, weight, grad, bench.config.compile) for name, f in kinds.items()}, device
        )
        flops, reached = 6 * n * out * width, bench.limits()
        quantize = (7 * n * (out + width) + 11 * out * width) / reached.copy
        floors = {"dense": flops / reached.matmul, "fp8": flops / (reached.fp8 or reached.matmul) + quantize}
        text = "; ".join(
            f"{name} {1000 * seconds[name]:.3f} ms, {flops / seconds[name] / 1e12:.1f} TFLOP/s (predicted "
            f"{1000 * floors[name]:.3f} ms)"
            for name in seconds
        )
        print(f"  {n} x {width} -> {out}: {text}; fp8 is {seconds['dense'] / seconds['fp8']:.2f} x", flush=True)
        bench.report(what="linear", rows=n, inner=width, outer=out, seconds=seconds, predicted_seconds=floors)


def three_products(
    f: linear.Linear, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, compile: bool
) -> Callable[[], Any]:
    """Return a function that computes the three products of a linear layer, as training does."""
    products = linear.matmuls(f, len(x), weight)

    def step(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        dtype = x.dtype
        a, b, g = products.operand(x, dtype), products.operand(weight, dtype), products.grad_operand(grad, dtype)
        return [products.y(a, b, dtype), products.grad_x(g, b, dtype), products.grad_w(g, a, torch.float32)]

    return functools.partial(torch.compile(step, dynamic=False) if compile else step, x, weight, grad)


SECTIONS: dict[str, Callable[..., None]] = {
    "limits": limits_section,
    "check": check_section,
    "train": train_section,
    "attention": attention_section,
    "linear": linear_section,
}
