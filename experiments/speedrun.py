"""Train a chat model end to end: data, tokenizer, pretraining, fine-tuning, evaluation, report.

    torchrun --nproc_per_node=8 launch.py --experiment=speedrun                       # depth 24, fp8 where it is fast
    torchrun --nproc_per_node=8 launch.py --experiment=speedrun --set name=d12 --set pretrain.depth=12
    python launch.py --experiment=speedrun --set source=/my/texts --set stages=data,tokenizer,pretrain,report

Prints the plan first, with an estimate of time and cost. The same command resumes after an interruption and skips
finished stages; a changed setting reruns its stage and the later ones. Each stage has the settings of its experiment,
such as pretrain.depth or sft.num_iterations; name, device and dtype apply to all stages. A failed evaluation, for
example without a network, does not stop the run; it is reported at the end.

The tokenizer trains on the first 8 shards of ClimbMix while the others are fetched in the background.

Writes runs/<name>, runs/<name>_sft (with the report) and <name>_tokenizer to the base folder. The defaults are the
reference's: depth 24, 8 tokens per scaling parameter, fp8. On 8 H100, pretraining takes about two hours at 50% MFU
($48 at $3 an hour and GPU), and the other stages about one hour.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from experiments import _fit, _pipeline, data, eval_base, eval_chat, pretrain, report, sft, tokenizer
from experiments.data import Config as DataConfig
from experiments.eval_base import Config as EvalBaseConfig
from experiments.eval_chat import Config as EvalChatConfig
from experiments.pretrain import Config as PretrainConfig
from experiments.report import Config as ReportConfig
from experiments.sft import Config as SftConfig
from experiments.tokenizer import Config as TokenizerConfig
from nanochat import checkpoint, distributed, metrics, model, train
from nanochat.config import Device, Dtype, Settings, UserError, base_dir
from nanochat.data import download, sources
from nanochat.data import tokenizer as bpe
from nanochat.distributed import hardware
from nanochat.text import format_count, format_duration

Name = Literal["data", "tokenizer", "pretrain", "eval_base", "sft", "eval_chat", "report"]
STAGES: tuple[Name, ...] = get_args(Name)
EXPERIMENTS = dict(zip(STAGES, (data, tokenizer, pretrain, eval_base, sft, eval_chat, report), strict=True))

FIRST_SHARDS = 8  # of ClimbMix: the two billion characters that the tokenizer reads
PERSONALITY = ("2*identity", "simplespelling:size=200000", "spellingbee:size=80000")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Which stages to run, and their settings.

    Attributes:
        name: of the base run; the fine-tuned run is <name>_sft.
        stages: the stages to run, in order.
        source: text source of data, tokenizer and pretraining; default: each stage's own.
        fp8: float8 for the large matrix products of pretraining; default: if the GPU supports it natively, or
            pretrain.train.linear asks for it.
        resume: no effect: a speedrun always resumes.
        data, tokenizer, pretrain, eval_base, sft, eval_chat, report: settings of these experiments.
        device, dtype: auto, or see `distributed.init`.
    """

    name: train.RunName = "speedrun"
    stages: tuple[Name, ...] = STAGES
    source: str | None = None
    fp8: bool | None = None
    resume: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    pretrain: PretrainConfig = PretrainConfig(depth=24, target_param_data_ratio=8.0, device_batch_size=16)
    eval_base: EvalBaseConfig = EvalBaseConfig()
    sft: SftConfig = SftConfig(tasks=(*SftConfig().tasks, *PERSONALITY))
    eval_chat: EvalChatConfig = EvalChatConfig()
    report: ReportConfig = ReportConfig()


