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
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments import _sweep, pretrain
from experiments._sweep import Member
from nanochat import checkpoint, data, distributed, eval, jsonl, metrics, model, optim, train
from nanochat import config as configs
from nanochat.config import PositiveInt, UserError
from nanochat.data import tokenizer
from nanochat.text import format_count, format_duration, table

if TYPE_CHECKING:
    from nanochat.distributed import Runtime
    from nanochat.train import Progress, StopFlag, TrainState

TABLE_ROWS = 24
LOADER_ARRAYS = ("tokens", "lengths")


@dataclasses.dataclass(frozen=True)
class Config(pretrain.Config):
    """A sweep over settings of pretraining.

    Attributes:
        vary: settings and their values, `optim.matrix_lr=0.01,0.02 seed=1..4` for a grid, or
            `random:16 optim.matrix_lr=0.001..0.1` for random draws.
        members_per_device: members of a step on each device; auto: as many as fit by the estimate of memory.
        chunk_size: members that a step computes at once; auto: all, but on the CPU one where a single model is large.
        keep: members to write as runs at the end: best, or names such as 03; none for no.
    """

    vary: str = "optim.matrix_lr=0.005,0.01,0.02,0.04"
    members_per_device: PositiveInt | Literal["auto"] = "auto"
    chunk_size: PositiveInt | Literal["auto"] = "auto"
    keep: tuple[str, ...] = ("best",)


config = Config


class Round(NamedTuple):
    """Members of one step, of one shape and batch."""

    number: int  # from 1
    members: list[Member]
    shape: model.ModelConfig
    plans: list[optim.Plan]  # of each member; they differ in the weight decay
    chunk_size: int
    padded: int  # members with the copies of the last one that fill up the last rank

    @property
    def seeds(self) -> list[int]:
        """The different orders of the data."""
        return sorted({data_seed(member.config) for member in self.members})

    @property
    def rows(self) -> int:
        """Sequences of a step of a member."""
        return self.plans[0].total_batch_size // self.shape.sequence_len

    def own(self, runtime: Runtime) -> list[int]:
        """The indices of a rank's members."""
        each = self.padded // runtime.world_size
        return [min(i, len(self.members) - 1) for i in range(runtime.rank * each, (runtime.rank + 1) * each)]


class Sweep(NamedTuple):
    """What the rounds share."""

    config: Config
    runtime: Runtime
    tok: data.Tokenizer
    folder: Path
    stop: StopFlag


def run(config: Config, runtime: Runtime) -> None:
    name = config.name or f"d{config.depth or pretrain.DEPTH}_sweep"
    config = train.resume_after_restart(dataclasses.replace(config, name=name), name, runtime)
    if config.init_from or config.resume_step or config.fit or config.device_batch_size == "auto":
        raise UserError("a sweep takes no init_from, resume_step or fit, and a number as device_batch_size: unset them")
    if config.train.linear == "fp8" or runtime.compute_dtype not in map(
        distributed.DTYPES.get, ("float32", "bfloat16")
    ):
        raise UserError("a sweep computes in dtype=float32 or bfloat16, with train.linear=dense")
    base = pretrain.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(pretrain.Config)})
    base = dataclasses.replace(base, resume=False, data=dataclasses.replace(base.data, seed=data_seed(base)))
    members = _sweep.make_members(config.vary, base)
    if wrong := set(config.keep) - {"best", *(m.name for m in members)}:
        raise UserError(f"keep={min(wrong)}: no such member; set best, or {members[0].name} … {members[-1].name}")
    tok = pretrain.load_tokenizer(config, None, required=not config.dry_run)
    folder = train.run_folder(name)
    with contextlib.ExitStack() as stack:
        saved = None
        if not config.dry_run:
            stack.enter_context(metrics.run_lock.held(folder))
            saved = read_saved(config, folder, runtime, members)
        rounds = make_rounds(config, members, saved, tok, runtime)
        print(describe(config, rounds, runtime, folder), flush=True)
        if tok is None or config.dry_run:
            return
        if runtime.is_main:
            parts = [{"members": [m.name for m in r.members], **{n: getattr(r, n) for n in SAVED}} for r in rounds]
            text = json.dumps({"members": {m.name: dict(m.values) for m in members}, "rounds": parts}, indent=1)
            jsonl.write_atomic(folder / "sweep.json", f"{text}\n")
        stop = stack.enter_context(train.stop_on_signals())
        distributed.mark_restart(f"opened {name}")
        sweep = Sweep(config, runtime, tok, folder, stop)
        for r in rounds:
            train_round(sweep, r)
            if stop.agreed() and stop.signal:
                print(f"stopped by {stop.signal.name} in round {r.number} of {len(rounds)}; --resume continues")
                raise SystemExit(128 + stop.signal)
        best = show_results(sweep, rounds)
        for kept in dict.fromkeys(best if kept == "best" else kept for kept in config.keep):
            if kept:
                write_member(sweep, next(r for r in rounds if kept in [m.name for m in r.members]), kept)


