r"""Pretrain many models at once, as members of one step, to find the best settings.

    python launch.py --experiment=sweep --set depth=4 --set vary="optim.matrix_lr=0.005,0.01,0.02,0.04 seed=1..4"
    torchrun --nproc_per_node=8 launch.py --experiment=sweep --set depth=4 \
        --set vary="random:64 optim.matrix_lr=0.002..0.2 optim.embedding_lr=0.03..3"
    python launch.py --experiment=sweep ... --resume                     # continue a stopped sweep
    python launch.py --experiment=sweep ... --resume --set keep=03,07    # write members of a finished one as runs

A grid has every combination of the listed values (1..4 lists integers); random:64 draws so many members from lists and
ranges, ranges in log space. Every member is what --experiment=pretrain makes of its own values and the base settings;
data.seed is that of the base settings for all, unless it varies as well.

What enters a step as a number or a seed varies within it: the members are one state with a leading axis, loss and
update are those of one model under torch.func.vmap, and the GPUs divide the members between them, without
communication. What changes shapes or batches (depth, total_batch_size) varies in rounds, one after the other. A
member whose loss is not finite is frozen; the others do not notice. Seeds count as repeats of a setting.

Writes runs/<name>: members/<member>/metrics.jsonl, members.csv, sweep.svg, rounds/ (checkpoints), and the best member
as the run <name>_<member>, which chats, is evaluated and fine-tuned like any other. CORE is not evaluated. A step of
small models takes little longer for 8 or 16 of them than for one, on a GPU; memory is that of so many models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments import _sweep, pretrain
from experiments._sweep import Member, Result
from nanochat import checkpoint, data, distributed, eval, jsonl, metrics, model, optim, train
from nanochat import config as configs
from nanochat.config import PositiveInt, UserError
from nanochat.data import tokenizer
from nanochat.text import format_count, format_duration, table

if TYPE_CHECKING:
    from nanochat.distributed import Runtime
    from nanochat.train import Progress, StopFlag, TrainState

VMAP_FLOPS = 2**24  # per layer and matrix product: on the CPU, larger single models are faster one after the other
REFUSED = {
    "init_from": "members start from random parameters",
    "resume_step": "a sweep resumes from its last checkpoints",
}


@dataclasses.dataclass(frozen=True)
class Config(pretrain.Config):
    """A sweep over settings of pretraining.

    Attributes:
        vary: settings and their values, `optim.matrix_lr=0.01,0.02 seed=1..4` for a grid, or
            `random:16 optim.matrix_lr=0.001..0.1` for random draws.
        members_per_device: members of a step on each device; auto: as many as fit by the estimate of memory.
        chunk_size: members whose loss is computed at once; auto: all on a GPU, and on the CPU all of small models, one
            of larger ones.
        keep: members to write as runs at the end: best, or names such as 03; none for no.
    """

    vary: str = "optim.matrix_lr=0.005,0.01,0.02,0.04"
    members_per_device: PositiveInt | Literal["auto"] = "auto"
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    keep: tuple[str, ...] = ("best",)


config = Config


class Round(NamedTuple):
    """Members of one step, whose shapes and batches are equal."""

    number: int  # from 1
    members: list[Member]
    shape: model.ModelConfig
    plans: list[optim.Plan]  # of each member; they differ in the weight decay
    chunk_size: int
    padded: int  # members with those that fill up the last rank, copies of the last member

    @property
    def seeds(self) -> list[int]:
        """The different orders of the data."""
        return sorted({data_seed(m) for m in self.members})


class Sweep(NamedTuple):
    """What the rounds share."""

    config: Config
    runtime: Runtime
    tok: data.Tokenizer
    folder: Path
    stop: StopFlag
    check_lock: Callable[[], None]


def run(config: Config, runtime: Runtime) -> None:
    name = config.name or f"d{config.depth}_sweep"
    config = train.resume_after_restart(dataclasses.replace(config, name=name), name, runtime)
    for setting, problem in REFUSED.items():
        if getattr(config, setting) is not None:
            raise UserError(f"{setting}={getattr(config, setting)}: {problem}")
    if config.device_batch_size == "auto" or config.train.linear == "fp8" or config.dtype == "float16":
        raise UserError("a sweep needs device_batch_size=<number>, train.linear=dense, and bfloat16 or float32")
    base = pretrain.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(pretrain.Config)})
    base = dataclasses.replace(base, resume=False, data=dataclasses.replace(base.data, seed=order_seed(base)))
    members = _sweep.make_members(config.vary, base, name)
    for kept in config.keep:
        if kept not in ("best", *(m.name for m in members)):
            raise UserError(f"keep={kept}: no such member; there are best and {members[0].name} … {members[-1].name}")
    tok = pretrain.load_tokenizer(config, None, required=not config.dry_run)
    rounds = make_rounds(config, members, tok, runtime)
    folder = train.run_folder(name)
    print(describe(config, rounds, runtime, folder), flush=True)
    if tok is None or config.dry_run:
        return
    with contextlib.ExitStack() as stack:
        check_lock = stack.enter_context(metrics.run_lock.held(folder))
        stop = stack.enter_context(train.stop_on_signals())
        sweep = Sweep(config, runtime, tok, folder, stop, check_lock)
        rounds = open_sweep(sweep, rounds)
        distributed.mark_restart(f"opened {name}")
        for r in rounds:
            train_round(sweep, r)
            if stop.signal:
                print(f"stopped by {stop.signal.name} in round {r.number} of {len(rounds)}; --resume continues")
                raise SystemExit(128 + stop.signal)
        finish(sweep, rounds)


def order_seed(config: pretrain.Config) -> int:
    return config.seed if config.data.seed is None else config.data.seed


def data_seed(member: Member) -> int:
    assert member.config.data.seed is not None
    return member.config.data.seed


# What to train


def make_rounds(config: Config, members: Sequence[Member], tok: Any, runtime: Runtime) -> list[Round]:
    """Return the rounds, with as many members in each as the devices hold."""
    rounds = []
    for group in _sweep.make_rounds(members, len(members)):  # of one shape
        shape, plan = pretrain.resolve(group[0].config, tok)
        rows = plan.total_batch_size // shape.sequence_len
        optim.scaling.accumulation_steps(plan.total_batch_size, config.rows, shape.sequence_len, 1)
        chunk = config.chunk_size
        if chunk == "auto":  # by a rule, not by a trial: a choice that depends on the time would change the numbers
            small = min(rows, config.rows) * shape.sequence_len * shape.n_embd**2 * 2 < VMAP_FLOPS
            chunk = 1 if runtime.device.type == "cpu" and not small else len(members)
        most = config.members_per_device
        if most == "auto":
            capacity = distributed.free_bytes(runtime.device, runtime.node_ranks)
            sizes = range(len(group), 0, -1)
            most = next((n for n in sizes if memory(config, shape, rows, n, chunk, runtime) < capacity), 0)
            most = -distributed.all_reduce_max(-most)
            if not most:
                raise UserError(f"not even one member of depth {shape.n_layer} fits; set a smaller device_batch_size")
        for part in _sweep.make_rounds(group, most * runtime.world_size):
            plans = [pretrain.resolve(m.config, tok)[1] for m in part]
            full = [
                m._replace(
                    config=dataclasses.replace(
                        m.config,
                        total_batch_size=plan.total_batch_size,
                        num_iterations=plan.num_steps,
                        model=dataclasses.replace(m.config.model, vocab_size=shape.vocab_size),
                    )
                )
                for m, plan in zip(part, plans)
            ]
            padded = -(-len(full) // runtime.world_size) * runtime.world_size
            chunk = min(chunk, padded // runtime.world_size)
            rounds.append(Round(len(rounds) + 1, full, shape, plans, chunk, padded))
    return rounds


def memory(config: Config, shape: Any, rows: int, members: int, chunk: int, runtime: Runtime) -> float:
    """Return the bytes that a step of so many members on a device takes, by the planner's estimate for one."""
    setup = dataclasses.replace(train.planner_setup(config, runtime), mode="replicate", world_size=1)
    one = train.planner.memory(shape, setup, rows=min(rows, config.rows), micro_batches=-(-rows // config.rows)).parts
    of_chunk = one["activations"] + one["logits"] + one["weights"]
    each = one["parameters"] + one["optimizer"] + one["gradients"] + one["update"]
    return one["overhead"] + members * each + min(chunk, members) * of_chunk


def describe(config: Config, rounds: Sequence[Round], runtime: Runtime, folder: Path) -> str:
    """Return what the sweep will do, and how much memory it takes."""
    lines = [f"sweep over {sum(len(r.members) for r in rounds)} members: {config.vary}"]
    for r in rounds:
        rows = r.plans[0].total_batch_size // r.shape.sequence_len
        need = memory(config, r.shape, rows, r.padded // runtime.world_size, r.chunk_size, runtime)
        lines.append(
            f"  round {r.number} of {len(rounds)}: {len(r.members)} members of depth {r.shape.n_layer}, "
            f"width {r.shape.n_embd}, {format_count(model.count(r.shape)['total'])} parameters each; "
            f"{r.plans[0].num_steps} steps of {r.plans[0].total_batch_size:,} tokens a member; "
            f"{r.padded // runtime.world_size} on each of {runtime.world_size} devices, "
            f"{r.chunk_size} at once, about {need / 2**30:.1f} GiB"
        )
    return "\n".join([*lines, f"  {runtime.device}, {config.dtype}, compile={config.compile}; folder: {folder}"])


def open_sweep(sweep: Sweep, rounds: list[Round]) -> list[Round]:
    """Return the rounds, or if the sweep resumes those it was started with; write them to sweep.json."""
    config, runtime, path = sweep.config, sweep.runtime, sweep.folder / "sweep.json"
    with distributed.raise_on_any_failure():
        saved = None
        if runtime.is_main and path.exists():
            saved = json.loads(path.read_text("utf-8"))
            if not config.resume and not config.overwrite:
                raise UserError(
                    f"sweep {sweep.folder} exists: --resume continues it, --set name=<other> starts another, "
                    "--set overwrite=true replaces it"
                )
            if config.overwrite and not config.resume:
                shutil.rmtree(sweep.folder / "rounds", ignore_errors=True)
                saved = None
    saved = distributed.broadcast_object(saved)
    if saved:
        by_name = {m.name: (m, plan, r.shape) for r in rounds for m, plan in zip(r.members, r.plans)}
        now = {name: json.loads(json.dumps(dict(m.values))) for name, (m, *_) in by_name.items()}
        if saved["members"] != now:
            raise UserError(f"vary={config.vary}: the sweep in {sweep.folder} has other members; set another name")
        rounds = []
        for number, r in enumerate(saved["rounds"], 1):
            full, plans, shapes = zip(*(by_name[name] for name in r["members"]))
            if r["padded"] % runtime.world_size:
                raise UserError(f"{r['padded']} members of a round do not divide among {runtime.world_size} ranks")
            rounds.append(Round(number, list(full), shapes[0], list(plans), r["chunk_size"], r["padded"]))
    elif runtime.is_main:
        values = {m.name: dict(m.values) for r in rounds for m in r.members}
        entries = [{"members": [m.name for m in r.members], "chunk_size": r.chunk_size, "padded": r.padded} for r in rounds]
        text = json.dumps({"vary": config.vary, "members": values, "rounds": entries}, indent=1)
        jsonl.write_atomic(path, f"{text}\n")
    return rounds


# Train a round


def round_folder(folder: Path, r: Round) -> Path:
    return folder / "rounds" / str(r.number)


def train_round(sweep: Sweep, r: Round) -> None:
    """Train the members of a round to their end, or to a signal; a round that is done is skipped."""
    from nanochat.distributed import sharding
    from nanochat.train import functional

    config, runtime, stop = sweep.config, sweep.runtime, sweep.stop
    here, num_steps = round_folder(sweep.folder, r), r.plans[0].num_steps
    each = r.padded // runtime.world_size
    own = [min(i, len(r.members) - 1) for i in range(runtime.rank * each, (runtime.rank + 1) * each)]
    shared_batch = len(r.seeds) == 1
    members_step, eval_fn, kernels = step_functions(config, r, runtime, shared_batch)
    state_of = functools.partial(init_state, r, own, runtime)
    with contextlib.ExitStack() as stack:
        manager = checkpoint.open_manager(here / "checkpoints", config.checkpoint)
        stack.callback(checkpoint.close, manager)
        if checkpoint.latest_step(manager) is None:
            state, at = state_of(), train.step.Progress()
            print(f"round {r.number}: {kernels}; {time_estimate(members_step, state_of, r, config, runtime)}", flush=True)
        else:
            state, meta, arrays = checkpoint.restore(
                manager, to_global(state_of(device="meta"), runtime), device=runtime.device
            )
            state, at = sharding.local_shards(state), train.progress_from(meta)
            at = at._replace(loader={"position": meta["loader"], "arrays": arrays})
            if at.done:
                return
            print(f"round {r.number}: resumed from step {at.step}", flush=True)
        logs = open_logs(sweep, r, at.step)
        finished = False  # nobody is left to train

        def batches() -> Iterator[Any]:
            with contextlib.ExitStack() as streams:
                loaders = [
                    streams.enter_context(contextlib.closing(stream(sweep, r, "train", seed, at.loader)))
                    for seed in r.seeds
                ]
                mine = [r.seeds.index(data_seed(r.members[i])) for i in own]
                while not finished:
                    items = [next(loader) for loader in loaders]
                    batch = {name: [item[0][name] for item in items] for name in items[0][0]}
                    batch = {name: xs[0] if shared_batch else stacked(xs, mine) for name, xs in batch.items()}
                    position = {str(seed): item[1]["position"] for seed, item in zip(r.seeds, items)}
                    arrays = {f"{seed}_{n}": item[1][n] for seed, item in zip(r.seeds, items) for n in ("tokens", "lengths")}
                    yield batch, {"position": position, "arrays": arrays}, {}

        def step_fn(state: TrainState, batch: Any, number: int, _: Any) -> tuple[TrainState, dict[str, Any]]:
            hparams = [optim.hparams(r.members[i].config.optim, r.plans[i], number) for i in own]
            micro_batches = split(batch, config.rows, shared_batch)
            state, m = members_step(state, micro_batches, functional.stack_hparams(hparams, runtime.device))
            local = np.stack([m[name].double().cpu().numpy() for name in ("loss", "grad_norm", "finite")])
            step_fn.members = np.concatenate(distributed.all_gather_object(local), axis=1)[:, : len(r.members)]
            losses = step_fn.members[0][step_fn.members[2] > 0]
            return state, {"loss": losses.mean() if len(losses) else math.nan, "finite": True}

        def after_step(state: TrainState, at: Progress, numbers: dict[str, float]) -> Progress:
            nonlocal finished
            losses, norms, finite = step_fn.members
            before = at.ema or [(0.0, 0.0)] * len(losses)
            ema = [x and metrics.logger.ema(x, loss)[0] for x, loss in zip(before, losses)]
            for i, member in enumerate(r.members):
                if ema[i] and not finite[i]:
                    bar.write(f"step {at.step}: member {member.name} ({member.label}) diverged; it is frozen")
            finished = not finite.any()
            last = finished or at.step == num_steps
            tokens = r.plans[0].total_batch_size
            seconds = numbers["perf/step_seconds"]
            at = at._replace(ema=[x if ok else None for x, ok in zip(ema, finite)], tokens=at.tokens + tokens, done=last)
            speed = f"{len(losses)} x {format_count(tokens / seconds)} tok/s"
            best = min((x[0] / x[1] for x in at.ema if x), default=math.nan)
            bar.update(1, best_loss=f"best loss {best:.4f}", speed=speed)
            if at.step % config.metrics.every_steps == 0 or at.step == 1 or last or not finite.all():
                for i, log in enumerate(logs):
                    if before[i]:
                        mean, weight = ema[i]
                        row = {"train/loss": losses[i], "train/loss_ema": mean / weight if weight else math.nan}
                        row |= {"train/grad_norm": norms[i], "train/tokens": at.tokens}
                        row |= {"train/diverged": int(not finite[i]), "perf/step_seconds": seconds}
                        row |= {"perf/wall_seconds": at.wall_seconds, "perf/tokens_per_second": tokens / seconds}
                        metrics.logger.write(log, at.step, row)
            if last or train.stage.is_due(at.step, config.eval.every_steps):
                evaluate(sweep, r, state, at, eval_fn, own, logs, bar, last)
            if last or train.stage.is_due(at.step, config.checkpoint.every_steps):
                save(state, at)
            return at

        def save(state: TrainState, at: Progress) -> None:
            if at.loader is None:
                return
            meta = {
                "config": dict(configs.flatten(config)),
                "model": dataclasses.asdict(r.shape),
                "members": [m.name for m in r.members],
                "loader": at.loader["position"],
                "progress": at._replace(loader=None)._asdict(),
            }
            sweep.check_lock()
            checkpoint.save(manager, to_global(state, runtime), meta, arrays=at.loader["arrays"])

        label = f"{config.name} round {r.number}"
        bar = stack.enter_context(metrics.progress.Bar(num_steps, initial=at.step, label=label))
        train.fit(
            state, at, stack.enter_context(contextlib.closing(batches())), num_steps=num_steps, step_fn=step_fn,
            after_step=after_step, save=save, stop=stop,
        )  # fmt: skip


def step_functions(config: Config, r: Round, runtime: Runtime, shared_batch: bool) -> tuple[Any, Any, str]:
    """Return (the members' step, their loss for evaluation, its kernels as text)."""
    from nanochat.model import attention
    from nanochat.train import functional

    # flex has no rule for vmap.
    choice = train.build.choose_attention(
        dataclasses.replace(config, train=dataclasses.replace(config.train, grad="torch_func")), r.shape, runtime
    )
    attend = functional.fold_members(attention.build(choice.names, r.shape.sequence_len, runtime.device))
    compile = functools.partial(distributed.compile_fn, memory_budget=config.train.memory_budget)
    compute = model.Compute(dtype=runtime.compute_dtype, attend=attend)
    chunk_tokens = max(train.build.chunk_tokens(config, runtime) // r.chunk_size, 128)  # logits of one model, in all
    loss_fn = functools.partial(model.loss.next_token, config=r.shape, compute=compute, chunk_tokens=chunk_tokens)
    options: Any = {"chunk_size": r.chunk_size, "compile": compile if config.compile else None}
    step = functional.make_members_step(
        loss_fn, shared_batch=shared_batch, compute_dtype=runtime.compute_dtype, **options
    )
    return step, functional.make_members_loss(loss_fn, **options), f"attention {choice.text}"


def init_state(r: Round, own: Sequence[int], runtime: Runtime, device: Any = None) -> TrainState:
    """Return the state of this rank's members before the first step."""
    from nanochat.train import functional

    device, dtype = device or runtime.device, runtime.compute_dtype

    def one(i: int) -> TrainState:
        params = model.init(r.shape, r.members[own[i]].config.seed, device=device, dtype=dtype)
        return train.init(params, model.spec(r.shape), dtype)

    state = functional.init_members(one, len(own))
    return state._replace(step=state.step[0].clone())


def to_global(state: TrainState, runtime: Runtime) -> TrainState:
    """Return the state of all ranks' members, a DTensor a leaf, as a checkpoint holds it for any number of ranks."""
    if runtime.world_size == 1:
        return state
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from nanochat import tree

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))

    def place(x: Any) -> Any:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    parts = {name: tree.map(place, getattr(state, name)) for name in ("params", "opt_state", "scaler")}
    return state._replace(**parts)


def stream(sweep: Sweep, r: Round, split: Literal["train", "val"], seed: int, state: Any = None) -> Any:
    """Return the batches of all members with this order of the data; each rank reads them whole."""
    first = r.members[0].config
    loader = None
    if state is not None:
        arrays = {n: state["arrays"][f"{seed}_{n}"] for n in ("tokens", "lengths")}
        loader = {"position": state["position"][str(seed)], **arrays}
    rows = r.plans[0].total_batch_size // r.shape.sequence_len if split == "train" else sweep.config.rows
    return data.loader.batches(
        dataclasses.replace(first.data, seed=seed), sweep.tok, split=split, rows_per_step=rows,
        sequence_len=r.shape.sequence_len, seed=seed, state=loader, device=sweep.runtime.device,
    )  # fmt: skip


def stacked(tensors: Sequence[Any], indices: Sequence[int]) -> Any:
    import torch

    return torch.stack([tensors[i] for i in indices])


def split(batch: Any, rows: int, shared_batch: bool) -> list[Any]:
    """Return a step's batch as micro-batches of so many rows of each member."""
    parts = {name: x.split(rows, dim=0 if shared_batch else 1) for name, x in batch.items()}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


def time_estimate(members_step: Any, state_of: Any, r: Round, config: Config, runtime: Runtime) -> str:
    """Return how long the round takes, by two steps of a state that is thrown away."""
    import torch

    from nanochat.train import functional

    state, rows = state_of(), r.plans[0].total_batch_size // r.shape.sequence_len
    n = len(state.scaler["scale"])
    shape = (rows, r.shape.sequence_len) if len(r.seeds) == 1 else (n, rows, r.shape.sequence_len)
    ids = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
    batches = split({"inputs": ids, "targets": ids}, config.rows, len(r.seeds) == 1)
    hparams = [optim.hparams(r.members[0].config.optim, r.plans[0], 0)] * n
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        state, out = members_step(state, batches, functional.stack_hparams(hparams, runtime.device))
        float(out["loss"].sum())
        seconds.append(time.perf_counter() - start)
    total = seconds[1] * r.plans[0].num_steps
    return f"a step takes {format_duration(seconds[1])}, all steps {format_duration(total)} without evaluations"


def open_logs(sweep: Sweep, r: Round, step: int) -> list[Any]:
    """Return the metrics.jsonl of each member, without the steps after this one."""
    return [
        metrics.logger.open_log(
            sweep.folder / "members" / m.name,
            resume_step=step or None,
            config=m.config,
            enabled=sweep.runtime.is_main,
        )
        for m in r.members
    ]


def evaluate(
    sweep: Sweep, r: Round, state: TrainState, at: Progress, eval_fn: Any, own: Sequence[int], logs: Any, bar: Any,
    last: bool,
) -> None:  # fmt: skip
    """Log the bits per byte of all members; after the last step, keep those of every row of the validation text."""
    from nanochat.train import functional

    count = max(1, sweep.config.eval.tokens // (sweep.config.rows * r.shape.sequence_len))
    with contextlib.closing(stream(sweep, r, "val", r.seeds[0])) as validation:
        batches = [batch for batch, *_ in itertools.islice(validation, count)]
    nats, sizes = eval.bpb.sum_nats(state.params, batches, sweep.tok, eval_fn)
    bpb = np.concatenate(distributed.all_gather_object(nats.numpy() / (math.log(2) * sizes)))[: len(r.members)]
    live = [i for i in range(len(r.members)) if at.ema[i]]
    for i in live:
        metrics.logger.write(logs[i], at.step, {"val/bpb": bpb[i]})
    if live:
        best = min(live, key=lambda i: bpb[i])
        bar.write(f"step {at.step}: best member {r.members[best].name} ({r.members[best].label}): {bpb[best]:.4f} bits per byte")
    if last:
        compute = model.Compute(dtype=sweep.runtime.compute_dtype)
        rows = [
            sum(eval.bpb.nats_by_row(functional.select(state.params, i), batches, sweep.tok, r.shape, compute), [])
            for i in range(len(own))
        ]
        everyone = np.concatenate(distributed.all_gather_object(np.array(rows)))[: len(r.members)]
        if sweep.runtime.is_main:
            np.save(round_folder(sweep.folder, r) / "val_nats.npy", everyone)


# What came of it


def finish(sweep: Sweep, rounds: Sequence[Round]) -> None:
    """Print and write the table, the figure and the conclusion, and write members as runs."""
    config, folder = sweep.config, sweep.folder
    best = None
    with distributed.raise_on_any_failure():
        if sweep.runtime.is_main:
            rows = {m.name: metrics.logger.read(folder / "members" / m.name) for r in rounds for m in r.members}
            nats = {}
            for r in rounds:
                nats |= zip([m.name for m in r.members], np.load(round_folder(folder, r) / "val_nats.npy"))
            results = [result(m, rows[m.name]) for r in rounds for m in r.members]
            lines = _sweep.members_table(results)
            _sweep.write_csv(folder / "members.csv", lines)
            shown = lines[: 1 + _sweep.TABLE_ROWS]
            print(table(shown) + f"\n  … all {len(lines) - 1} in members.csv" * (len(lines) > len(shown)))
            curves = {name: metrics.logger.curve(rows[name], "train/loss_ema") for name in rows}
            _sweep.draw(folder / "sweep.svg", results, curves, f"{config.name}: {len(results)} members")
            print("\n".join(_sweep.conclusion(results, nats)))
            alive = [r.member.name for r in sorted(results, key=lambda r: r.bpb) if not math.isnan(r.bpb)]
            best = alive[0] if alive else None
            print(f"{folder}: members/, members.csv, sweep.svg, rounds/")
    best = distributed.broadcast_object(best)
    for kept in dict.fromkeys(best if kept == "best" else kept for kept in config.keep):
        if kept:
            r = next(r for r in rounds if kept in [m.name for m in r.members])
            write_member(sweep, r, [m.name for m in r.members].index(kept))


def result(member: Member, rows: Sequence[Any]) -> Result:
    _, losses = metrics.logger.curve(rows, "train/loss_ema")
    _, bpb = metrics.logger.curve(rows, "val/bpb")
    diverged = next((row["step"] for row in rows if row.get("train/diverged")), None)
    return Result(member, math.nan if diverged or not bpb else bpb[-1], losses[-1] if losses else math.nan, diverged)


def write_member(sweep: Sweep, r: Round, index: int) -> None:
    """Write a member's last state as a pretraining run of its own, with optimizer state, data position and metrics."""
    from nanochat.train import functional

    member, runtime = r.members[index], sweep.runtime
    folder = train.run_folder(str(member.config.name))
    here = round_folder(sweep.folder, r) / "checkpoints"
    every = [min(i, len(r.members) - 1) for i in range(r.padded)]
    state, meta, arrays = checkpoint.restore(here, init_state(r, every, runtime, device="meta"))
    at, step, seed = train.progress_from(meta), int(state.step), data_seed(member)
    own = type(state)(state.step, *(functional.select(part, index) for part in state[1:]))
    own = own._replace(scaler=train.step.init_scaler(runtime.compute_dtype, state.step.device))
    saved = {
        "stage": "base",
        "parent": None,
        "config": dict(configs.flatten(member.config)),
        "model": dataclasses.asdict(r.shape),
        "loader": meta["loader"][str(seed)],
        "progress": at._replace(ema=at.ema[index])._asdict(),
        "tokens": at.tokens,
        "num_steps": r.plans[index].num_steps,
        "sweep": {"run": sweep.folder.name, "member": member.name},
    }
    loader = {f"loader_{n}": arrays[f"{seed}_{n}"] for n in ("tokens", "lengths")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(metrics.run_lock.held(folder))
        settings = dataclasses.replace(member.config, resume=not sweep.config.overwrite, overwrite=sweep.config.overwrite)
        manager = train.init_from.open_checkpoints(folder, settings, runtime)
        stack.callback(checkpoint.close, manager)
        if runtime.is_main:
            tokenizer.save(sweep.tok, folder / "tokenizer")
            for file in ("metrics.jsonl", "config.json"):
                shutil.copy(sweep.folder / "members" / member.name / file, folder / file)
        distributed.barrier()
        files = {file: folder / "tokenizer" / file for file in tokenizer.FILES}
        checkpoint.save(manager, own, saved, arrays=loader, files=files)
    print(f"member {member.name} ({member.label}) is the run {folder.name}, at step {step}. Next:")
    print(f"  python launch.py --experiment=eval_base --set run={folder.name}")
    print(f"  python launch.py --experiment=sft --set run={folder.name}")
