"""Fine-tune a base model on conversations: what the assistant says is learned, the rest is read.

    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20
    python launch.py --experiment=sft --set run=quickstart --set tasks=2*identity,arithmetic --set val_tasks=identity
    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20 --resume        # go on after a stop

Context, batch sizes and learning rates are the parent's unless they are set, the optimizer's moments go on from its
checkpoint. One epoch of the tasks; the rate is flat, then falls to 0 over the last half. A task is named as in
--experiment=tasks, with `3*` before it to have its rows three times. Writes runs/<run>_sft: checkpoints, metrics.jsonl,
curves. The default mixture takes about half an hour at depth 20 on 8 H100.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from nanochat import config as configs
from nanochat import distributed, eval, infer, model, optim, tasks, train
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.eval import CHAT_CORE, ChatEvalConfig
from nanochat.optim import FinetunePlan, OptimConfig, scaling
from nanochat.tasks import Task, mixture
from nanochat.train import EvalConfig, StageConfig

if TYPE_CHECKING:
    from nanochat.distributed import Runtime
    from nanochat.optim import Hparams
    from nanochat.train import InitCheckpoint, Job, TrainState

OPTIM = OptimConfig(
    embedding_lr=None,
    unembedding_lr=None,
    matrix_lr=None,
    scalar_lr=None,
    lr_fraction=0.8,
    weight_decay=0.0,
    warmup_steps=0,
    warmdown_ratio=0.5,
    final_lr_fraction=0.0,
    moments=True,
)
PROMPTS = ("Who are you?", "What is 12*3?", "How many r are in strawberry?", "Why is the sky blue?")


@dataclasses.dataclass(frozen=True)
class ChatConfig(ChatEvalConfig):
    """Evaluation by tasks along the way, see `chat_eval.ChatEvalConfig`.

    Attributes:
        tasks: as in `tasks`; none of them: no such evaluation. every_steps: none: at the end only.
    """

    tasks: tuple[str, ...] = tuple(f"{name}:test" for name in CHAT_CORE)
    every_steps: int | None = 200
    max_generative: int | None = 24


@dataclasses.dataclass(frozen=True)
class Config(StageConfig):
    """A fine-tuning run; what is none is the parent's.

    Attributes:
        run, step: the parent, by name or folder; none: the base or mid model that was saved last, its newest step.
        tasks, val_tasks: what is learned, and what validation bits per byte are of. source: a folder with local files
            of tasks; none: the hub.
        assistant_only: learn what the assistant says; false: everything. buffer_conversations: for the packing.
        total_batch_size: tokens of a step. num_iterations: steps; none: one epoch.
    """

    run: str | None = None
    step: int | None = None
    tasks: tuple[str, ...] = ("smoltalk", "3*mmlu:auxiliary_train", "4*gsm8k")
    val_tasks: tuple[str, ...] = ("smoltalk:test", "mmlu:test", "gsm8k:test")
    source: str | None = None
    assistant_only: bool = True
    buffer_conversations: int = 100
    device_batch_size: int | Literal["auto"] | None = None
    total_batch_size: int | None = None
    num_iterations: int | None = None
    optim: OptimConfig = OPTIM
    eval: EvalConfig = EvalConfig(
        every_steps=200, tokens=40 * 2**19, sample_every_steps=None, sample_tokens=128, prompts=PROMPTS
    )
    chat: ChatConfig = ChatConfig()


def config() -> Config:
    """Return the reference's settings."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Fine-tune the parent."""
    train_stage(config, runtime, "sft", ("base", "mid"))


def train_stage(config: Config, runtime: Runtime, name: str, parents: tuple[str, ...]) -> None:
    """Run the stage called `name` from a model of one of the stages `parents`."""
    config, origin, record = train.child(config, name, runtime, run=config.run, step=config.step, parents=parents)
    config, auto = resolve(config, origin, runtime)
    train_task, val_task = mix(config.tasks, config.source), mix(config.val_tasks, config.source)
    graded = [tasks.from_text(text, "test", source=config.source) for text in config.chat.tasks]
    print(describe(config, origin, record, train_task), flush=True)
    it = finetuning(config, origin, runtime, name, record, train_task, val_task, graded)
    train.run_stage(config, it, origin.shape, origin.tokenizer, runtime, try_rows=auto)


def resolve(config: Config, origin: InitCheckpoint, runtime: Runtime) -> tuple[Config, bool]:
    """Return the settings with what is none filled in from the parent, and whether the micro-batch is an estimate.

    Raises:
        UserError: the batch does not divide.
    """
    length = origin.shape.sequence_len
    total = origin.setting(config.total_batch_size, "total_batch_size", scaling.REFERENCE_BATCH_TOKENS)
    rates = optim.learning_rates(config.optim, origin.settings)
    config = dataclasses.replace(config, total_batch_size=total, optim=dataclasses.replace(config.optim, **rates))
    if total % (length * runtime.world_size):
        raise UserError(
            f"total_batch_size={total}: not a multiple of the context {length} x {runtime.world_size} ranks"
        )
    rows, asked = total // (length * runtime.world_size), config.device_batch_size
    if asked == "auto":
        found = train.estimate_batch_size(config, origin.shape, rows, runtime)
    elif asked is None:  # as many as the parent had, or what of it divides
        most = origin.setting(None, "device_batch_size", 32)
        found = math.gcd(rows, most) if rows % most else most
    else:
        found = asked
    scaling.accumulation_steps(total, found, length, runtime.world_size)  # says what would divide
    return dataclasses.replace(config, device_batch_size=found), asked == "auto"