def data_seed(config: pretrain.Config) -> int:
    return config.seed if config.data.seed is None else config.data.seed


# What to train

SAVED = ("chunk_size", "padded")  # of a round


def read_saved(config: Config, folder: Path, runtime: Runtime, members: Sequence[Member]) -> list[dict] | None:
    """Return the rounds of a sweep that resumes; None for a new one, for which old rounds are removed."""
    saved, path = None, folder / "sweep.json"
    with distributed.raise_on_any_failure():
        if runtime.is_main and path.exists():
            saved = json.loads(path.read_text("utf-8"))
            if not config.resume and not config.overwrite:
                raise UserError(
                    f"sweep {folder} exists: --resume continues it, --set name=<other> starts another, --set "
                    "overwrite=true replaces it"
                )
            if not config.resume:
                shutil.rmtree(folder / "rounds", ignore_errors=True)
                saved = None
            elif saved["members"] != json.loads(json.dumps({m.name: dict(m.values) for m in members})):
                raise UserError(f"vary={config.vary}: the sweep in {folder} has other members; set another name")
    saved = distributed.broadcast_object(saved)
    return saved and saved["rounds"]


def make_rounds(
    config: Config, members: Sequence[Member], saved: list[dict] | None, tok: Any, runtime: Runtime
) -> list[Round]:
    """Return the rounds: those of a sweep that resumes, else with as many members in each as the devices hold."""
    rounds, by_name = [], {m.name: m for m in members}
    groups = [[by_name[n] for n in part["members"]] for part in saved or []] or _sweep.group_by_shape(members)
    for group in groups:
        resolved = [pretrain.resolve(m.config, tok) for m in group]
        shape, first = resolved[0]
        optim.scaling.accumulation_steps(first.total_batch_size, config.rows, shape.sequence_len, 1)  # checks them
        here = Round(len(rounds) + 1, group, shape, [plan for _, plan in resolved], 1, len(group))
        if saved:
            rounds.append(here._replace(**{name: saved[len(rounds)][name] for name in SAVED}))
            if rounds[-1].padded % runtime.world_size:
                raise UserError(
                    f"the {rounds[-1].padded} members of a round do not divide by {runtime.world_size} ranks"
                )
            continue
        tokens = min(here.rows, config.rows) * shape.sequence_len
        auto = train.functional.choose_chunk_size(shape, tokens, len(group), runtime.device)
        here = here._replace(chunk_size=auto if config.chunk_size == "auto" else config.chunk_size)
        most = (
            fitting_members(config, here, runtime) if config.members_per_device == "auto" else config.members_per_device
        )
        each = -(-len(group) // -(-len(group) // (most * runtime.world_size)))  # rounds of about equally many
        for start in range(0, len(group), each):
            part = slice(start, start + each)
            padded = -(-len(group[part]) // runtime.world_size) * runtime.world_size
            rounds.append(
                here._replace(number=len(rounds) + 1, members=group[part], plans=here.plans[part], padded=padded)
            )
    return rounds


def memory(config: Config, r: Round, members: int, runtime: Runtime) -> float:
    """Return the bytes that a step of so many members on a device takes, by the planner's estimate for one."""
    setup = dataclasses.replace(train.planner_setup(config, runtime), mode="replicate", world_size=1)
    rows = min(r.rows, config.rows)
    one = train.planner.memory(r.shape, setup, rows=rows, micro_batches=r.rows // rows).parts
    each = one["parameters"] + one["optimizer"]
    at_once = sum(one.values()) - one["overhead"] - each
    return one["overhead"] + members * each + min(r.chunk_size, members) * at_once


def fitting_members(config: Config, r: Round, runtime: Runtime) -> int:
    """Return how many members fit on each device."""
    capacity = distributed.free_bytes(runtime.device, runtime.node_ranks) * (1 - train.planner.RESERVE)
    counts = range(len(r.members), 0, -1)
    fits = -distributed.all_reduce_max(-next((n for n in counts if memory(config, r, n, runtime) < capacity), 0))
    if not fits:
        raise UserError(f"not even one member of depth {r.shape.n_layer} fits in memory; lower device_batch_size")
    return fits


def describe(config: Config, rounds: Sequence[Round], runtime: Runtime, folder: Path) -> str:
    """Return what the sweep will do, and how much memory it takes."""
    lines = [f"sweep over {sum(len(r.members) for r in rounds)} members: {config.vary}; {folder}"]
    for r in rounds:
        each, plan = r.padded // runtime.world_size, r.plans[0]
        lines.append(
            f"  round {r.number} of {len(rounds)}: {len(r.members)} members of depth {r.shape.n_layer}, width "
            f"{r.shape.n_embd}, {format_count(model.count(r.shape)['total'])} parameters; {plan.num_steps} steps of "
            f"{plan.total_batch_size:,} tokens each; on {runtime.world_size} x {runtime.device.type}, {each} on each, "
            f"{min(r.chunk_size, each)} at once, about {memory(config, r, each, runtime) / 2**30:.1f} GiB"
        )
    return "\n".join(lines)


# Train a round


def round_folder(sweep: Sweep, r: Round) -> Path:
    return sweep.folder / "rounds" / str(r.number)


def train_round(sweep: Sweep, r: Round) -> None:
    """Train the members of a round to their end, or to a signal; a round that is done is skipped."""
    import torch

    config, runtime, own = sweep.config, sweep.runtime, r.own(sweep.runtime)
    num_steps, step_tokens, shared_batch = r.plans[0].num_steps, r.plans[0].total_batch_size, len(r.seeds) == 1
    with contextlib.ExitStack() as stack:
        manager = checkpoint.open_manager(round_folder(sweep, r) / "checkpoints", config.checkpoint)
        stack.callback(checkpoint.close, manager)
        at, restored = train.Progress(), checkpoint.latest_step(manager) is not None
        if restored:
            abstract = to_global(init_state(r, own, runtime, "meta"), runtime)
            state, meta, arrays = checkpoint.restore(manager, abstract, device=runtime.device)
            state = distributed.sharding.local_shards(state)
            at = train.progress_from(meta)._replace(loader={"position": meta["loader"], "arrays": arrays})
            if at.done:
                return
        members_step, eval_fn, kernels = step_functions(config, r, runtime, shared_batch)

        def step_fn(state: TrainState, batch: Any, number: int, _: Any = None) -> tuple[TrainState, dict[str, Any]]:
            hparams = [optim.hparams(r.members[i].config.optim, r.plans[i], number) for i in own]
            parts = {name: x.split(config.rows, dim=0 if shared_batch else 1) for name, x in batch.items()}
            micro_batches = [dict(zip(parts, values)) for values in zip(*parts.values())]
            state, m = members_step(state, micro_batches, train.functional.stack_hparams(hparams, runtime.device))
            local = np.stack([m[name].cpu().double().numpy() for name in ("loss", "grad_norm", "finite")])
            latest[:] = np.concatenate(distributed.all_gather_object(local), axis=1)[:, : len(r.members)]
            return state, {"loss": math.nan, "finite": True}  # which are of no single model

        latest: list[np.ndarray] = []  # losses, gradient norms and whether they are finite, by member
        batches = stack.enter_context(contextlib.closing(members_batches(sweep, r, own, at.loader)))
        if not restored:
            state = init_state(r, own, runtime)
            batch, seconds = next(batches)[0], [0.0, 0.0]
            batches = stack.enter_context(contextlib.closing(members_batches(sweep, r, own, None)))
            for i in range(2):  # on a state that is thrown away; the first step compiles
                start = time.perf_counter()
                try:
                    step_fn(state, batch, 0)
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"{len(own)} members run out of memory: --set members_per_device={max(len(own) // 2, 1)}"
                    ) from None
                seconds[i] = time.perf_counter() - start
            state = init_state(r, own, runtime)
        took = (
            f"resumed from step {at.step}"
            if restored
            else (
                f"a step takes {format_duration(seconds[1])}, all {num_steps} {format_duration(seconds[1] * num_steps)}"
            )
        )
        print(f"round {r.number}: attention {kernels}; {took}", flush=True)
        logs = [
            metrics.logger.open_log(
                sweep.folder / "members" / m.name, resume_step=at.step or None, config=m.config, enabled=runtime.is_main
            )
            for m in r.members
        ]

        def after_step(state: TrainState, at: Progress, numbers: dict[str, float]) -> Progress:
            losses, norms, finite = latest
            before, seconds = at.ema or [None] * len(losses), numbers["perf/step_seconds"]
            frozen = [b is not None and not b[1] for b in before]  # their average has no weight
            ema = [(0.0, 0.0) if not ok else metrics.logger.ema(b, x)[0] for b, x, ok in zip(before, losses, finite)]
            at = at._replace(ema=ema, tokens=at.tokens + step_tokens, done=at.step == num_steps)
            smooth = [mean / weight if weight else math.nan for mean, weight in ema]
            best, speed = min([x for x in smooth if x == x], default=math.nan), step_tokens / seconds
            bar.update(1, best=f"best loss {best:.4f}", speed=f"{len(losses)} x {format_count(speed)} tok/s")
            due = at.step % config.metrics.every_steps == 0 or at.step == 1 or at.done
            for i, member in enumerate(r.members):
                if not finite[i] and not frozen[i]:
                    bar.write(f"step {at.step}: member {member} diverged and is frozen")
                if (due or not finite[i]) and not frozen[i]:
                    row = {"train/loss": losses[i], "train/loss_ema": smooth[i], "train/grad_norm": norms[i]}
                    row |= {"train/tokens": at.tokens, "train/diverged": int(not finite[i])}
                    row |= {"perf/step_seconds": seconds, "perf/wall_seconds": at.wall_seconds}
                    metrics.logger.write(logs[i], at.step, row | {"perf/tokens_per_second": speed})
            if at.done or train.stage.is_due(at.step, config.eval.every_steps):
                bpb = evaluate(sweep, r, state, eval_fn, at.done)
                alive = [i for i in range(len(bpb)) if finite[i]]
                for i in alive:
                    metrics.logger.write(logs[i], at.step, {"val/bpb": bpb[i]})
                if alive:
                    i = min(alive, key=bpb.__getitem__)
                    bar.write(f"step {at.step}: member {r.members[i]} is best: {bpb[i]:.4f} bits per byte")
            if at.done or train.stage.is_due(at.step, config.checkpoint.every_steps):
                save(state, at)
            return at

        def save(state: TrainState, at: Progress) -> None:
            if at.loader is not None:  # before the first step, the seeds give the same state again
                progress = at._replace(loader=None)._asdict()
                meta = {"model": dataclasses.asdict(r.shape), "loader": at.loader["position"], "progress": progress}
                checkpoint.save(manager, to_global(state, runtime), meta, arrays=at.loader["arrays"])

        label = f"{config.name} round {r.number}"
        bar = stack.enter_context(metrics.progress.Bar(num_steps, initial=at.step, label=label))
        hooks: Any = {"step_fn": step_fn, "after_step": after_step, "save": save, "stop": sweep.stop}
        train.fit(state, at, batches, num_steps=num_steps, **hooks)


def step_functions(config: Config, r: Round, runtime: Runtime, shared_batch: bool) -> tuple[Any, Any, str]:
    """Return (the members' step, their loss for evaluation, its attention kernel as text)."""
    from nanochat.model import attention

    train.build.require_compiler(config, runtime)
    vmapped = dataclasses.replace(
        config, train=dataclasses.replace(config.train, grad="torch_func")
    )  # which flex is not
    choice = train.build.choose_attention(vmapped, r.shape, runtime)
    attend = attention.build(choice.names, r.shape.sequence_len, runtime.device)
    attend = attend if r.chunk_size == 1 else train.functional.fold_members(attend)
    chunk_tokens = max(train.build.chunk_tokens(config, runtime) // r.chunk_size, 128)  # together, as for one model
    compute = model.Compute(dtype=runtime.compute_dtype, attend=attend)
    loss_fn = functools.partial(model.loss.next_token, config=r.shape, compute=compute, chunk_tokens=chunk_tokens)
    compile = functools.partial(distributed.compile_fn, memory_budget=config.train.memory_budget)
    options: Any = {"chunk_size": r.chunk_size, "compile": compile if config.compile else None}
    eval_fn = train.functional.make_members_loss(loss_fn, **options)
    options |= {"shared_batch": shared_batch, "compute_dtype": runtime.compute_dtype}
    return train.functional.make_members_step(loss_fn, **options), eval_fn, choice.text


def init_state(r: Round, own: Sequence[int], runtime: Runtime, device: Any = None) -> TrainState:
    """Return the state of these members before the first step."""
    device, dtype, spec = device or runtime.device, runtime.compute_dtype, model.spec(r.shape)

    def one(i: int) -> TrainState:
        settings = r.members[own[i]].config
        params = model.init(r.shape, settings.seed, device=device, dtype=dtype)
        return train.build.with_embedding_moments(settings.train.embedding_moments, train.init(params, spec, dtype))

    state = train.functional.init_members(one, len(own))
    return state._replace(step=state.step[0].clone())


def to_global(state: TrainState, runtime: Runtime) -> TrainState:
    """Return the state of all ranks' members as DTensors, which a checkpoint restores on another number of ranks."""
    if runtime.world_size == 1:
        return state
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from nanochat import tree

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    parts = tree.map(lambda x: DTensor.from_local(x, mesh, [Shard(0)], run_check=False), tuple(state[1:]))
    return type(state)(state.step, *parts)


def stream(sweep: Sweep, r: Round, split: Literal["train", "val"], rows: int, seed: int, state: Any = None) -> Any:
    """Return the batches in one order of the data; each rank reads them whole."""
    own: Any = None
    if state:
        arrays = {name: state["arrays"][f"{seed}_{name}"] for name in LOADER_ARRAYS}
        own = {"position": state["position"][str(seed)], **arrays}
    return data.loader.batches(
        dataclasses.replace(sweep.config.data, seed=seed), sweep.tok, split=split, rows_per_step=rows,
        sequence_len=r.shape.sequence_len, seed=seed, state=own, device=sweep.runtime.device,
    )  # fmt: skip


def members_batches(sweep: Sweep, r: Round, own: Sequence[int], state: Any) -> Generator[Any, None, None]:
    """Yield (the batch of all members, or stacked those of each, the loaders' state, no statistics) for `train.fit`."""
    import torch

    order = [r.seeds.index(data_seed(r.members[i].config)) for i in own]
    with contextlib.ExitStack() as stack:
        streams = [stream(sweep, r, "train", r.rows, seed, state) for seed in r.seeds]
        for one in streams:
            stack.enter_context(contextlib.closing(one))
        for items in zip(*streams):
            batch = items[0][0]
            if len(streams) > 1:
                batch = {name: torch.stack([items[i][0][name] for i in order]) for name in batch}
            states = dict(zip(r.seeds, (item[1] for item in items)))
            position = {str(seed): one["position"] for seed, one in states.items()}
            arrays = {f"{seed}_{name}": one[name] for seed, one in states.items() for name in LOADER_ARRAYS}
            yield batch, {"position": position, "arrays": arrays}, {}


def evaluate(sweep: Sweep, r: Round, state: TrainState, eval_fn: Any, last: bool) -> np.ndarray:
    """Return the bits per byte of all members; at the end, keep those of every row of the validation text."""
    rows = sweep.config.rows
    with contextlib.closing(stream(sweep, r, "val", rows, r.seeds[0])) as validation:
        count = max(1, sweep.config.eval.tokens // (rows * r.shape.sequence_len))
        batches = [batch for batch, *_ in itertools.islice(validation, count)]
    nats, sizes = eval.bpb.sum_nats(state.params, batches, sweep.tok, eval_fn)
    if last:
        by_row = functools.partial(eval.bpb.nats_by_row, batches=batches, tok=sweep.tok, config=r.shape,
                                   compute=model.Compute(dtype=sweep.runtime.compute_dtype))  # fmt: skip
        members = [train.functional.select(state.params, i) for i in range(len(nats))]
        local = np.array([list(itertools.chain.from_iterable(by_row(params))) for params in members])
        everyone = np.concatenate(distributed.all_gather_object(local))
        if sweep.runtime.is_main:
            np.save(round_folder(sweep, r) / "val_nats.npy", everyone[: len(r.members)])
    return np.concatenate(distributed.all_gather_object(nats.numpy() / (math.log(2) * sizes)))[: len(r.members)]


# What came of it


def show_results(sweep: Sweep, rounds: Sequence[Round]) -> str | None:
    """Print and write the table, the figure and the conclusion; return the best member of the best setting."""
    best, folder = None, sweep.folder
    with distributed.raise_on_any_failure():
        if sweep.runtime.is_main:
            members = [m for r in rounds for m in r.members]
            rows = {m.name: metrics.logger.read(folder / "members" / m.name) for m in members}
            nats = [x for r in rounds for x in np.load(round_folder(sweep, r) / "val_nats.npy")]
            results = [_sweep.result(m, rows[m.name]) for m in members]
            lines = _sweep.members_table(results)
            jsonl.write_atomic(folder / "members.csv", "".join(",".join(line) + "\n" for line in lines))
            print(table(lines[: TABLE_ROWS + 1]))
            print(*_sweep.conclusion(results, dict(zip(rows, nats))), sep="\n")
            _sweep.draw(folder / "sweep.svg", results, rows, f"{folder.name}: {len(results)} members")
            print(f"sweep folder: {folder} (members/, members.csv, sweep.svg, rounds/)", flush=True)
            first = next(iter(_sweep.rank_settings(results).values()))[0]
            best = None if math.isnan(first.bpb) else first.member.name
    return distributed.broadcast_object(best)


def write_member(sweep: Sweep, r: Round, name: str) -> None:
    """Write a member's last state as a pretraining run of its own, with optimizer state, data position and metrics."""
    index = [m.name for m in r.members].index(name)
    member, plan, runtime = r.members[index], r.plans[index], sweep.runtime
    shape = dataclasses.replace(member.config.model, vocab_size=r.shape.vocab_size)
    settings = dataclasses.replace(
        member.config, total_batch_size=plan.total_batch_size, num_iterations=plan.num_steps, model=shape,
        resume=not sweep.config.overwrite,
    )  # fmt: skip
    everyone = [min(i, len(r.members) - 1) for i in range(r.padded)]
    abstract = init_state(r, everyone, runtime, "meta")
    state, meta, arrays = checkpoint.restore(round_folder(sweep, r) / "checkpoints", abstract)
    own = type(state)(state.step, *(train.functional.select(part, index) for part in state[1:]))
    own = own._replace(scaler=train.step.init_scaler(runtime.compute_dtype, state.step.device))  # NaN where it diverged
    at, seed, folder = train.progress_from(meta), data_seed(member.config), train.run_folder(str(member.config.name))
    saved = {
        "stage": "base", "parent": None, "config": dict(configs.flatten(dataclasses.replace(settings, resume=False))),
        "model": dataclasses.asdict(r.shape), "loader": meta["loader"][str(seed)], "tokens": at.tokens,
        "progress": at._replace(ema=at.ema[index])._asdict(), "num_steps": plan.num_steps, "sweep": sweep.folder.name,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(metrics.run_lock.held(folder))
        manager = train.init_from.open_checkpoints(folder, settings, runtime)
        stack.callback(checkpoint.close, manager)
        if runtime.is_main:
            tokenizer.save(sweep.tok, folder / "tokenizer")
            for file in ("metrics.jsonl", "config.json"):
                shutil.copy(sweep.folder / "members" / name / file, folder / file)
        distributed.barrier()
        files = {file: folder / "tokenizer" / file for file in tokenizer.FILES}
        loader = {f"loader_{n}": arrays[f"{seed}_{n}"] for n in LOADER_ARRAYS}
        checkpoint.save(manager, own, saved, arrays=loader, files=files)
    print(f"member {member} is the run {folder.name}; next:")
    print(f"  python launch.py --experiment=eval_base --set run={folder.name}")
    print(f"  python launch.py --experiment=chat --set complete=true --set run={folder.name}", flush=True)
