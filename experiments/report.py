"""Write the report of a run: one page with the results, times, curves and samples of every stage side by side.

    python launch.py --experiment=report                              # of the newest run
    python launch.py --experiment=report --set run=d24_sft
    python launch.py --experiment=report --set run=d24 --set samples=false    # reads files only: seconds, no model

The page is report.md in the run's folder, with its charts in report/ beside it. It covers the run and its ancestors (of
an RL run: base, mid, SFT, RL), as far as they exist, finished or not, with the evaluations made during training and
those of --experiment=eval_base and --experiment=eval_chat. Samples are drawn greedily from each stage's checkpoint.
Takes seconds, plus loading the models if there are samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nanochat import checkpoint, distributed, infer, metrics
from nanochat.config import Device, Dtype, NonNegativeInt, PositiveInt, Settings
from nanochat.data import chat_format
from nanochat.train import PROMPTS

if TYPE_CHECKING:
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
class Config(Settings):
    """What to report on.

    Attributes:
        run: a run's name, or the path of its folder; default: the newest run.
        samples: add samples to the page. prompts: completed by base models. questions: answered by chat models.
        sample_tokens, answer_tokens: limit of each.
        gpus: how many the runs used, to estimate the cost; default: those of this machine, or of this job if more.
        device: auto, cpu, cuda or mps, for the samples. dtype: auto, float32, bfloat16 or float16.
    """

    run: str | None = None
    samples: bool = True
    prompts: tuple[str, ...] = PROMPTS
    questions: tuple[str, ...] = QUESTIONS
    sample_tokens: PositiveInt = 32
    answer_tokens: PositiveInt = 128
    gpus: NonNegativeInt | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"


config = Config


def run(config: Config, runtime: Runtime) -> None:
    make(config, runtime, {})


def make(config: Config, runtime: Runtime, seconds: Mapping[str, float]) -> None:
    """Write the page; `seconds`: what else took time -> seconds."""
    with distributed.raise_on_any_failure():
        if runtime.is_main:
            runs = metrics.run_folder.ancestors(metrics.run_folder.find_run(config.run))
            samples = sampled(config, runtime, runs) if config.samples else []
            names = metrics.machine.gpus()
            count = max(len(names), runtime.world_size) if config.gpus is None else config.gpus
            price = metrics.machine.dollars_per_hour(names[:1] * count)
            page = metrics.report.write(runs, metrics.machine.system_info(), price, samples, seconds=seconds)
            print(metrics.report.results(runs))
            print(f"\nreport of {' → '.join(info.name for info in runs)}: {page}")


def sampled(config: Config, runtime: Runtime, runs: Sequence[RunInfo]) -> list[metrics.Sample]:
    """Return greedy completions by each stage's model, without the stages whose checkpoint is gone."""
    samples = []
    for info in runs:
        texts, limit = config.questions, config.answer_tokens
        if info.stage == "base":
            texts, limit = config.prompts, config.sample_tokens
        if info.step not in info.steps or not texts:
            continue
        loaded = checkpoint.load(info.folder, step=info.step, device=runtime.device, dtype=runtime.compute_dtype)
        tok, room = loaded.tokenizer, loaded.config.sequence_len - 2
        if info.stage == "base":
            prompts = [[tok.bos, *tok.encode(text)][:room] for text in texts]
        else:
            prompts = [chat_format.prompt(tok, [{"role": "user", "content": text}])[-room:] for text in texts]
        engine = infer.start(loaded.params, loaded.config, tok, slots=len(texts), compile=False, exact=True)
        requests = [infer.Request(tuple(ids), limit, temperature=0.0, top_k=0) for ids in prompts]
        for text, result in zip(texts, infer.complete(engine, requests)):
            written = tok.decode(result.content) if info.stage == "base" else chat_format.shown(tok, result.tokens)
            samples.append(metrics.Sample(info.stage, text, written))
    return samples
