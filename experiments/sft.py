"""Fine-tune a base model on conversations; only the assistant's tokens are in the loss.

    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20
    python launch.py --experiment=sft --set run=quickstart --set tasks=2*identity,arithmetic --set val_tasks=identity
    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20 --resume        # continue a stopped run
    python launch.py --experiment=sft --set run=d20 --set lora.rank=16                   # adapters of a few megabytes

Context length, batch sizes and learning rates are inherited from the base run unless they are set, and so are the
optimizer's moments. One epoch of the tasks; the learning rate is constant, then falls to 0 over the last half. Tasks
are named as in --experiment=tasks; `3*` before a name repeats its rows three times. Writes runs/<base run>_sft:
checkpoints, metrics.jsonl, curves. The default mixture takes about half an hour at depth 20 on 8 H100. With lora.rank
only adapters are trained and saved: the run needs its base run to be loaded, and is used like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

from nanochat import distributed, eval, metrics, model, optim, tasks, train
from nanochat.config import PositiveInt, UserError
from nanochat.data import Tokenizer, chat_format
from nanochat.eval import CHAT_CORE, ChatEvalConfig
from nanochat.optim import FinetunePlan, OptimConfig, scaling
from nanochat.train import EvalConfig, FinetuneConfig, StageConfig

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
    """Evaluation on chat tasks during the run.

    Attributes:
        tasks: tasks to evaluate on; none: no such evaluation.
        every_steps: steps between evaluations; none: only after the last step.
    """

    tasks: tuple[str, ...] = tuple(f"{name}:test" for name in CHAT_CORE)
    every_steps: PositiveInt | None = 200
    max_generative: PositiveInt | None = 24


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """A fine-tuning run.

    Attributes:
        tasks: tasks to train on, each with how often its rows are repeated.
        val_tasks: tasks for validation bits per byte; a task whose data cannot be loaded, for example without a
            network, is skipped and named at the end, here and in chat.tasks.
        source: folder with local files of the tasks; none: the Hugging Face hub.
        assistant_only: compute the loss on the assistant's tokens only; false: on all but messages with weight 0.
        long_conversations: truncate them at the context; whole_turns: after the last answer that fits; or drop them.
        buffer_conversations: conversations that the packing chooses from.
        device_batch_size: sequences of a micro-batch on each device; auto: the most that fit; none: the base run's.
        total_batch_size: tokens of an optimizer step; none: the base run's.
        num_iterations: optimizer steps; none: one epoch.
    """

    tasks: tuple[str, ...] = ("smoltalk", "3*mmlu:auxiliary_train", "4*gsm8k")
    val_tasks: tuple[str, ...] = ("smoltalk:test", "mmlu:test:stop=5200", "gsm8k:test:stop=420")
    source: str | None = None
    assistant_only: bool = True
    long_conversations: chat_format.TooLong = "truncate"
    buffer_conversations: PositiveInt = 100
    device_batch_size: PositiveInt | Literal["auto"] | None = None
    total_batch_size: PositiveInt | None = None
    num_iterations: PositiveInt | None = None
    optim: OptimConfig = OPTIM
    eval: EvalConfig = EvalConfig(
        every_steps=200, tokens=40 * 2**19, sample_every_steps=None, sample_tokens=128, prompts=PROMPTS
    )
    chat: ChatConfig = ChatConfig()


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    train_stage(config, runtime, "sft", ("base", "mid"))


def train_stage(config: Config, runtime: distributed.Runtime, name: str, stages: tuple[str, ...]) -> None:
    """Run the stage called `name` from a checkpoint of one of `stages`."""
    config, base = train.load_base(config, name, runtime, run=config.run, step=config.step, stages=stages)
    config, auto = resolve(config, base, runtime)
    lora = train.init_from.load_lora(config, base, runtime)
    train_task = mix(config.tasks, config.source)
    val_tasks, no_val = load_tasks(config.val_tasks, config.source)
    chat_tasks, no_chat = load_tasks(config.chat.tasks, config.source, "test")
    val_task = tasks.mixture(val_tasks, name=f"val_tasks={','.join(config.val_tasks)}") if val_tasks else None
    skipped, missing = "", no_val | no_chat
    if missing:
        skipped = f"skipped: {', '.join(missing)}: {next(iter(missing.values()))}"
        hold_out = "--set tasks=customjson:FILE:start=50 --set val_tasks=customjson:FILE:stop=50"
        skipped += f"; no validation: {hold_out} holds out 50 conversations of a file" * (not val_tasks)
        print(skipped)
    facts = {
        "starts from": " ".join(str(x) for x in (base.origin or {}).values()),
        "parameters": f"{model.count(base.shape)['total']:,}",
        **train.init_from.describe_lora(lora, runtime),
        "conversations": f"{train_task.size:,}",
        "moments": "the base run's" if config.optim.moments and base.moments and not lora else "zero",
    }
    print(train.describe(config, facts), flush=True)
    stage = sft_stage(config, base, runtime, name, train_task, val_task, chat_tasks, lora)
    train.run_stage(config, stage, base.shape, base.tokenizer, runtime, try_rows=auto)
    if missing and runtime.is_main:
        print(skipped)
        folder = train.run_folder(str(config.name))
        failed = {eval.TITLES.get(text.partition(":")[0], text): why for text, why in missing.items()}
        metrics.logger.append_evaluation(folder, metrics.run_folder.read_run(folder).last_step, name, {}, failed)


def resolve(config: Config, base: train.InitCheckpoint, runtime: distributed.Runtime) -> tuple[Config, bool]:
    """Return the settings with what they inherit from the base run, and whether the micro-batch is an estimate."""
    length = base.shape.sequence_len
    total = base.setting(config.total_batch_size, "total_batch_size", scaling.REFERENCE_BATCH_TOKENS)
    rates = optim.learning_rates(config.optim, base.settings)
    config = dataclasses.replace(config, total_batch_size=total, optim=dataclasses.replace(config.optim, **rates))
    if total % (length * runtime.world_size):
        raise UserError(
            f"total_batch_size={total}: not a multiple of the context {length} x {runtime.world_size} ranks"
        )
    rows, micro_rows = total // (length * runtime.world_size), config.device_batch_size
    auto = micro_rows == "auto"
    if micro_rows == "auto":
        micro_rows = train.estimate_batch_size(config, base.shape, rows, runtime)
    elif micro_rows is None:
        micro_rows = math.gcd(rows, base.setting(None, "device_batch_size", 32))
    scaling.accumulation_steps(total, micro_rows, length, runtime.world_size)  # the error says what divides
    return dataclasses.replace(config, device_batch_size=micro_rows), auto


def mix(texts: tuple[str, ...], source: str | None) -> tasks.Task:
    """Return a mixture of tasks to train on, as `load_tasks` reads them; all of them have to be there."""
    chosen, missing = load_tasks(texts, source)
    if missing:
        raise UserError(
            f"tasks={','.join(missing)}: {next(iter(missing.values()))}; or train on other conversations: --set "
            "tasks=customjson:/path/file.jsonl; identity, arithmetic and the spelling tasks need no network"
        )
    if not chosen:
        raise UserError("tasks: name at least one")
    return tasks.mixture(chosen, name=",".join(texts))


def load_tasks(
    texts: tuple[str, ...], source: str | None, split: str = "train"
) -> tuple[list[tasks.Task], dict[str, str]]:
    """Return tasks, each as often as the number before it says (`3*gsm8k`), and name -> why of those without data here.

    Collective: where a task is missing on one rank, it is on all.
    """
    repeats: list[tuple[str, int]] = []
    for text in texts:
        times, star, name = text.partition("*")
        if ":" in times or not star:  # a star within a path
            times, name = "", text
        elif not times.isdigit():
            raise UserError(f"tasks: {text!r}: expected a number before the *, as in 3*gsm8k")
        tasks.options_of(tasks.split_text(name)[0])  # a misspelled name is an error before anything is downloaded
        repeats.append((name, int(times or 1)))
    loaded: list[tasks.Task] = []
    missing: dict[str, str] = {}
    for name, times in repeats:
        try:
            with distributed.raise_on_any_failure():
                loaded += [tasks.from_text(name, split, source=source)] * times
        except tasks.MissingDataError as error:
            missing[name] = str(error)
    return loaded, missing


def sft_stage(
    config: Config,
    base: train.InitCheckpoint,
    runtime: distributed.Runtime,
    name: str,
    train_task: tasks.Task,
    val_task: tasks.Task | None,
    chat_tasks: list[tasks.Task],
    lora: train.build.Lora | None = None,
) -> train.Stage:
    """Return the stage: packed conversations, bits per byte, chat tasks and sample answers."""
    shape, tok, length = base.shape, base.tokenizer, base.shape.sequence_len
    assert config.total_batch_size
    batch_scale = scaling.batch_scale(config.total_batch_size)
    plan = FinetunePlan(
        shape.n_embd,
        batch_scale,
        config.optim.weight_decay,
        momentum_warmup_steps=300,
        lora_lr=config.lora.lr if lora else None,
    )

    def schedule(step: int, stats: Mapping[str, float]) -> optim.Hparams:
        done = step / config.num_iterations if config.num_iterations else stats.get("share", 0.0)
        return optim.hparams(config.optim, plan, step, done)

    stream = functools.partial(
        train.sft.batches, tok=tok, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device
    )
    packing = train.Packing(
        rows_per_step=config.total_batch_size // length,
        micro_rows=0,
        sequence_len=length,
        assistant_only=config.assistant_only,
        long_conversations=config.long_conversations,
        epochs=None if config.num_iterations else 1,
        buffer_conversations=config.buffer_conversations,
    )

    def validation_batches(rows: int) -> train.sft.Batches:
        assert val_task
        rows_per_step = rows * runtime.world_size
        return stream(val_task, packing=packing._replace(rows_per_step=rows_per_step, micro_rows=rows, epochs=1))

    def chat_score(ctx: train.RunContext, state: train.TrainState) -> train.Result:
        """Return the accuracy of each task, and ChatCORE if its five tasks are among them."""
        params = train.build.full_params(state.params, lora)
        subject = eval.chat_eval.ModelUnderTest(params, shape, tok, runtime.compute_dtype)
        with distributed.raise_on_any_failure():
            values = eval.chat_eval.as_metrics(eval.chat_eval.evaluate(subject, chat_tasks, config.chat))
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        return train.Result(values, [f"step {int(state.step)}: {text}"])

    evaluations: list[train.Evaluation] = []
    if val_task:
        eval.bpb.check(validation_batches(1), tok)
        validation = functools.partial(train.stage.evaluate_bpb, batches=validation_batches)
        evaluations.append(train.Evaluation("val/bpb", config.eval.every_steps, validation))
    if chat_tasks:
        first = chat_tasks[0].name
        key = f"chat/{eval.chat_eval.TITLES.get(first, first)}"
        evaluations.append(train.Evaluation(key, config.chat.every_steps, chat_score))
    evaluations.append(print_answers(config, tok))
    return train.Stage(
        name=name,
        origin=base.origin,
        num_steps=config.num_iterations,
        step_tokens=config.total_batch_size,
        flops_per_token=model.flops_per_token(shape),
        make_step=functools.partial(train.scheduled, schedule=schedule),
        batches=lambda state, rows: stream(train_task, packing=packing._replace(micro_rows=rows), state=state),
        initial_state=functools.partial(train.init_state_from, base, runtime, moments=config.optim.moments),
        evaluations=evaluations,
        lora=lora,
    )


def print_answers(config: StageConfig, tok: Tokenizer) -> train.Evaluation:
    """Return the evaluation that prints answers to `eval.prompts`."""
    samples = functools.partial(
        train.stage.print_samples,
        encode=lambda prompt: chat_format.prompt(tok, [{"role": "user", "content": prompt}]),
        decode=functools.partial(chat_format.shown, tok),
    )
    return train.Evaluation(None, config.eval.sample_every_steps, samples)