class Stage(NamedTuple):
    name: Name
    config: Any
    description: str
    run_dir: Path | None = None  # of the run that it trains
    has_output: Callable[[], bool] = lambda: True

    @property
    def is_eval(self) -> bool:
        return self.name.startswith("eval_")


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Print the plan, run the stages that are not done yet, and print the next commands."""
    if not config.stages or config.stages != tuple(name for name in STAGES if name in config.stages):
        raise UserError(f"stages={','.join(config.stages)}: expected some of {', '.join(STAGES)}, in this order")
    config = resolve(config, runtime)
    with metrics.run_lock.held(status_file(config, "").parent):
        run_stages(config, make_stages(config), runtime)


def run_stages(config: Config, stages: list[Stage], runtime: distributed.Runtime) -> None:
    print(overview(config, stages, runtime), flush=True)
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    after, wait_for_shards = "", lambda: None
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.description}", flush=True)
        if stage.name == "report":
            other = {name: x for name, x in seconds.items() if name not in ("pretrain", "sft")}
            report.make(stage.config, runtime, other)
            continue
        run_stage = EXPERIMENTS[stage.name].run
        if stage.name == "data" and stage.config.data.source == "climbmix":
            run_stage = fetch_first_shards
        elif stage.name != "tokenizer":
            wait_for_shards()
        try:
            status = _pipeline.run_if_needed(
                status_file(config, stage.name),
                stage.config,
                functools.partial(run_stage, runtime=runtime),
                after=after,
                folder=stage.run_dir,
                has_output=stage.has_output,
            )
        except SystemExit:
            print(f"stopped during {stage.name}: run the same command again to resume")
            raise
        except distributed.LostRankError:
            raise
        except UserError as error:
            if not stage.is_eval:
                raise
            failed[stage.name] = str(error)
            print(f"{stage.name} failed: {error}", flush=True)
            continue
        if run_stage == fetch_first_shards:
            wait_for_shards = fetch_other_shards(config, runtime)
        seconds[stage.name] = status.seconds
        after = after if stage.is_eval else status.completion_id  # no stage depends on an evaluation
    wait_for_shards()
    print(f"\n{next_steps(config, sum(seconds.values()))}")
    if failed:
        raise UserError(
            f"{' and '.join(failed)} failed ({next(iter(failed.values()))}); everything else is done: run the same "
            "command to retry"
        )


def fetch_first_shards(config: DataConfig, runtime: distributed.Runtime) -> None:
    """Run the data stage with the shards that the tokenizer reads."""
    few = min(config.num_shards, FIRST_SHARDS) if config.num_shards > 0 else FIRST_SHARDS
    data.run(dataclasses.replace(config, num_shards=few), runtime)


def fetch_other_shards(config: Config, runtime: distributed.Runtime) -> Callable[[], None]:
    """Fetch in the background what pretraining lacks of the shards; the returned collective call waits for it."""
    fetching = None
    if runtime.is_main and not pretrained(config):
        arguments = (base_dir() / "climbmix", config.data.num_shards, config.data.download)
        options = {"base_url": config.data.base_url}
        fetching = ThreadPool(1).apply_async(download.climbmix, arguments, options)

    def wait() -> None:
        with distributed.raise_on_any_failure():
            if fetching and not fetching.ready():
                print("waiting for the rest of the shards", flush=True)
            if fetching:
                fetching.get()

    return wait


def resolve(config: Config, runtime: distributed.Runtime) -> Config:
    """Return the settings with the shared ones filled in for each stage."""
    shared = {"device": config.device, "dtype": config.dtype}
    sft_name = f"{config.name}_sft"
    tokenizer_dir = str(base_dir() / f"{config.name}_tokenizer")
    fp8 = config.fp8
    if fp8 is None:
        fp8 = config.pretrain.train.linear == "fp8" or model.linear.fp8_support(runtime.device) == "native"

    def with_source(settings: Any, **changes: Any) -> Any:
        source = config.source or settings.data.source
        return dataclasses.replace(settings, data=dataclasses.replace(settings.data, source=source), **changes)

    return dataclasses.replace(
        config,
        data=with_source(config.data),
        tokenizer=with_source(config.tokenizer, out=tokenizer_dir),
        pretrain=with_source(
            config.pretrain,
            **shared,
            name=config.name,
            tokenizer=tokenizer_dir,
            train=dataclasses.replace(config.pretrain.train, linear="fp8" if fp8 else "dense"),
        ),
        eval_base=dataclasses.replace(config.eval_base, **shared, run=config.name),
        sft=dataclasses.replace(config.sft, **shared, run=config.name, name=sft_name),
        eval_chat=dataclasses.replace(config.eval_chat, **shared, run=sft_name),
        report=dataclasses.replace(config.report, **shared, run=final_run(config)),
    )


def final_run(config: Config) -> str:
    return f"{config.name}_sft" if "sft" in config.stages else config.name


def status_file(config: Config, name: str) -> Path:
    return base_dir() / "speedrun" / config.name / f"{name}.json"


def pretrained(config: Config) -> bool:
    """Return whether data and tokenizer may be deleted: the finished run has its own copy of the tokenizer."""
    return bool(_pipeline.read_status(status_file(config, "pretrain"), {}).completion_id)


def make_stages(config: Config) -> list[Stage]:
    base_run, sft_run = train.run_folder(config.name), train.run_folder(f"{config.name}_sft")

    def has_data() -> bool:
        try:
            return bool(sources.shards_of(config.pretrain.data, "train"))
        except UserError:
            return pretrained(config)

    def has_tokenizer() -> bool:
        return (Path(str(config.tokenizer.out)) / bpe.TOKENS_FILE).exists() or pretrained(config)

    source = config.data.data.source
    text = f"{source}, {config.data.num_shards} shards" if source == "climbmix" else source
    fallback = "dense" if config.fp8 is False else "dense, as this device has no native fp8"
    matmuls = "fp8" if config.pretrain.train.linear == "fp8" else fallback
    length = "one epoch" if config.sft.num_iterations is None else f"{config.sft.num_iterations:,} steps"
    stages = [
        Stage("data", config.data, text, None, has_data),
        Stage("tokenizer", config.tokenizer, f"{config.tokenizer.vocab_size:,} tokens", None, has_tokenizer),
        Stage(
            "pretrain",
            config.pretrain,
            f"depth {config.pretrain.depth or 'by fit'}, {matmuls}",
            base_run,
            lambda: has_steps(base_run),
        ),
        Stage("eval_base", config.eval_base, ", ".join(config.eval_base.tasks)),
        Stage("sft", config.sft, f"{length} of {', '.join(config.sft.tasks)}", sft_run, lambda: has_steps(sft_run)),
        Stage("eval_chat", config.eval_chat, ", ".join(config.eval_chat.tasks)),
        Stage("report", config.report, "report.md"),
    ]
    return [stage for stage in stages if stage.name in config.stages]


def has_steps(run_dir: Path) -> bool:
    return bool(checkpoint.steps(run_dir / "checkpoints"))


# Messages


def overview(config: Config, stages: list[Stage], runtime: distributed.Runtime) -> str:
    """Return the stages with their status, and the cost of pretraining."""
    labels = {"new": "run", "in_progress": "resume", "done": "done", "changed": "rerun"}
    rows, after, pending = [], "", False
    for stage in stages:
        path = status_file(config, stage.name)
        status = _pipeline.sync_status(path, stage.config, after=after, has_output=stage.has_output)
        label = "run" if stage.name == "report" else labels[status.state]
        # After a pending stage, completion_id is not known yet, so the comparison means nothing.
        if pending and status.state in ("done", "changed") and stage.name != "report":
            label = "rerun" if status.completion_id else "resume"
        if not stage.is_eval and stage.name != "report":
            pending, after = pending or status.state != "done", status.completion_id
        rows.append(f"  {stage.name:<11}{label:<9}{stage.description}")
    with distributed.raise_on_any_failure():
        cost = estimate(config, runtime) if runtime.is_main else ""
    title = f"speedrun {config.name} on {runtime.world_size} x {runtime.device.type}:"
    return "\n".join([title, *rows, *([cost] if cost else [])])


def estimate(config: Config, runtime: distributed.Runtime) -> str:
    """Return the size, time and cost of pretraining, as estimated by the planner."""
    if "pretrain" not in config.stages:
        return ""
    vocab_size = config.pretrain.model.vocab_size or config.tokenizer.vocab_size
    with_vocab = dataclasses.replace(config.pretrain.model, vocab_size=vocab_size)
    settings = pretrain.fitted(dataclasses.replace(config.pretrain, model=with_vocab), None, runtime)
    shape, plan = pretrain.resolve(settings, None)
    size = (
        f"pretraining: {format_count(model.count(shape)['total'])} parameters, {plan.num_steps:,} steps, "
        f"{format_count(plan.total_tokens)} tokens, {plan.total_flops:.3g} FLOPs"
    )
    name = _fit.device_name(runtime.device)
    gpu = hardware.gpu_spec(name)
    if gpu is None:
        return f"{size}; no estimate of time and cost: {name} is not in hardware.GPU_SPECS"
    setup = train.planner_setup(settings, runtime)
    rows = None if settings.device_batch_size == "auto" else settings.device_batch_size
    cost = train.planner.estimate(shape, plan, gpu, setup, rows=rows)
    if cost is None:
        return f"{size}; it does not fit by the planner's estimate: --experiment=plan shows what does"
    return (
        f"{size}; about {format_duration(3600 * cost.hours)} and ${cost.dollars:,.0f} by the planner's estimate, at "
        f"{train.planner.MFU:.0%} MFU and ${gpu.dollars_per_hour:.2f} per GPU hour, without the other stages"
    )


def next_steps(config: Config, seconds: float) -> str:
    run = final_run(config)
    commands = [f"  python launch.py --experiment=chat --set run={run} --set complete=true --set prompt=..."]
    if "sft" in config.stages:
        commands = [
            f"  python launch.py --experiment=chat --set run={run}     chat in the terminal",
            f"  python launch.py --experiment=web --set run={run}      chat in a browser",
            f"  torchrun launch.py --experiment=rl --set run={run}     RL on GSM8K",
        ]
    return "\n".join([f"speedrun {config.name} took {format_duration(seconds)}. Next:", *commands])
