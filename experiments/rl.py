r"""Reinforcement learning: a fine-tuned model answers, and right answers become more likely.

    torchrun --nproc_per_node=8 launch.py --experiment=rl --set run=d20_sft                    # on GSM8K
    torchrun --nproc_per_node=8 launch.py --experiment=rl --set run=d20_sft --resume           # go on after a stop
    python launch.py --experiment=rl --set run=quickstart_sft --set task=arithmetic --set num_iterations=24 \
        --set optim.matrix_lr=0 --set optim.embedding_lr=0 --set optim.unembedding_lr=0.003 --set optim.lr_fraction=1 \
        --set optim.scalar_lr=0 --set optim.moments=true          # what suits a small model, see below

A step samples 16 answers to each of 16 examples, tool calls and all, rewards those that are right, and learns from the
differences (nanochat/rl.py). The share of test problems that any of k answers solves (pass@k) is measured every 60
steps. A task is named as in --experiment=tasks; it has to tell right from wrong: gsm8k, arithmetic, spellingbee.
Another reward is another function in `run` below. A rate of 0 leaves its group as it is: a small model that practises
for a minute does best where the unembedding learns alone (experiments/RESULTS.md). Writes runs/<name of the parent>_rl:
checkpoints, metrics.jsonl, reward.svg, length.svg, pass.svg. One epoch of GSM8K is 467 steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import config as configs
from nanochat import distributed, infer, metrics, model, optim, tasks, train
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.metrics import plots
from nanochat.optim import FinetunePlan, OptimConfig
from nanochat.tasks import Task
from nanochat.train import RolloutConfig, StageConfig, TrainConfig
from nanochat.train import config as stage

if TYPE_CHECKING:
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime
    from nanochat.infer import Engine
    from nanochat.model import ModelConfig, Params
    from nanochat.train import InitCheckpoint, Job, Reward, Rollout, TrainState

OPTIM = OptimConfig(
    embedding_lr=0.2,
    unembedding_lr=0.004,
    lr_fraction=0.05,
    weight_decay=0.0,
    warmup_steps=0,
    warmdown_ratio=1.0,
    final_lr_fraction=0.0,
)
PAD_TOKENS = 64  # the narrowest row that is compiled for


@dataclasses.dataclass(frozen=True)
class PassConfig:
    """What is looked at along the way.

    Attributes:
        every_steps: between measurements of pass@k; none: at the end only. problems: of the test split, the first ones.
        sample_every_steps: between two looks at an example's answers; none: at the end only.
    """

    every_steps: int | None = 60
    problems: int = 400
    sample_every_steps: int | None = 20

    def __post_init__(self) -> None:
        for name in ("every_steps", "problems", "sample_every_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config(StageConfig):
    """A run of reinforcement learning.

    Attributes:
        run, step: the parent, by name or folder; none: the fine-tuned model that was saved last, its newest step.
        task: what is practised. exam: what pass@k is of; none: the same task's test split.
        source: folder or file of their rows; none: the hub.
        num_iterations: steps; none: one epoch of the task.
        device_batch_size: answers that are learned from at once.
    """

    run: str | None = None
    step: int | None = None
    task: str = "gsm8k"
    exam: str | None = None
    source: str | None = None
    num_iterations: int | None = None
    device_batch_size: int = 8
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OPTIM
    # flex needs one length for all rows, and so might what auto takes
    train: TrainConfig = TrainConfig(attention="sdpa")
    eval: PassConfig = PassConfig()  # pyright: ignore[reportIncompatibleVariableOverride]


def config() -> Config:
    """Return the reference's settings."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Practise the task, from the parent or from where the run has stopped; then draw what has become of it."""
    config, origin, record = train.stage.child(
        config, "rl", runtime, run=config.run, step=config.step, parents=("sft",)
    )
    practice = tasks.from_text(config.task, "train", source=config.source)
    exam = tasks.from_text(config.exam or config.task.partition(":")[0], "test", source=config.source)
    reward = train.rl.correct_reward(practice)
    config = resolve(config, practice, runtime)
    print(describe(config, origin, record, practice), flush=True)
    it = practising(config, origin, runtime, record, practice, exam, reward)
    train.stage.run_stage(config, it, origin.shape, origin.tokenizer, runtime)
    if runtime.is_main:
        draw(stage.run_folder(str(config.name)))


