"""Direct preference optimization: of two answers to a prompt, make the better one more likely than the worse one.

    python launch.py --experiment=dpo --set run=d20_sft --set lora.rank=16                 # UltraFeedback, from the hub
    python launch.py --experiment=dpo --set run=quickstart_sft --set pairs=/path/pairs.jsonl
    python launch.py --experiment=dpo --set run=quickstart_sft --set pairs=task:arithmetic:size=2000 \
        --set rollout.samples_per_prompt=8 --set rollout.max_tokens=64    # best and worst of 8 answers, by the reward

A row of a file is {"prompt" or "messages": …, "chosen": …, "rejected": …}, texts or messages, as the page exports them.
Pairs whose prompt is in one tenth by its hash are held out: preference accuracy, margin, log-probabilities and the KL
divergence from the start are measured on them. The log-probabilities of the start are computed once, and kept in the
run's folder. Formulas are in nanochat/train/dpo.py. Writes runs/<base run>_dpo: checkpoints, metrics.jsonl, curves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from experiments import rl, sft
from nanochat import checkpoint, distributed, infer, jsonl, model, optim, tasks, train
from nanochat.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, UserError
from nanochat.data import chat_format
from nanochat.optim import FinetunePlan, OptimConfig
from nanochat.train import EvalConfig, FinetuneConfig, LoraConfig, RolloutConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Config(FinetuneConfig):
    """A run of preference optimization.

    Attributes:
        pairs: ultrafeedback; a file of pairs; or task:NAME, in which answers of the base run are sampled: the best and
            the worst by the task's reward, where they differ.
        val_pairs: a file of pairs to measure on; none: those held out, of ultrafeedback the split test_prefs.
        held_out: fraction of the prompts that are held out.
        source: folder with the files of ultrafeedback or of the task; none: the Hugging Face hub.
        loss: dpo or ipo.
        beta: how strongly the model is held to the start: the larger, the stronger.
        label_smoothing: of dpo, the probability that chosen and rejected are interchanged.
        length_normalized: divide log-probabilities by the length of the answer.
        nll_weight: of the chosen answer's negative log-likelihood per token in the loss; 0: plain dpo or ipo, after
            which the model prefers the chosen answers but may write neither; 1 where it has to write like them.
        long_conversations: truncate them at the context; whole_turns: after the last answer that fits; or drop them.
        pairs_per_step: pairs of an optimizer step, over all ranks.
        device_batch_size: pairs of a micro-batch on each device. Their logits are in memory all at once.
        num_iterations: optimizer steps; none: one epoch.
        rollout: for task:NAME.
        eval: eval.tokens are of the held-out pairs.
    """

    pairs: str = "ultrafeedback"
    val_pairs: str | None = None
    held_out: Fraction = 0.1
    source: str | None = None
    loss: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, "at least 0, below 0.5", lambda x: 0 <= x < 0.5] = 0.0
    length_normalized: bool = False
    nll_weight: NonNegativeFloat = 0.0
    long_conversations: chat_format.TooLong = "truncate"
    pairs_per_step: PositiveInt = 32
    device_batch_size: PositiveInt = 4
    num_iterations: PositiveInt | None = None
    rollout: RolloutConfig = RolloutConfig(samples_per_prompt=8)
    optim: OptimConfig = dataclasses.replace(sft.OPTIM, lr_fraction=0.002, warmup_steps=10, moments=False)
    lora: LoraConfig = LoraConfig(lr=1e-4)
    train: TrainConfig = TrainConfig(attention="sdpa")  # flex, and so perhaps auto, needs sequences of one length
    eval: EvalConfig = EvalConfig(
        every_steps=50, tokens=2**18, sample_every_steps=None, sample_tokens=64, prompts=sft.PROMPTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(f"label_smoothing={self.label_smoothing}: is of loss=dpo; ipo has none")
        if self.train.attention in ("auto", "flex"):
            raise UserError(f"train.attention={self.train.attention}: answers have many lengths; set sdpa, or another")


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Read or sample the pairs, compute the start's log-probabilities, and train."""
    config, base = train.load_base(config, "dpo", runtime, run=config.run, step=config.step, stages=("sft", "rl"))
    ranks, length, folder = runtime.world_size, base.shape.sequence_len, train.run_folder(str(config.name))
    if config.pairs_per_step % (config.rows * ranks):
        pairs, divides = f"pairs_per_step={config.pairs_per_step}", f"device_batch_size={config.rows} x {ranks} ranks"
        raise UserError(f"{pairs}: not a multiple of {divides}")
    lora = train.init_from.load_lora(config, base, runtime)
    origin = base.origin or {}
    start = train.init_from.load(config.run or origin["run"], origin["step"]) if base.resumed else base
    fingerprint = checkpoint.base_reference(start.folder, start.step)["fingerprint"]

    def base_params() -> model.Params:
        return lora.base if lora else train.init_from.load_frozen(start.folder, start.step, runtime)

    rows, val_rows = load_pairs(config, base, runtime, folder, fingerprint, base_params)
    render = functools.partial(train.dpo.render, tok=base.tokenizer, max_tokens=length)
    (pairs, n_skipped), (val_pairs, _) = (render(part, too_long=config.long_conversations) for part in (rows, val_rows))
    ends = itertools.accumulate(len(row.ids) for pair in val_pairs for row in pair)
    val_pairs = val_pairs[: max(sum(end <= config.eval.tokens for end in ends) // 2, 1)]
    if not pairs or not val_pairs:
        raise UserError(f"pairs={config.pairs}: {len(pairs)} to train on, {len(val_pairs)} held out: more are needed")
    steps = config.num_iterations or max(len(pairs) // config.pairs_per_step, 1)
    config = dataclasses.replace(config, num_iterations=steps)
    facts = {
        "starts from": " ".join(str(x) for x in origin.values()),
        "parameters": f"{model.count(base.shape)['total']:,}",
        **train.init_from.describe_lora(lora, runtime),
        "pairs": f"{len(pairs):,}, {len(val_pairs):,} held out to measure on",
        "skipped": f"{n_skipped:,} pairs: equal, or without an answer's token within {length} tokens",
        "steps": f"{steps} of {config.pairs_per_step} pairs, {steps * config.pairs_per_step / len(pairs):.2f} epochs",
    }
    print(train.describe(config, facts), flush=True)
    reference = train.dpo.reference_log_probs(folder, fingerprint, pairs, base_params, 2 * config.rows, runtime)
    stage = dpo_stage(config, base, runtime, pairs, val_pairs, reference, base_params, lora)
    train.run_stage(config, stage, base.shape, base.tokenizer, runtime)
    print(f"next: python launch.py --experiment=chat --set run={config.name}")


def load_pairs(
    config: Config,
    base: train.InitCheckpoint,
    runtime: distributed.Runtime,
    folder: Path,
    fingerprint: str,
    base_params: Callable[[], model.Params],
) -> tuple[list[tasks.Preference], list[tasks.Preference]]:
    """Return the pairs to train on, shuffled, and those to measure on."""
    kind, _, name = config.pairs.partition(":")
    file = Path(config.pairs).expanduser()
    if kind == "task":
        made_of = repr((fingerprint, name, config.source, config.rollout, config.seed))
        file = folder / f"pairs_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.jsonl"
        if not distributed.broadcast_object(file.exists()):
            sample_pairs(config, name, base, runtime, base_params(), file)
    with distributed.raise_on_any_failure():
        if config.pairs == "ultrafeedback":
            splits = [tasks.ultrafeedback(f"{split}_prefs", config.source) for split in ("train", "test")]
            rows, held_out = ([task.row(i) for i in range(task.size)] for task in splits)
        elif not file.is_file():
            raise UserError(f"pairs={config.pairs}: no such file; expected ultrafeedback, a file, or task:NAME")
        else:
            rows, held_out = tasks.read_preferences(file), []
            if not config.val_pairs:
                held_out = [row for row in rows if is_held_out(row, config.held_out)]
                rows = [row for row in rows if not is_held_out(row, config.held_out)]
            random.Random(config.seed).shuffle(rows)
        if config.val_pairs:
            held_out = tasks.read_preferences(Path(config.val_pairs).expanduser())
    return rows, held_out


def is_held_out(row: tasks.Preference, fraction: float) -> bool:
    """Return whether a pair is in the held-out fraction: by its prompt, so that no prompt is on both sides."""
    digest = hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def sample_pairs(
    config: Config,
    name: str,
    base: train.InitCheckpoint,
    runtime: distributed.Runtime,
    params: model.Params,
    file: Path,
) -> None:
    """Write the best and the worst of some answers to each prompt of a task, where their rewards differ."""
    task, rollout = tasks.from_text(name, "train", source=config.source), config.rollout
    reward, shape, tok, rows = train.rl.correct_reward(task), base.shape, base.tokenizer, []
    print(f"sampling {rollout.samples_per_prompt} answers to {task.size:,} prompts of {task.name}, once", flush=True)
    with distributed.raise_on_any_failure():
        context = min(model.CONTEXT_LIMIT * shape.sequence_len, shape.sequence_len + rollout.max_tokens)
        options = {"dtype": runtime.compute_dtype, "compile": config.compile}
        engine = infer.start(params, shape, tok, slots=rollout.slots, context=context, **options)
        numbers = range(runtime.rank, task.size, runtime.world_size)
        for start in range(0, len(numbers), rollout.prompts_per_step):
            part = numbers[start : start + rollout.prompts_per_step]
            groups = train.rl.rollouts(engine, tok, task, reward, part, config=rollout, seed=config.seed)
            for number, group in zip(part, groups):
                worst, *_, best = sorted(group, key=lambda answer: answer.reward)
                if worst.reward < best.reward:
                    contents = (chat_format.content(tok, answer.tokens) for answer in (best, worst))
                    chosen, rejected = ([{"role": "assistant", "content": content}] for content in contents)
                    rows.append({"messages": task.row(number)["messages"][:-1], "chosen": chosen, "rejected": rejected})
    rows = [row for part in distributed.all_gather_object(rows) for row in part]
    print(f"{len(rows):,} of {task.size:,} prompts have answers of different reward; kept in {file}", flush=True)
    if runtime.is_main:
        jsonl.write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    distributed.barrier()


def dpo_stage(
    config: Config,
    base: train.InitCheckpoint,
    runtime: distributed.Runtime,
    pairs: list[train.dpo.Pair],
    val_pairs: list[train.dpo.Pair],
    reference: Tensor,
    base_params: Callable[[], model.Params],
    lora: train.build.Lora | None,
) -> train.Stage:
    """Return the stage: batches of pairs, their loss, measurements on held-out pairs, and sample answers."""
    shape, num_steps = base.shape, config.num_iterations
    assert num_steps
    plan = FinetunePlan(shape.n_embd, weight_decay=config.optim.weight_decay, lora_lr=config.lora.lr if lora else None)
    rates = dataclasses.replace(config.optim, **optim.learning_rates(config.optim, base.settings))
    objective = train.dpo.Objective(
        config.loss, config.beta, config.label_smoothing, config.length_normalized, config.nll_weight
    )
    content = hashlib.sha256(repr((reference.tolist(), pairs)).encode()).hexdigest()[:16]

    def batches(state: Any, _: int) -> Any:
        pad_tokens = rl.PAD_TOKENS if config.compile else None
        return train.dpo.batches(pairs, reference, content, config.pairs_per_step, pad_tokens, runtime, state)

    def measure(ctx: train.RunContext, state: train.TrainState) -> train.Result:
        params = train.build.full_params(state.params, lora)
        values = train.dpo.evaluate(params, base_params(), val_pairs, objective, config.rows, runtime)
        text = f"accuracy {values['accuracy']:.1%}, margin {values['margin']:.3f}, KL {values['kl']:.4f} a token"
        metrics = {f"val/preference_{name}": x for name, x in values.items()}
        return train.Result(metrics, [f"step {int(state.step)}: held-out pairs: {text}"])

    def schedule(step: int, _: Any) -> optim.Hparams:
        return optim.hparams(rates, plan, step, done=step / num_steps)

    return train.Stage(
        name="dpo",
        origin=base.origin,
        num_steps=num_steps,
        step_tokens=2 * config.pairs_per_step * shape.sequence_len,  # at most
        flops_per_token=model.flops_per_token(shape),
        make_step=lambda train_step, rows: train.scheduled(train_step, 2 * rows, schedule=schedule),
        batches=batches,
        initial_state=functools.partial(train.init_state_from, base, runtime, moments=config.optim.moments),
        evaluations=[
            train.Evaluation("val/preference_accuracy", config.eval.every_steps, measure),
            sft.print_answers(config, base.tokenizer),
        ],
        lora=lora,
        objective=functools.partial(train.dpo.preference_loss, objective=objective),
    )
