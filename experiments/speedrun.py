"""The whole way to a model that chats: data, tokenizer, pretraining, fine-tuning, evaluations, the report card.

    torchrun --nproc_per_node=8 launch.py --experiment=speedrun                       # depth 24, fp8 where it is fast
    torchrun --nproc_per_node=8 launch.py --experiment=speedrun --set name=d12 --set pretrain.depth=12
    python launch.py --experiment=speedrun --set source=/my/texts --set stages=data,tokenizer,pretrain,report

Prints first what it will do and what that takes. The same command resumes after a stop: what is finished is
skipped, what is broken resumed; a changed setting does its stage and those after it again. Settings of a stage are
those of its experiment: pretrain.depth, sft.num_iterations, eval_chat.max_problems; name, device and dtype are those of
the whole. An evaluation that fails, for want of a network for example, is named at the end and does not stop the rest.

Leaves runs/<name> and runs/<name>_sft with the report card in the latter, and <name>_tokenizer, under the base folder.
On 8 H100 pretraining takes about three hours at half of their FLOP/s, and all else about one more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from experiments import data, eval_base, eval_chat, pretrain, report, sft, tokenizer
from experiments.data import Config as DataStage
from experiments.eval_base import Config as EvalBaseStage
from experiments.eval_chat import Config as EvalChatStage
from experiments.pretrain import Config as PretrainStage
from experiments.report import Config as ReportStage
from experiments.sft import Config as SftStage
from experiments.tokenizer import Config as TokenizerStage
from nanochat import checkpoint, distributed, model, train
from nanochat.config import Device, Dtype, UserError, base_dir
from nanochat.data import sources
from nanochat.data import tokenizer as bpe
from nanochat.distributed import hardware
from nanochat.text import format_count, format_duration
from nanochat.train import config as stage

if TYPE_CHECKING:
    from nanochat.distributed import ControlGroup, Runtime
    from nanochat.train import StageStatus

Name = Literal["data", "tokenizer", "pretrain", "eval_base", "sft", "eval_chat", "report"]
ORDER: tuple[Name, ...] = ("data", "tokenizer", "pretrain", "eval_base", "sft", "eval_chat", "report")
MODULES = {
    **{"data": data, "tokenizer": tokenizer, "pretrain": pretrain, "eval_base": eval_base, "sft": sft},
    **{"eval_chat": eval_chat, "report": report},
}

PERSONALITY = ("2*identity", "simplespelling:size=200000", "spellingbee:size=80000")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do, and how each stage does it.

    Attributes:
        name: of the base run; the fine-tuned one is <name>_sft.
        stages: which of them, in their order.
        source: of the text, for data, tokenizer and pretraining; none: as these are set.
        fp8: large products of pretraining in float8; none: where the GPU multiplies it.
        resume: no effect: a speedrun always resumes.
        data, tokenizer, pretrain, eval_base, sft, eval_chat, report: as for these experiments.
        device, dtype: auto, or as in `runtime.create`.
    """

    name: str = "speedrun"
    stages: tuple[Name, ...] = ORDER
    source: str | None = None
    fp8: bool | None = None
    resume: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    data: DataStage = DataStage()
    tokenizer: TokenizerStage = TokenizerStage()
    pretrain: PretrainStage = PretrainStage(depth=24, device_batch_size=16)
    eval_base: EvalBaseStage = EvalBaseStage()
    sft: SftStage = SftStage(tasks=(*SftStage().tasks, *PERSONALITY))
    eval_chat: EvalChatStage = EvalChatStage()
    report: ReportStage = ReportStage()


class Stage(NamedTuple):
    """One stage of the way.

    Attributes:
        name: of its experiment. config: for it. text: what it does.
        run: folder of the run that it trains, or None. intact: whether what it made is there.
    """

    name: str
    config: Any
    text: str
    run: Path | None
    intact: Callable[[], bool]


