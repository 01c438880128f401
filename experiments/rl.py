r"""Reinforcement learning: a fine-tuned model samples answers, and correct ones become more likely.

    torchrun --nproc_per_node=8 launch.py --experiment=rl --set run=d20_sft                    # on GSM8K
    torchrun --nproc_per_node=8 launch.py --experiment=rl --set run=d20_sft --resume
    python launch.py --experiment=rl --set run=quickstart_sft --set task=arithmetic --set num_iterations=24 \
        --set optim.matrix_lr=0 --set optim.embedding_lr=0 --set optim.unembedding_lr=0.003 --set optim.lr_fraction=1 \
        --set optim.scalar_lr=0 --set optim.moments=true          # suits a small model, see below

Each step samples 16 answers to each of 16 prompts, tool calls included, and reinforces those with a reward above the
mean of their prompt (nanochat/train/rl.py). pass@k on the test split is measured every 60 steps. Tasks are named as in
--experiment=tasks and must be able to score an answer: gsm8k, arithmetic, spellingbee. For another reward, change
`reward` in `run`. A learning rate of 0 freezes its group: a small model trained for a minute does best where only the
unembedding learns (experiments/RESULTS.md). Writes runs/<base run>_rl: checkpoints, metrics.jsonl, reward.svg,
length.svg, pass.svg. One epoch of GSM8K is 467 steps, and leaves the checkpoints of 60, 120, … 420 and 467.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nanochat import distributed, infer, metrics, model, optim, tasks, train
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import PositiveInt, Settings, UserError
from nanochat.data import chat_format
from nanochat.optim import FinetunePlan, OptimConfig
from nanochat.train import FinetuneConfig, LoraConfig, RolloutConfig, TrainConfig

OPTIM = OptimConfig(
    embedding_lr=0.2,
    unembedding_lr=0.004,
    lr_fraction=0.05,
    weight_decay=0.0,
    warmup_steps=0,
    warmdown_ratio=1.0,
    final_lr_fraction=0.0,
)
PAD_TOKENS = 64  # the shortest sequence length that is compiled for


@dataclasses.dataclass(frozen=True)
class PassAtKConfig(Settings):
    """Evaluation during the run.

    Attributes:
        every_steps: steps between evaluations of pass@k; none: only after the last step.
        problems: problems to evaluate on, the first ones of the test split.
        sample_every_steps: steps between printed answers; none: only after the last step.
    """

    every_steps: PositiveInt | None = 60
    problems: PositiveInt = 400
    sample_every_steps: PositiveInt | None = 20


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """A run of reinforcement learning.

    Attributes:
        task: task to train on.
        eval_task: task to measure pass@k on; none: the test split of `task`.
        source: folder or file with the rows of the tasks; none: the Hugging Face hub.
        num_iterations: optimizer steps; none: one epoch of the task.
        device_batch_size: answers of a micro-batch on each device.
    """

    task: str = "gsm8k"
    eval_task: str | None = None
    source: str | None = None
    num_iterations: PositiveInt | None = None
    device_batch_size: PositiveInt = 8
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OPTIM
    lora: LoraConfig = LoraConfig(lr=1e-4)
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=60, keep_last=8)  # all of an epoch of GSM8K
    train: TrainConfig = TrainConfig(attention="sdpa")  # flex, and so perhaps auto, needs sequences of one length
    eval: PassAtKConfig = PassAtKConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.attention in ("auto", "flex"):
            raise UserError(
                f"train.attention={self.train.attention}: answers have many lengths, which flex does not support; "
                "set train.attention=sdpa, or another kernel by its name"
            )


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Train from the checkpoint of another run, or resume; then print the reward."""
    config, base = train.load_base(config, "rl", runtime, run=config.run, step=config.step, stages=("sft",))
    task = tasks.from_text(config.task, "train", source=config.source)
    eval_task = tasks.from_text(config.eval_task or config.task.partition(":")[0], "test", source=config.source)
    reward = train.rl.correct_reward(task)
    config = resolve(config, task, runtime)
    lora = train.init_from.load_lora(config, base, runtime)
    facts = {
        "starts from": " ".join(str(x) for x in (base.origin or {}).values()),
        "parameters": f"{model.count(base.shape)['total']:,}",
        **train.init_from.describe_lora(lora, runtime),
        "task": f"{task.name}, {task.size:,} rows",
        "step": f"{config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} answers",
    }
    print(train.describe(config, facts), flush=True)
    stage = rl_stage(config, base, runtime, task, eval_task, reward, lora)
    train.run_stage(config, stage, base.shape, base.tokenizer, runtime)
    if runtime.is_main:
        steps, rewards = metrics.logger.curve(metrics.logger.read(train.run_folder(str(config.name))), "rl/reward")
        if len(steps) > 1:
            smooth = metrics.logger.smoothed(rewards)
            print(metrics.plots.ascii_chart(steps, smooth, title="mean reward, smoothed, by step"))
        print(f"next: python launch.py --experiment=eval_chat --set run={config.name}")