def resolve(config: Config, practice: Task, runtime: Runtime) -> Config:
    """Return the settings with the number of steps filled in.

    Raises:
        UserError: the examples do not divide, there is no step to take, or a kernel does not fit.
    """
    examples = config.rollout.examples
    if examples % runtime.world_size:
        raise UserError(f"rollout.examples={examples}: must divide by the {runtime.world_size} ranks")
    if config.train.attention in ("auto", "flex"):
        raise UserError(
            f"train.attention={config.train.attention}: rows of reinforcement learning have many lengths, which flex "
            "does not take; set sdpa, or another by its name"
        )
    if config.device_batch_size < 1:
        raise UserError(f"device_batch_size={config.device_batch_size}: must be at least 1")
    steps = config.num_iterations or practice.size // examples
    if steps < 1:
        raise UserError(f"{practice.name} has {practice.size} rows: no step of {examples}; set num_iterations")
    return dataclasses.replace(config, num_iterations=steps)


def describe(config: Config, origin: InitCheckpoint, record: Mapping | None, practice: Task) -> str:
    """Return the resolved configuration and what it begins with, as text."""
    facts = {
        "parent": " ".join(str(x) for x in (record or {}).values()),
        "parameters": f"{model.count(origin.shape)['total']:,}",
        "practice": f"{practice.name}, {practice.size:,} examples",
        "step": f"{config.rollout.examples} examples x {config.rollout.samples} answers",
    }
    lines = [f"  {name:<16}{text}" for name, text in facts.items()]
    return "\n".join(["configuration", configs.describe(config), "plan", *lines])


def practising(
    config: Config,
    origin: InitCheckpoint,
    runtime: Runtime,
    record: Mapping | None,
    practice: Task,
    exam: Task,
    reward: Reward,
) -> train.Stage:
    """Return what this stage is: examples by their numbers, a step that plays them, pass@k and looks at answers."""
    shape, how, num_steps = origin.shape, config.rollout, config.num_iterations
    assert num_steps
    plan = FinetunePlan(shape.n_embd, weight_decay=config.optim.weight_decay)
    decoder = player(shape, origin.tokenizer, config, runtime)
    latest: deque[list[Rollout]] = deque(maxlen=1)  # answers to an example of the last step, of different rewards

    def play(params: Params, numbers: Sequence[int]) -> list[list[Rollout]]:
        engine = decoder(params)
        return train.rl.rollouts(engine, origin.tokenizer, practice, reward, numbers, how=how, seed=config.seed)

    def step(train_step: Callable[..., Any], _: Any) -> Callable[..., Any]:
        return functools.partial(
            train.rl.rl_step,
            play=play,
            train_step=train_step,
            batch_rows=config.device_batch_size,
            pad_tokens=PAD_TOKENS if config.compile else None,
            line=distributed.control_group(),
            show=lambda played: latest.append(max(played, key=lambda group: len({one.reward for one in group}))),
        )

    return train.Stage(
        name="rl",
        parent=record,
        num_steps=config.num_iterations,
        step_tokens=how.examples * how.samples * how.max_tokens,  # at most; each step says how many
        flops_per_token=model.flops_per_token(shape),
        hparams_at=lambda step, _: optim.hparams(config.optim, plan, step, done=step / num_steps),
        batches=lambda state, rows: train.rl.prompt_batches(practice, how.examples, state),
        initial=lambda layout: train.init_from.init_state_from(origin, runtime, layout, moments=config.optim.moments),
        evaluations=lambda rows: [
            train.Evaluation("rl/pass_at_1", config.eval.every_steps, functools.partial(examine, decoder, exam)),
            train.Evaluation(None, config.eval.sample_every_steps, functools.partial(look, latest)),
        ],
        step=step,
    )