def config() -> Config:
    """Return the reference's speedrun."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Say what is to be done, do what is not done yet, and say what to do next."""
    if not config.stages or config.stages != tuple(name for name in ORDER if name in config.stages):
        raise UserError(f"stages={','.join(config.stages)}: expected some of {', '.join(ORDER)}, in this order")
    config = filled(config, runtime)
    line = distributed.control_group()
    todo = stages(config)
    print(overview(config, todo, runtime, line), flush=True)
    took: dict[str, float] = {}
    failed: dict[str, str] = {}
    after = ""
    for number, one in enumerate(todo, start=1):
        print(f"\n[{number}/{len(todo)}] {one.name}: {one.text}", flush=True)
        if one.name == "report":
            report.make(one.config, runtime, {name: x for name, x in took.items() if name not in ("pretrain", "sft")})
            continue
        try:
            status = done(config, one, after, runtime, line)
        except distributed.LostRankError:
            raise
        except UserError as error:
            if not one.name.startswith("eval_"):
                raise
            failed[one.name] = str(error)
            print(f"{one.name} failed: {error}", flush=True)
            continue
        took[one.name] = status.seconds
        after = after if one.name.startswith("eval_") else status.completion_id  # nothing follows from an evaluation
    print(f"\n{ending(config, took)}")
    if failed:
        raise UserError(
            f"{' and '.join(failed)} failed ({next(iter(failed.values()))}); all else is done, and the same command "
            "does the rest"
        )


def filled(config: Config, runtime: Runtime) -> Config:
    """Return the settings with what the whole decides set in each stage."""
    place = {"device": config.device, "dtype": config.dtype}
    tuned = f"{config.name}_sft"
    folder = str(base_dir() / f"{config.name}_tokenizer")
    fp8 = config.fp8 if config.fp8 is not None else model.linear.fp8_support(runtime.device) == "native"
    train = dataclasses.replace(config.pretrain.train, linear="fp8" if fp8 else "dense")
    texts = {"source": config.source} if config.source else {}

    def of(text: sources.DataConfig) -> sources.DataConfig:
        return dataclasses.replace(text, **texts)

    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=of(config.data.data)),
        tokenizer=dataclasses.replace(config.tokenizer, data=of(config.tokenizer.data), out=folder),
        pretrain=dataclasses.replace(
            config.pretrain, **place, name=config.name, tokenizer=folder, train=train, data=of(config.pretrain.data)
        ),
        eval_base=dataclasses.replace(config.eval_base, **place, run=config.name),
        sft=dataclasses.replace(config.sft, **place, run=config.name, name=tuned),
        eval_chat=dataclasses.replace(config.eval_chat, **place, run=tuned),
        report=dataclasses.replace(config.report, **place, run=tuned if "sft" in config.stages else config.name),
    )


def mark(config: Config, name: str) -> Path:
    """Return the file that says how far a stage is."""
    return base_dir() / "speedrun" / config.name / f"{name}.json"


def stages(config: Config) -> list[Stage]:
    """Return the stages that are asked for."""
    base, tuned = stage.run_folder(config.name), stage.run_folder(f"{config.name}_sft")

    def trained() -> bool:  # then data and tokenizer may go: a run has its own copy of the tokenizer
        return bool(train.pipeline.read_status(mark(config, "pretrain"), {}).completion_id)

    def has_data() -> bool:
        try:
            return bool(sources.shards_of(config.pretrain.data, "train"))
        except UserError:
            return trained()

    def has_tokenizer() -> bool:
        return (Path(str(config.tokenizer.out)) / bpe.TOKENS_FILE).exists() or trained()

    text = config.data.data.source
    shards = f", {config.data.num_shards} shards" if text == "climbmix" else ""
    mixture = ", ".join(config.sft.tasks)
    length = "one epoch" if config.sft.num_iterations is None else f"{config.sft.num_iterations:,} steps"
    found = {
        "data": (f"{text}{shards}", None, has_data),
        "tokenizer": (f"{config.tokenizer.vocab_size:,} tokens", None, has_tokenizer),
        "pretrain": (
            f"depth {config.pretrain.depth}",
            base,
            lambda: bool(checkpoint.steps(base / "checkpoints")),
        ),
        "eval_base": (", ".join(config.eval_base.tasks), None, lambda: True),
        "sft": (f"{length} of {mixture}", tuned, lambda: bool(checkpoint.steps(tuned / "checkpoints"))),
        "eval_chat": (", ".join(config.eval_chat.tasks), None, lambda: True),
        "report": ("the report card", None, lambda: True),
    }
    return [Stage(name, getattr(config, name), *found[name]) for name in config.stages]


