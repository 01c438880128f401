"""Measure the CORE evaluation: batched, with shared beginnings computed once, against one prompt at a time.

    python launch.py --experiment=bench_core --set bundle=/path/to/eval_bundle --set threads=1
    python launch.py --experiment=bench_core --set bundle=... --set run=quickstart --set rows=10

Both ways answer the same rows, task by task, in turn and with the same threads; rows to prompts to tokens to answers is
timed in both. One prompt at a time is `model.apply` and then what one would write without a thought for speed: the loss
and the likeliest token at every position. The answers of both have to be the same.
Prints prompts a second and the ratio of the times, by kind of task and over all, and one JSON line; on the CPU also the
ratio of the processor's time, which other programs on the machine do not disturb as much. Without a run the
model has random weights and a tokenizer trained on the embedded corpus. With 40 rows a task: ten minutes on one core.
"""

import dataclasses
import itertools
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanochat import checkpoint, model
from nanochat.config import UserError, base_dir
from nanochat.data import DataConfig, Tokenizer, sources, tokenizer
from nanochat.distributed import Runtime, synchronize
from nanochat.eval import Answer, Question, core, core_bundle, likelihood
from nanochat.model import CONTEXT_LIMIT, Compute, ModelConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and on what.

    Attributes:
        bundle: its folder; none: the published one. rows: answered of each task, the first ones; none: all.
        run: a trained model; none: one of random weights, shaped by depth, vocab_size and sequence_len.
        max_tokens: of a prompt; none: the limit of the model. tokens_per_batch: as for eval_base.
        rounds: of both ways, for each task; the least time of each counts.
        threads: of the CPU; none: as torch has them. device, dtype: auto, or as in `runtime.create`.
    """

    bundle: Path | None = None
    rows: int | None = None
    run: str | None = None
    depth: int = 4
    vocab_size: int = 4096
    sequence_len: int = 512
    max_tokens: int | None = None
    tokens_per_batch: int | None = None
    rounds: int = 1
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if any(x is not None and x < 1 for x in (self.rounds, self.rows, self.max_tokens, self.tokens_per_batch)):
            raise UserError("rounds, rows, max_tokens and tokens_per_batch have to be at least 1")


class Model(NamedTuple):
    """What is measured."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer


class Seconds(NamedTuple):
    """What a task took: prompts and tokens, seconds one at a time and batched, and seconds of the processor."""

    prompts: int
    tokens: int
    single: float
    batched: float
    cpu_single: float
    cpu_batched: float


def config() -> Config:
    return Config()


def run(config: Config, here: Runtime) -> None:
    if here.world_size > 1:
        raise UserError("bench_core measures one process: start it with python, not torchrun")
    if config.threads:
        torch.set_num_threads(config.threads)
    bundle = core_bundle.read(config.bundle or core_bundle.fetch())
    bot = subject(config, here)
    cpu = here.device.type == "cpu"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name()
    shape = bot.config
    print(
        f"{name}, torch {torch.__version__}, depth {shape.n_layer}, width {shape.n_embd}, {shape.vocab_size} tokens of "
        f"vocabulary, context {shape.sequence_len}"
    )
    print(f"\n{'task':<34}{'prompts':>8}{'tokens':>9}{'one at a time':>16}{'batched':>10}{'ratio':>8}{'of CPU':>8}")
    kinds: dict[str, list[Seconds]] = {}
    for label in bundle.entries:
        task = core_bundle.load(bundle, label)
        found = measure(config, bot, task, here)
        kinds.setdefault(task.kind, []).append(found)
        print(line(label, found), flush=True)
    print()
    sums = {kind: added(rows) for kind, rows in kinds.items()}
    sums["all"] = added(list(itertools.chain(*kinds.values())))
    for kind, found in sums.items():
        print(line(kind, found))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    settings |= {"device": name, "torch": torch.__version__}
    ratios = {
        kind: {"ratio": x.single / x.batched, "cpu_ratio": x.cpu_single / x.cpu_batched} for kind, x in sums.items()
    }
    results = {kind: found._asdict() | ratios[kind] for kind, found in sums.items()}
    print("\n" + json.dumps({"settings": settings} | results))