def resolve(config: Config, task: tasks.Task, runtime: distributed.Runtime) -> Config:
    """Return the settings with the number of steps filled in."""
    prompts = config.rollout.prompts_per_step
    if prompts % runtime.world_size:
        raise UserError(f"rollout.prompts_per_step={prompts}: must be a multiple of the {runtime.world_size} ranks")
    steps = config.num_iterations or task.size // prompts
    if steps < 1:
        raise UserError(f"{task.name} has {task.size} rows: too few for a step of {prompts}; set num_iterations")
    return dataclasses.replace(config, num_iterations=steps)


def rl_stage(
    config: Config,
    base: train.InitCheckpoint,
    runtime: distributed.Runtime,
    task: tasks.Task,
    eval_task: tasks.Task,
    reward: train.Reward,
    lora: train.build.Lora | None = None,
) -> train.Stage:
    """Return the stage: batches of row numbers, a step that samples answers to them, pass@k and printed answers."""
    shape, tok, rollout, num_steps = base.shape, base.tokenizer, config.rollout, config.num_iterations
    assert num_steps
    plan = FinetunePlan(shape.n_embd, weight_decay=config.optim.weight_decay, lora_lr=config.lora.lr if lora else None)
    full_params = functools.partial(train.build.full_params, lora=lora)
    engines: list[infer.Engine] = []  # one, made and compiled at its first use
    latest: deque[list[train.Rollout]] = deque(maxlen=1)  # answers to a prompt of the last step, with unequal rewards

    def engine(params: model.Params) -> infer.Engine:
        if engines:
            infer.load_params_(engines[0], params)
        else:
            context = min(model.CONTEXT_LIMIT * shape.sequence_len, shape.sequence_len + rollout.max_tokens)
            options = {"dtype": runtime.compute_dtype, "compile": config.compile, "copy_params": True}
            engines.append(infer.start(params, shape, tok, slots=rollout.slots, context=context, **options))
        return engines[0]

    def rollout_fn(params: model.Params, numbers: Sequence[int]) -> list[list[train.Rollout]]:
        answers = train.rl.rollouts(engine(params), tok, task, reward, numbers, config=rollout, seed=config.seed)
        latest.append(max(answers, key=lambda group: len({answer.reward for answer in group})))
        return answers

    def schedule(step: int, _: Any) -> optim.Hparams:
        return optim.hparams(config.optim, plan, step, done=step / num_steps)

    def make_step(train_step: Callable[..., Any], rows: int) -> train.StepFn:
        pad_tokens = PAD_TOKENS if config.compile else None
        options = {"train_step": train_step, "batch_rows": rows, "pad_tokens": pad_tokens, "full_params": full_params}
        return train.scheduled(functools.partial(train.rl.rl_step, rollout_fn=rollout_fn, **options), schedule=schedule)

    def pass_at_k(ctx: train.RunContext, state: train.TrainState) -> train.Result:
        params = full_params(state.params)
        with distributed.raise_on_any_failure():
            values = train.rl.pass_at_k(engine(params), tok, eval_task, config.eval.problems, rollout)
        text = ", ".join(f"@{name.rpartition('_')[2]} {value:.1%}" for name, value in values.items())
        return train.Result(values, [f"step {int(state.step)}: pass {text}"])

    def print_answers(ctx: train.RunContext, state: train.TrainState) -> train.Result:
        """Return a prompt of the last step with its two best answers and its worst, a line each."""
        if not latest:
            return train.Result()
        answers = {repr(chat_format.shown(tok, answer.tokens)): answer.reward for answer in latest[0]}
        ranked = sorted(answers.items(), key=lambda item: -item[1])
        prompt = tok.decode(latest[0][0].prompt).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        shown = [f"  {reward:g}  {text}" for text, reward in ranked[:2] + ranked[2:][-1:]]
        return train.Result(lines=[f"step {int(state.step)}: {prompt!r}", *shown])

    return train.Stage(
        name="rl",
        origin=base.origin,
        num_steps=num_steps,
        step_tokens=rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_tokens,  # at most
        flops_per_token=model.flops_per_token(shape),
        make_step=make_step,
        batches=lambda state, rows: train.rl.prompt_batches(
            task, tok, shape.sequence_len, rollout.prompts_per_step, state
        ),
        initial_state=functools.partial(train.init_state_from, base, runtime, moments=config.optim.moments),
        lora=lora,
        evaluations=[
            train.Evaluation("rl/pass_at_1", config.eval.every_steps, pass_at_k),
            train.Evaluation(None, config.eval.sample_every_steps, print_answers),
        ],
    )
