"""One training stage as a run: its folder, its state new or resumed, and what happens around the steps.

A stage (pretraining, fine-tuning) brings a loss, batches and hyperparameters; `train.fit` loops; what is here opens
the run's folder, compiles the functions, and logs, saves, evaluates and samples as is due.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat import (
    allocator,
    attention,
    checkpoint,
    compiling,
    dataloader,
    evaluate,
    generate,
    loss,
    metrics,
    model,
    planner,
    plots,
    progress,
    ranks,
    sharding,
    tokenizer,
    train,
)
from nanochat import config as configs
from nanochat import linear as linears
from nanochat import runtime as runtimes
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import UserError
from nanochat.dataset import DataConfig
from nanochat.metrics import MetricsConfig
from nanochat.model import Compute, ModelConfig
from nanochat.optim import MATRIX, Hparams
from nanochat.runtime import Runtime
from nanochat.sharding import Layout, ShardingConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteLossError, Progress, StopFlag, TrainConfig, TrainState
from nanochat.units import duration, human

CPU_ROWS = 32  # on the CPU, larger micro-batches take memory and save nothing
UNTIMED_STEPS = 10  # of every start: they compile and warm up
NOT_COMPARED = ("resume", "overwrite", "dry_run")
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation along the way.

    Attributes:
        every_steps: between evaluations of bits per byte; none: at the end only. tokens: of the validation split.
        sample_every_steps: between samples; none: at the end only. sample_tokens: of each sample.
        prompts: what the samples begin with. temperature, top_k: of the samples; temperature 0 is greedy.
    """

    every_steps: int | None = 250
    tokens: int = 80 * 2**19
    sample_every_steps: int | None = 2000
    sample_tokens: int = 16
    prompts: tuple[str, ...] = PROMPTS
    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "sample_every_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least 1, or none")
        for name, least in {"tokens": 1, "sample_tokens": 1, "temperature": 0, "top_k": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least {least}")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Settings that every training stage has.

    Attributes:
        name: of the run's folder. seed: of initial values and data order.
        device, dtype: auto, or as in `runtime.create`. compile: by torch.compile.
        resume: go on from the run's last checkpoint. overwrite: start anew where a run has this name; its checkpoints
            stay in checkpoints.old until the next time.
        device_batch_size: rows of a micro-batch; auto: the most that fit, by an estimate and a step to try it.
        tokenizer: its folder; none: the default one.
    """

    name: str | None = None
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = True
    resume: bool = False
    overwrite: bool = False
    device_batch_size: int | Literal["auto"] = 32
    tokenizer: str | None = None
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=1000)
    metrics: MetricsConfig = MetricsConfig()

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, once they are resolved."""
        assert self.device_batch_size != "auto"
        return self.device_batch_size


@dataclasses.dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    Attributes:
        config: resolved. shape, tok, runtime: the model's, the tokenizer, the process's place.
        layout: where the state lies on several ranks, or None.
        num_steps, step_tokens, flops_per_token: length of the run, tokens of a step (all ranks), cost of a token.
        hparams_at: step -> hyperparameters. matrix_lr: the matrices' rate at its full.
        peak_flops: matmul limit of a device, for the MFU.
        folder, manager, log: where the run's files are (a copy of the tokenizer among them), its open checkpoints,
            its open metrics.
        stop: set by a signal. seconds: of the steps that this process has done; the one thing in here that grows.
    """

    config: StageConfig
    shape: ModelConfig
    tok: Tokenizer
    runtime: Runtime
    layout: Layout | None
    num_steps: int
    step_tokens: int
    flops_per_token: int
    hparams_at: Callable[[int], Hparams]
    matrix_lr: float
    peak_flops: float
    folder: Path
    manager: checkpoint.Manager
    log: metrics.Log
    stop: StopFlag
    seconds: list[float]


def run_folder(name: str) -> Path:
    """Return where the run called `name` keeps its files."""
    return runtimes.base_dir() / "runs" / name


def tokenizer_folder(config: StageConfig) -> Path:
    """Return the folder of the tokenizer that `config` names."""
    return Path(config.tokenizer) if config.tokenizer else tokenizer.default_dir()


def load_tokenizer(config: StageConfig, name: str, *, required: bool = True) -> Tokenizer | None:
    """Return the tokenizer of a new run, or the own copy of a resumed one; None where none is there or required.

    Raises:
        UserError: there is none, or it is damaged.
    """
    own, folder = run_folder(name) / "tokenizer", tokenizer_folder(config)
    if config.resume and own.exists():
        tok = tokenizer.load(own)
        if folder.exists() and tokenizer.load(folder).fingerprint != tok.fingerprint:
            print(f"resuming with the run's own tokenizer in {own}; {folder} holds another one by now")
        return tok
    return tokenizer.load(folder) if required or folder.exists() else None


def open_checkpoints(folder: Path, config: StageConfig, runtime: Runtime) -> checkpoint.Manager:
    """Open the checkpoints of a run: new, resumed, or with `overwrite` in the place of an old run.

    Raises:
        UserError: the folder holds a run, and the command says neither resume nor overwrite.
    """
    checkpoints = folder / "checkpoints"
    done = checkpoint.steps(checkpoints) if checkpoints.exists() else []
    if done and not config.resume:
        if not config.overwrite:
            raise UserError(
                f"run {folder} has checkpoints up to step {done[-1]}: --resume goes on with it, --set name=<other> "
                "starts another, --set overwrite=true replaces it"
            )
        old = checkpoints.with_name("checkpoints.old")
        runtimes.wait_for_all()  # every rank has looked
        if runtime.is_main:
            shutil.rmtree(old, ignore_errors=True)
            checkpoints.rename(old)
        runtimes.wait_for_all()
        print(f"the run that was here keeps its checkpoints in {old}, until the next one is replaced")
    if config.resume and not done:
        print(f"nothing to resume in {checkpoints}: starting at step 0")
    return checkpoint.open(checkpoints, config.checkpoint)


def start(
    config: StageConfig, shape: ModelConfig, manager: checkpoint.Manager, runtime: Runtime, layout: Layout | None
) -> tuple[TrainState, Progress]:
    """Return the state and progress to begin with: freshly drawn, or those of the last checkpoint."""
    dtype, spec = runtime.compute_dtype, model.spec(shape)
    if checkpoint.latest_step(manager) is None:
        return fresh(config, shape, runtime, layout), Progress()
    nothing = model.init(shape, config.seed, device="meta", dtype=dtype, layout=layout)
    abstract = train.init(nothing, spec, dtype, layout)
    state, meta, arrays = checkpoint.restore(manager, abstract, device=runtime.device)
    now = json.loads(json.dumps(dict(configs.flatten(config))))
    for name, value in now.items():
        before = meta["config"].get(name, value)
        if before != value and name not in NOT_COMPARED:
            print(f"changed since the checkpoint: {name} = {value} (was {before})")
    loader = {"position": meta["loader"], "tokens": arrays["loader_tokens"], "lengths": arrays["loader_lengths"]}
    print(f"resumed from step {int(state.step)} in {manager.folder}")
    if meta["config"]["dtype"] != now["dtype"]:
        state = state._replace(scaler=train.init_scaler(dtype, runtime.device))  # a scale is for one dtype
    return state, Progress(**meta["progress"])._replace(loader=loader)


def fresh(config: StageConfig, shape: ModelConfig, runtime: Runtime, layout: Layout | None) -> TrainState:
    """Return the state before the first step."""
    dtype = runtime.compute_dtype
    params = model.init(shape, config.seed, device=runtime.device, dtype=dtype, layout=layout)
    return train.init(params, model.spec(shape), dtype, layout)


def functions(
    config: StageConfig, shape: ModelConfig, runtime: Runtime, layout: Layout | None = None
) -> tuple[Callable, Callable, str]:
    """Return (the train step, the loss for evaluation, their kernels in words), compiled where asked for.

    Raises:
        UserError: the attention kernel does not run here, or train.grad=func would meet a custom backward.
    """
    if config.compile and runtime.device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            raise UserError(f"compile=true needs a C++ compiler on the CPU: install {compiler}, or set compile=false")
    dtype = runtime.compute_dtype
    chosen = choose_attention(config, shape, runtime)
    try:
        attend = attention.build(chosen.names, shape.sequence_len, runtime.device)
    except ImportError as error:  # on another node than rank 0's
        raise UserError(
            f"train.attention: rank 0 has {chosen.text}, and here {error}; install it, or set sdpa"
        ) from None
    linear, precision = linears.choose(config.train.linear, runtime.device)
    chunk: int | None = chunk_tokens(config, runtime)
    if config.train.grad == "func":
        if runtime.world_size > 1:
            raise UserError("train.grad=func runs in one process: start with --nproc_per_node=1")
        if set(chosen.names.values()) - {"math", "sdpa"} or config.train.linear == "fp8":
            raise UserError(
                f"train.grad=func: {chosen.text} or train.linear={config.train.linear} has a custom backward, which "
                "torch.func.grad ignores when compiled; set train.attention=sdpa and train.linear=dense"
            )
        chunk = None  # the chunked loss has a custom backward too; the plain one has the same value
    gather = sharding.gatherer(layout, dtype)
    compile = None
    if config.compile:
        settings = {"device": runtime.device, "collectives": gather is not None, "overlap": config.sharding.overlap}
        compile = functools.partial(compiling.compile, **settings, memory_budget=config.train.memory_budget)
    dense = Compute(dtype=dtype, attend=attend, gather=gather)
    eval_fn = functools.partial(loss.next_token, config=shape, compute=dense, chunk_tokens=chunk)
    compute = dataclasses.replace(dense, linear=linear)
    loss_fn = functools.partial(loss.next_token, config=shape, compute=compute, chunk_tokens=chunk)
    step_fn = functools.partial(
        train.train_step,
        value_and_grad=train.gradient(loss_fn, grad=config.train.grad, compile=compile),
        update=train.make_update(compute_dtype=dtype, donate=True, compile=config.compile, layout=layout),
        enter=functools.partial(sharding.enter, layout, dtype=dtype),
    )
    return step_fn, (compile(eval_fn) if compile else eval_fn), f"attention {chosen.text}; linear layers {precision}"


def chunk_tokens(config: StageConfig, runtime: Runtime) -> int:
    """Return the tokens whose logits live at once in the loss."""
    return config.train.chunk_tokens or (1024 if runtime.device.type == "cpu" else 8192)


def estimated_rows(config: StageConfig, shape: ModelConfig, rows: int, runtime: Runtime) -> int:
    """Return the largest micro-batch that fits by the planner's estimate, the same on all ranks.

    Args:
        rows: of a step, on this rank; the micro-batch divides it. On the CPU it is at most CPU_ROWS.

    Raises:
        UserError: not even one row fits.
    """
    capacity = runtimes.free_bytes(runtime.device, runtime.node_ranks)
    _, shards = sharding.mesh_shape(config.sharding, runtime.world_size, runtime.node_ranks)
    found = planner.largest_batch(
        shape, rows, capacity, mode=sharding.resolve(config.sharding).mode, world_size=runtime.world_size,
        shard_ranks=shards, dtype=runtime.compute_dtype, fp8=config.train.linear == "fp8",
        chunk_tokens=chunk_tokens(config, runtime),
    )  # fmt: skip
    least = -runtimes.agree(-(found or 0))
    if not least:
        raise UserError(
            f"device_batch_size=auto: not even one row of {shape.sequence_len} tokens fits into the "
            f"{capacity / 2**30:.1f} GiB that are free; lower depth, or share the state: --set sharding.mode=fsdp"
        )
    if runtime.device.type == "cpu":
        least = max(n for n in range(1, min(least, CPU_ROWS) + 1) if rows % n == 0)
    return least


def tried_rows(
    config: StageConfig, shape: ModelConfig, rows: int, runtime: Runtime, layout: Layout | None, step_fn: Callable,
    hparams: Hparams,
) -> int:  # fmt: skip
    """Return the first micro-batch from `config.rows` downwards that fits, seen by a step on a state thrown away.

    On the CPU, where running out of memory ends the process, the estimate has to do.

    Args:
        rows: of a step, on this rank. step_fn: `train_step` with its functions bound. hparams: of any step.

    Raises:
        UserError: not even one row fits.
    """
    if runtime.device.type == "cpu":
        return config.rows
    for tried in [n for n in range(config.rows, 0, -1) if rows % n == 0]:
        ids = torch.zeros((tried, shape.sequence_len), dtype=torch.int64, device=runtime.device)
        batches = [{"inputs": ids, "targets": ids}] * min(rows // tried, 2)  # two need an accumulator
        failed = False
        try:
            step_fn(fresh(config, shape, runtime, layout), batches, hparams)
            runtimes.synchronize(runtime.device)
        except torch.OutOfMemoryError:
            failed = True
        torch.cuda.empty_cache()
        if not runtimes.agree(failed):
            return tried
        print(f"device_batch_size={tried} runs out of memory; trying less")
    raise UserError("device_batch_size=auto: not even one row fits; lower depth, or set sharding.mode=fsdp")


def choose_attention(config: StageConfig, shape: ModelConfig, runtime: Runtime) -> attention.Choice:
    """Return the attention kernel of each window, the same on all ranks.

    Raises:
        UserError: the kernel that was asked for does not run here.
    """
    asked = config.train.attention
    if asked == "auto" and (config.train.grad == "func" or not config.compile):
        asked = "sdpa"
    heads = (shape.n_head, shape.n_kv_head, shape.head_dim)
    line = ranks.join()
    try:
        with ranks.together(line):
            choice = attention.choose(
                asked, shape.sequence_len, shape.windows, heads, runtime.device, runtime.compute_dtype,
                rows=config.rows, compile=config.compile,
            )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    names, text = ranks.tell(line, [list(choice.names.items()), choice.text])  # times differ from rank to rank
    ranks.leave(line)
    return attention.Choice({window: name for window, name in names}, text)


def after_step(
    job: Job, loss_fn: Callable, show: progress.Bar, state: TrainState, at: Progress, numbers: dict[str, float]
) -> Progress:
    """Log a step; then save, evaluate and sample as is due, in that order. Return the progress, updated."""
    config, step, last = job.config, at.step, at.step == job.num_steps
    ema, smooth = metrics.ema(at.ema, numbers["loss"])
    seconds = numbers["step_seconds"]
    job.seconds.append(seconds)
    if len(job.seconds) == 1:
        allocator.settle()
        show.write(f"first step: {duration(seconds)}" + ", most of it to compile" * config.compile)
    timed = len(job.seconds) > UNTIMED_STEPS
    at = at._replace(ema=ema, timed_steps=at.timed_steps + timed, timed_seconds=at.timed_seconds + timed * seconds)
    if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
        show.write(f"step {step}: loss or gradient not finite, left out ({at.skipped_steps} so far)")
    speed = job.step_tokens / seconds
    mfu = speed * job.flops_per_token / (job.peak_flops * job.runtime.world_size)
    show.update(1, loss=f"loss {smooth:.4f}", speed=f"{human(speed)} tok/s", mfu=f"mfu {mfu:.0%}")
    if step % config.metrics.every_steps == 0 or step == 1 or last:
        h = job.hparams_at(step - 1)
        row = {
            "train/loss": numbers["loss"],
            "train/loss_ema": smooth,
            "train/grad_norm": numbers["grad_norm"],
            "train/tokens": step * job.step_tokens,
            "train/epoch": numbers["epoch"],
            "train/tokens_cut_fraction": numbers["tokens_cut_fraction"],
            "train/lr_factor": float(h[MATRIX]["lr"]) / job.matrix_lr,
            "train/muon_momentum": float(h[MATRIX]["momentum"]),
            "train/skipped_steps": at.skipped_steps,
            "train/loss_scale": float(state.scaler["scale"]),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/data_wait_seconds": numbers["data_wait_seconds"],
            "perf/peak_memory_bytes": metrics.peak_memory_bytes(job.runtime.device),
        }
        metrics.write(job.log, step, row)
    if last or due(step, config.checkpoint.every_steps) or due(step, config.eval.every_steps):
        save(job, state, at)  # before an evaluation too, which may take long, or fail
    examine(job, loss_fn, show, state, step)
    return at


def examine(job: Job, loss_fn: Callable, show: progress.Bar, state: TrainState, step: int) -> None:
    """Evaluate and sample after a step if they are due: also first thing in a run that was stopped before it could."""
    config, last = job.config, step == job.num_steps
    if last or due(step, config.eval.every_steps):
        bpb = validate(job, state, loss_fn)
        if bpb is None:
            return  # a resumed run makes up for it
        checkpoint.add_metrics(job.manager, step, {"val/bpb": bpb})
        metrics.write(job.log, step, {"val/bpb": bpb})
        show.write(f"step {step}: validation {bpb:.4f} bits per byte")
    if last or due(step, config.eval.sample_every_steps):
        show.write("\n".join(samples(job, state)))


def examined(job: Job, step: int) -> bool:
    """Return whether the record has the evaluation of a step."""
    rows = metrics.read(job.folder) if job.runtime.is_main else []  # which writes it, meanwhile
    return step == 0 or bool(runtimes.agree(any(row["step"] == step and "val/bpb" in row for row in rows)))


def due(step: int, every_steps: int | None) -> bool:
    """Return whether something that happens every so many steps, or never, happens after this one."""
    return every_steps is not None and step > 0 and step % every_steps == 0


def save(job: Job, state: TrainState, at: Progress) -> None:
    """Checkpoint the state with all that a resumed run, a chat or a person needs beside it."""
    loader = at.loader
    meta = {
        "config": dict(configs.flatten(job.config)),
        "model": dataclasses.asdict(job.shape),
        "loader": loader["position"],
        "progress": at._replace(loader=None)._asdict(),
        "tokens": at.step * job.step_tokens,
        "num_steps": job.num_steps,
        "torch": torch.__version__,
    }
    # No random state: whatever draws has a generator of its own, made from the seed and a name or a step.
    arrays = {"loader_tokens": loader["tokens"], "loader_lengths": loader["lengths"]}
    files = {name: job.folder / "tokenizer" / name for name in tokenizer.FILES}
    checkpoint.save(job.manager, state, meta, arrays=arrays, files=files)


def with_advice(error: NonFiniteLossError, manager: checkpoint.Manager) -> NonFiniteLossError:
    """Return the error with the last good checkpoint and what to try."""
    checkpoint.wait(manager)
    saved = checkpoint.steps(manager)
    if not saved:
        return NonFiniteLossError(f"{error}, and nothing is saved yet; try a lower rate (--set optim.matrix_lr=…)")
    text = (
        f"{error}; the last good checkpoint is step {saved[-1]}, of right before it. --resume with "
        "--set train.skip_nonfinite=true leaves this batch out"
    )
    if len(saved) > 1:
        text += (
            f"; or delete {manager.folder / str(saved[-1])} and --resume from step {saved[-2]} with a lower rate "
            "(--set optim.matrix_lr=…)"
        )
    return NonFiniteLossError(text)


def validate(job: Job, state: TrainState, loss_fn: Callable) -> float | None:
    """Return bits per byte on the first `eval.tokens` tokens of the validation split; None: a signal stopped it.

    A split that has fewer is read again from its beginning.
    """
    config, shape, runtime = job.config, job.shape, job.runtime
    rows = config.rows * runtime.world_size
    steps = max(config.eval.tokens // (rows * shape.sequence_len), 1)
    stream = dataloader.batches(
        config.data,
        job.tok,
        split="val",
        rows_per_step=rows,
        sequence_len=shape.sequence_len,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    token_bytes = torch.from_numpy(tokenizer.token_bytes(job.tok)).to(runtime.device)
    with contextlib.closing(stream):
        first = next(stream)
        rest = itertools.takewhile(lambda _: not job.stop.agreed(), itertools.islice(stream, steps - 1))
        taken = itertools.chain([first], rest)
        params = sharding.enter(job.layout, state.params, runtime.compute_dtype)
        bpb = evaluate.bits_per_byte(params, (batch for batch, *_ in taken), token_bytes, loss_fn)
    return None if job.stop else bpb


def samples(job: Job, state: TrainState) -> list[str]:
    """Return one line a prompt: the prompt and what the model makes of it."""
    config = job.config.eval
    dtype = job.runtime.compute_dtype
    compute = Compute(dtype=dtype, gather=sharding.gatherer(job.layout, dtype))
    params = sharding.enter(job.layout, state.params, dtype)
    logits_fn = functools.partial(model.apply, config=job.shape, compute=compute)
    lines = []
    for i, prompt in enumerate(config.prompts):
        tokens = generate.sample(
            params,
            [job.tok.bos, *job.tok.encode(prompt)],
            logits_fn,
            max_tokens=config.sample_tokens,
            stop={job.tok.bos},
            temperature=config.temperature,
            top_k=config.top_k,
            seed=i,
        )
        lines.append(f"  {prompt!r} → {job.tok.decode(tokens)!r}")
    return lines


def finish(job: Job, at: Progress) -> None:
    """Draw the curves beside the metrics, and print the validation curve, the totals and where everything is."""
    if not job.runtime.is_main:
        return
    rows = metrics.read(job.folder)
    draw(job.folder, rows)
    steps, bpb = metrics.curve(rows, "val/bpb")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, bpb, title="validation bits per byte, by step"))
    word = "done" if at.step == job.num_steps else "stopped after"
    print(f"{word} {at.step} of {job.num_steps} steps, {human(at.step * job.step_tokens)} tokens")
    if at.timed_steps:
        speed = at.timed_steps * job.step_tokens / at.timed_seconds
        print(f"training: {human(speed)} tokens/s, {duration(at.step * job.step_tokens / speed)} without evaluations")
    if at.skipped_steps:
        print(f"{at.skipped_steps} steps were left out: loss or gradient not finite")
    print(f"run folder: {job.folder} (checkpoints/, metrics.jsonl, config.json, loss.svg, bpb.svg)")


def draw(folder: Path, rows: list[Any]) -> None:
    """Draw loss.svg and, once there is an evaluation, bpb.svg into the run's folder."""
    curves = {"each step": metrics.curve(rows, "train/loss"), "smoothed": metrics.curve(rows, "train/loss_ema")}
    if curves["each step"][0]:
        title = f"{folder.name}: training loss"
        plots.line_chart(folder / "loss.svg", curves, title=title, x_label="step", y_label="nats per token")
    bpb = metrics.curve(rows, "val/bpb")
    if bpb[0]:
        title = f"{folder.name}: validation"
        plots.line_chart(folder / "bpb.svg", {"val": bpb}, title=title, x_label="step", y_label="bits per byte")