def player(shape: ModelConfig, tok: Tokenizer, config: Config, runtime: Runtime) -> Callable[[Params], Engine]:
    """Return a function that gives the run's one engine with the parameters that it is given.

    It is made when it is first needed, and keeps what it has compiled.
    """
    made: list[Engine] = []
    how: dict[str, Any] = {"dtype": runtime.compute_dtype, "compile": config.compile, "slots": config.rollout.slots}
    context = min(model.CONTEXT_LIMIT * shape.sequence_len, shape.sequence_len + config.rollout.max_tokens)

    def decoder(params: Params) -> Engine:
        if made:
            infer.load_params_(made[0], params)
        else:
            made.append(infer.start(params, shape, tok, context=context, own=True, **how))
        return made[0]

    return decoder


def examine(decoder: Callable[[Params], Engine], exam: Task, job: Job, state: TrainState) -> train.Result | None:
    """Return pass@k on the test split."""
    config: Any = job.config
    params = distributed.sharding.whole(state.params)
    line = distributed.control_group()
    with distributed.raise_on_any_failure(line):
        found = train.rl.pass_at_k(decoder(params), job.tok, exam, config.eval.problems, config.rollout, line)
    if job.stop.agreed():
        return None
    names = {name: name.rpartition("_")[2] for name in found}
    shown = ", ".join(f"@{names[name]} {value:.1%}" for name, value in found.items())
    return train.Result(found, [f"step {int(state.step)}: pass {shown}"])


def look(latest: Sequence[Sequence[Rollout]], job: Job, state: TrainState) -> train.Result:
    """Return an example of the last step, the best two of the answers to it and the worst, a line each."""
    if not latest:
        return train.Result({}, [])
    answers = {shown(job.tok, one.tokens): one.reward for one in latest[0]}
    ranked = sorted(answers.items(), key=lambda item: -item[1])
    asked = job.tok.decode(latest[0][0].prompt).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
    lines = [f"step {int(state.step)}: {asked!r}", *(f"  {r:g}  {text}" for text, r in ranked[:2] + ranked[2:][-1:])]
    return train.Result({}, lines)


def shown(tok: Tokenizer, ids: Sequence[int]) -> str:
    """Return an answer in one line, with [call → result] where a tool was used."""
    content = chat_format.content(tok, ids)
    marks = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return repr("".join(marks[part["type"]].format(part["text"]) for part in parts))


def draw(folder: Path) -> None:
    """Draw the curves of reward, length and pass@k into the run's folder, and show the reward's."""
    rows = metrics.logger.read(folder)
    steps, rewards = metrics.logger.curve(rows, "rl/reward")
    smooth, state = [], None
    for value in rewards:
        state, mean = metrics.logger.ema(state, value)
        smooth.append(mean)
    title = folder.name
    plots.line_chart(
        folder / "reward.svg",
        {"each step": (steps, rewards), "smoothed": (steps, smooth)},
        title=f"{title}: reward",
        x_label="step",
        y_label="mean reward",
    )
    lengths = {"answers": metrics.logger.curve(rows, "rl/answer_tokens")}
    plots.line_chart(folder / "length.svg", lengths, title=f"{title}: length", x_label="step", y_label="tokens")
    passed = {f"pass@{k}": metrics.logger.curve(rows, f"rl/pass_at_{k}") for k in (1, 2, 4, train.rl.MAX_K)}
    plots.line_chart(folder / "pass.svg", passed, title=f"{title}: test", x_label="step", y_label="share solved")
    if len(steps) > 1:
        print(plots.ascii_chart(steps, smooth, title="mean reward, smoothed, by step"))
    print(f"curves: {folder} (reward.svg, length.svg, pass.svg)")
    print(f"next: python launch.py --experiment=eval_chat --set run={folder.name}")