def mix(texts: tuple[str, ...], source: str | None) -> Task:
    """Return the mixture that a setting names: tasks, each with how often it counts before it (`3*gsm8k`).

    Raises:
        UserError: nothing is named, or a task cannot be had.
    """
    chosen: list[Task] = []
    for text in texts:
        times, star, name = text.rpartition("*")
        if star and not times.isdigit():
            raise UserError(f"tasks: {text!r}: expected a number before the *, as in 3*gsm8k")
        chosen += [tasks.from_text(name, source=source)] * int(times or 1)
    if not chosen:
        raise UserError("tasks: name one at least")
    return mixture(chosen, name=",".join(texts))


def describe(config: Config, origin: InitCheckpoint, record: Mapping | None, task: Task) -> str:
    """Return the resolved configuration and what it begins with, as text."""
    facts = {
        "parent": " ".join(str(x) for x in (record or {}).values()),
        "parameters": f"{model.count(origin.shape)['total']:,}",
        "conversations": f"{task.size:,}",
        "moments": "the parent's" if config.optim.moments and origin.moments else "zero",
    }
    lines = [f"  {name:<16}{text}" for name, text in facts.items()]
    return "\n".join(["configuration", configs.describe(config), "plan", *lines])


def finetuning(
    config: Config, origin: InitCheckpoint, runtime: Runtime, name: str, record: Mapping | None, train_task: Task,
    val_task: Task, graded: list[Task],
) -> train.Stage:  # fmt: skip
    """Return what this stage is: packed conversations, rates that fall, bits per byte, tasks and samples on the way."""
    shape, length = origin.shape, origin.shape.sequence_len
    assert config.total_batch_size
    batch_scale = scaling.batch_scale(config.total_batch_size)
    plan = FinetunePlan(shape.n_embd, batch_scale, config.optim.weight_decay, momentum_warmup_steps=300)

    def hparams_at(step: int, stats: Mapping[str, float]) -> Hparams:
        done = step / config.num_iterations if config.num_iterations else stats.get("share", 0.0)
        return optim.hparams(config.optim, plan, step, done)

    stream = functools.partial(
        train.sft.batches, tok=origin.tokenizer, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device
    )
    packing = train.Packing(
        config.total_batch_size // length,
        0,
        length,
        config.assistant_only,
        None if config.num_iterations else 1,
        config.buffer_conversations,
    )

    def evaluations(rows: int) -> list[train.Evaluation]:
        # As many rows whatever the ranks: what is read must not depend on how many there are.
        val = packing._replace(rows_per_step=rows * runtime.world_size, micro_rows=rows, epochs=1)
        validation = functools.partial(
            train.stage.evaluate_bpb,
            batches=functools.partial(stream, val_task, how=val),
            steps=max(config.eval.tokens // (val.rows_per_step * length), 1),
        )
        found = [train.Evaluation("val/bpb", config.eval.every_steps, validation)]
        if graded:
            key = next(iter(eval.chat_eval.as_metrics({graded[0].name: eval.chat_eval.Score(0, 1, 0.0)})))
            found.append(train.Evaluation(key, config.chat.every_steps, functools.partial(grade, graded, config.chat)))
        return [*found, train.Evaluation(None, config.eval.sample_every_steps, samples)]

    return train.Stage(
        name=name,
        parent=record,
        num_steps=config.num_iterations,
        step_tokens=config.total_batch_size,
        flops_per_token=model.flops_per_token(shape),
        hparams_at=hparams_at,
        batches=lambda state, rows: stream(train_task, how=packing._replace(micro_rows=rows), state=state),
        initial=lambda layout: train.init_from.init_state_from(origin, runtime, layout, moments=config.optim.moments),
        evaluations=evaluations,
    )


def grade(graded: list[Task], how: ChatConfig, job: Job, state: TrainState) -> train.Result | None:
    """Return the accuracy of tasks, and ChatCORE where its five are among them."""
    subject = eval.chat_eval.ModelUnderTest(
        distributed.sharding.whole(state.params), job.shape, job.tok, job.runtime.compute_dtype
    )
    line = distributed.control_group()
    with distributed.raise_on_any_failure(line):
        scores = eval.chat_eval.evaluate(subject, graded, how, line)
    if job.stop.agreed():
        return None
    found = eval.chat_eval.as_metrics(scores)
    return train.Result(found, [f"step {int(state.step)}: " + ", ".join(f"{n} {x:.4f}" for n, x in found.items())])


def samples(job: Job, state: TrainState) -> train.Result:
    """Return what the model answers to each of `eval.prompts`, a line each, tool calls in brackets."""
    how, params = job.config.eval, distributed.sharding.whole(state.params)
    if not job.runtime.is_main:
        return train.Result({}, [])
    decoder = infer.start(
        params, job.shape, job.tok, slots=len(how.prompts), dtype=job.runtime.compute_dtype, compile=False
    )
    prompts = [chat_format.prompt(job.tok, [{"role": "user", "content": text}]) for text in how.prompts]
    settings = {"max_tokens": how.sample_tokens, "temperature": how.temperature, "top_k": how.top_k}
    answers: list[list[int]] = [[] for _ in prompts]
    for event in infer.run(decoder, [infer.Request(tuple(ids), seed=i, **settings) for i, ids in enumerate(prompts)]):
        answers[int(str(event.key))].append(event.token)
    lines = [f"  {text!r} → {chat_format.shown(job.tok, ids)!r}" for text, ids in zip(how.prompts, answers)]
    return train.Result({}, lines)