def subject(config: Config, here: Runtime) -> Model:
    """Return the model to measure. Raises: UserError."""
    if config.run is not None:
        bot = checkpoint.load(config.run, device=here.device, dtype=here.compute_dtype)
        return Model(bot.params, bot.config, bot.tokenizer)
    folder = base_dir() / f"bench_tokenizer_{config.vocab_size}"
    if not folder.exists():
        print(f"training a tokenizer of {config.vocab_size} tokens, once")
        tokenizer.save(tokenizer.train(sources.texts(DataConfig("embedded"), "train"), config.vocab_size), folder)
    tok = tokenizer.load(folder)
    shape = model.from_depth(config.depth, vocab_size=tok.vocab_size, sequence_len=config.sequence_len)
    params = model.init(shape, 0, device=here.device, dtype=here.compute_dtype)
    # A fresh model's zeros would make all of its answers ties.
    generator = torch.Generator().manual_seed(0)
    params = params.apply(lambda x: x + 0.05 * torch.randn(x.shape, generator=generator).to(x))
    return Model(params, shape, tok)


def measure(config: Config, bot: Model, task: core_bundle.CoreTask, here: Runtime) -> Seconds:
    """Return what a task takes, both ways. Raises: RuntimeError, where they give different answers."""
    limit = config.max_tokens or CONTEXT_LIMIT * bot.config.sequence_len
    best, best_cpu = [math.inf, math.inf], [math.inf, math.inf]
    answers: list[list[Answer]] = [[], []]
    asked: list[Question] = []
    for _ in range(config.rounds):
        for way in range(2):
            synchronize(here.device)
            start, start_cpu = time.perf_counter(), time.process_time()
            asked = list(itertools.islice(core.questions(task, bot.tokenizer, limit), config.rows))
            answers[way] = batched(config, bot, asked) if way else one_at_a_time(bot, asked)
            synchronize(here.device)
            best[way] = min(best[way], time.perf_counter() - start)
            best_cpu[way] = min(best_cpu[way], time.process_time() - start_cpu)
    wrong = sum(a.is_correct != b.is_correct for a, b in zip(*answers))
    if wrong and bot.params["wte"].dtype == torch.float32:
        raise RuntimeError(f"{task.label}: {wrong} of {len(asked)} rows are answered differently")
    prompts = [prompt for question in asked for prompt in question.prompts]
    return Seconds(len(prompts), sum(len(prompt.ids) for prompt in prompts), *best, *best_cpu)


def batched(config: Config, bot: Model, asked: Sequence[Question]) -> list[Answer]:
    """Return the answers as the evaluation finds them."""
    groups = [question.prompts for question in asked]
    how = {"padding": bot.tokenizer.bos, "tokens_per_batch": config.tokens_per_batch}
    scored = likelihood.score(bot.params, bot.config, groups, **how, compute=Compute(bot.params["wte"].dtype))
    return [core.answer(question, scores) for question, scores in zip(asked, scored)]


@torch.no_grad()
def one_at_a_time(bot: Model, asked: Sequence[Question]) -> list[Answer]:
    """Return the answers from one forward pass a prompt, with the logits of all its tokens."""
    device, found = bot.params["wte"].device, []
    for question in asked:
        losses, right = [], False
        for ids, start, end in question.prompts:
            tokens = torch.tensor([ids], device=device)
            logits = model.apply(bot.params, tokens, config=bot.config)[0]
            targets = tokens[0].roll(-1)
            nll, likeliest = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)
            losses.append(nll[start - 1 : end - 1].mean().item())
            right = bool((likeliest[start - 1 : end - 1] == targets[start - 1 : end - 1]).all())
        choice = losses.index(min(losses))
        right = right if question.gold is None else choice == question.gold
        found.append(Answer(right, choice, tuple(losses)))
    return found


def added(rows: Sequence[Seconds]) -> Seconds:
    """Return the sums."""
    return Seconds(*(sum(column) for column in zip(*rows)))


def line(label: str, found: Seconds) -> str:
    """Return a line of the table: the times in prompts a second."""
    single, batched = found.prompts / found.single, found.prompts / found.batched
    ratio, cpu = found.single / found.batched, found.cpu_single / found.cpu_batched
    return f"{label:<34}{found.prompts:>8}{found.tokens:>9}{single:>14.1f}/s{batched:>8.1f}/s{ratio:>7.2f}x{cpu:>7.2f}x"