def done(config: Config, one: Stage, after: str, runtime: Runtime, line: ControlGroup) -> StageStatus:
    """Do a stage unless it is done, and return where it stands."""
    path, wanted = mark(config, one.name), train.pipeline.settings(one.config, after)
    before = train.pipeline.describe_status(path, wanted, line, intact=one.intact)
    if before.state == "done":
        print(f"already done, in {format_duration(before.seconds)}")
        return before
    if before.state == "changed":
        print(f"again: {train.pipeline.reasons(before)}")

    def act(opening: dict[str, bool]) -> None:
        try:
            MODULES[one.name].run(dataclasses.replace(one.config, **opening), runtime)
        except SystemExit:
            print(f"stopped during {one.name}: run the same command again to resume")
            raise
        hardware.release_memory()

    return train.pipeline.run_if_needed(path, wanted, line, act, run=one.run, intact=one.intact)


# What is said


def overview(config: Config, todo: list[Stage], runtime: Runtime, line: ControlGroup) -> str:
    """Return what is going to be done, and what pretraining takes."""
    words = {"new": "to do", "in_progress": "resume", "done": "done", "changed": "again"}
    rows, after, pending = [], "", False
    for one in todo:
        wanted = train.pipeline.settings(one.config, after)
        status = train.pipeline.describe_status(mark(config, one.name), wanted, line, intact=one.intact)
        state = "written" if one.name == "report" else words[status.state]
        # What follows on something that has yet to be done is compared with what is not there yet.
        if pending and status.state in ("done", "changed") and one.name != "report":
            state = "again" if status.completion_id else "resume"
        trains = not one.name.startswith("eval_") and one.name != "report"
        pending, after = pending or (trains and status.state != "done"), status.completion_id if trains else after
        rows.append(f"  {one.name:<11}{state:<9}{one.text}")
    with distributed.raise_on_any_failure(line):
        price = estimate(config, runtime) if runtime.is_main else ""
    where = f"{runtime.world_size} x {runtime.device.type}"
    return "\n".join([f"speedrun {config.name} on {where}:", *rows, *([price] if price else [])])


def estimate(config: Config, runtime: Runtime) -> str:
    """Return what pretraining comes to, by the planner: size, time, cost."""
    import torch

    if "pretrain" not in config.stages:
        return ""
    vocab_size = config.pretrain.model.vocab_size or config.tokenizer.vocab_size
    shape = dataclasses.replace(config.pretrain.model, vocab_size=vocab_size)
    built, plan = pretrain.resolve(dataclasses.replace(config.pretrain, model=shape), None)
    size = (
        f"pretraining: {format_count(model.count(built)['total'])} parameters, {plan.num_steps:,} steps, "
        f"{format_count(plan.total_tokens)} tokens, {plan.total_flops:.3g} FLOPs"
    )
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else runtime.device.type
    machine = hardware.gpu_spec(name)
    if machine is None:
        return f"{size}; no estimate of time and cost: {name} is not in the table of nanochat/machines.py"
    settings = distributed.sharding.resolve(config.pretrain.sharding)
    rows = config.pretrain.device_batch_size
    setup = train.planner.Setup(
        mode=settings.mode if runtime.world_size > 1 else "replicate",
        world_size=runtime.world_size,
        shard_ranks=distributed.sharding.mesh_shape(settings, runtime.world_size, runtime.node_ranks)[1],
        dtype=runtime.compute_dtype,
        fp8=config.pretrain.train.linear == "fp8",
    )
    rows = None if rows == "auto" else rows
    found = train.planner.estimate(built, plan, machine, setup, node_ranks=runtime.node_ranks, rows=rows)
    if found is None:
        return f"{size}; by the planner's estimate it does not fit: --experiment=plan shows what does"
    price = f"${machine.dollars_per_hour:.2f} an hour and GPU"
    return (
        f"{size}; about {format_duration(3600 * found.hours)} and ${found.dollars:,.0f} by the planner's estimate, at "
        f"{train.planner.MFU:.0%} MFU and {price}; the other stages come on top"
    )


def ending(config: Config, took: dict[str, float]) -> str:
    """Return how long it took, and what to do next."""
    run = f"{config.name}_sft" if "sft" in config.stages else config.name
    lines = [f"speedrun {config.name}: {format_duration(sum(took.values()))} in all. Next:"]
    if "sft" in config.stages:
        lines += [
            f"  python launch.py --experiment=chat --set run={run}     talk to it",
            f"  python launch.py --experiment=web --set run={run}      the same in a browser",
            f"  torchrun launch.py --experiment=rl --set run={run}     practise GSM8K",
        ]
    else:
        lines += [
            f"  python launch.py --experiment=chat --set run={run} --set complete=true --set prompt=...  complete"
        ]
    return "\n".join(lines)
