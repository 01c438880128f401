"""Write the report card of a run: one page with the results of every stage side by side, times, curves and samples.

    python launch.py --experiment=report                              # of the run that was saved last
    python launch.py --experiment=report --set run=d24_sft
    python launch.py --experiment=report --set run=d24 --set samples=false    # reads files only: seconds, no model

The page is report.md in the run's folder, its pictures lie in report/ beside it. It covers the run and those that it
was made from (an RL run: base, mid, SFT, RL), whatever of them is there. Evaluations are those on the way, and those
that --experiment=eval_base and --experiment=eval_chat have left. A run that is not finished gets a page as well.
Samples are made for the page from each stage's checkpoint, greedily; under torchrun by rank 0 alone. Takes seconds,
and where there are samples as long as it takes to load the models.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nanochat import checkpoint, distributed, infer, metrics
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.distributed import hardware
from nanochat.train import PROMPTS

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime
    from nanochat.metrics import RunInfo

QUESTIONS = (
    "Who are you?",
    "What is 12*3?",
    "How many r are in strawberry?",
    "What is the capital of France?",
    "Why is the sky blue?",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to report on.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last.
        samples: whether the page has some. prompts: what base models go on with. questions: what the others answer.
        sample_tokens, answer_tokens: of each at most.
        gpus: that the runs had, for their cost; none: those of this machine, or of this job if it has more.
        device, dtype: of the samples; auto, or as in `runtime.create`.
    """

    run: str | None = None
    samples: bool = True
    prompts: tuple[str, ...] = PROMPTS
    questions: tuple[str, ...] = QUESTIONS
    sample_tokens: int = 32
    answer_tokens: int = 128
    gpus: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sample_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.gpus is not None and self.gpus < 0:
            raise UserError(f"gpus={self.gpus}: must be 0 or more")


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Write the page, and say where it is."""
    make(config, runtime, {})


def make(config: Config, runtime: Runtime, seconds: Mapping[str, float]) -> None:
    """Write the page; `seconds` tells what else took time, and how long."""
    line = distributed.create_group()
    with distributed.raise_on_any_failure(line):
        if runtime.is_main:
            runs = metrics.run_folder.ancestors(metrics.run_folder.find_run(config.run))
            samples = sampled(config, runtime, runs) if config.samples else []
            page = metrics.report.write(runs, machine(config, runtime), samples, seconds=seconds)
            print(metrics.report.results(runs))
            print(f"\nreport card of {' → '.join(one.name for one in runs)}: {page}")
    distributed.destroy_group(line)


def machine(config: Config, runtime: Runtime) -> metrics.Machine:
    """Return what this machine is, and what its GPUs cost."""
    names = hardware.gpus()
    count = max(len(names), runtime.world_size) if config.gpus is None else config.gpus
    return metrics.Machine(hardware.system_info(), hardware.dollars_per_hour(names[:1] * count))


def sampled(config: Config, runtime: Runtime, runs: Sequence[RunInfo]) -> list[metrics.Sample]:
    """Return what each stage's model makes of the prompts; a stage whose checkpoint is gone is left out."""
    found = []
    for one in runs:
        if one.step not in one.steps:
            continue
        bot = checkpoint.load(one.folder, step=one.step, device=runtime.device, dtype=runtime.compute_dtype)
        texts = config.prompts if one.stage == "base" else config.questions
        limit = config.sample_tokens if one.stage == "base" else config.answer_tokens
        sample = functools.partial(metrics.Sample, one.stage, chat=one.stage != "base")
        found += [sample(text, said) for text, said in zip(texts, completions(bot, one.stage, texts, limit))]
    return found


def completions(bot: Pretrained, stage: str, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Return what follows each text, or what is answered to it, greedily; a text too long for the context is cut."""
    if not texts:
        return []
    tok, room = bot.tokenizer, bot.config.sequence_len - 2
    decoder = infer.start(bot.params, bot.config, tok, slots=len(texts), compile=False, exact=True)
    if stage == "base":
        prompts = [[tok.bos, *tok.encode(text)][:room] for text in texts]
    else:
        prompts = [chat_format.prompt(tok, [{"role": "user", "content": text}])[-room:] for text in texts]
    answers: list[list[int]] = [[] for _ in texts]
    for event in infer.run(decoder, [infer.Request(tuple(ids), max_tokens, 0.0, 0) for ids in prompts]):
        answers[int(str(event.key))].append(event.token)
        if event.finish == "stop" and stage == "base":
            answers[int(str(event.key))].pop()
    return [tok.decode(ids) if stage == "base" else answer(tok, ids) for ids in answers]


def answer(tok: Tokenizer, ids: Sequence[int]) -> str:
    """Return an answer as text, with [call → result] where a tool was used."""
    content = chat_format.content(tok, ids)
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    return "".join(marks[part["type"]].format(part["text"]) for part in content)
