"""Settings that the training stages share."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from nanochat import config as configs
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import (
    Device,
    Dtype,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    base_dir,
)
from nanochat.distributed import ShardingConfig
from nanochat.metrics import MetricsConfig

# Of a run; names made of it (`<name>_sft`) fit into the 255 bytes that file systems allow.
RunName = Annotated[
    str,
    "a name of 1 to 200 bytes that does not begin with . or - and has no slash or control character",
    lambda x: x.isprintable() and re.fullmatch(r"[^.\-/\\][^/\\]*", x) and len(x.encode()) <= 200,
]
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How a step is computed.

    Attributes:
        grad: autograd: torch.autograd.grad over the compiled loss; torch_func: torch.func.grad_and_value, wherever
            no layer is gathered inside of the gradient.
        attention: attention kernel; auto: the fastest that is correct on this device. fa3 stands for whichever of
            fa3_hub and fa3_torch is installed.
        linear: matmuls of the training step: dense, in the compute dtype, or fp8 (Hopper and later; emulated
            elsewhere). Evaluation is always dense.
        chunk_tokens: tokens whose logits are in memory at once in the loss; none: 1024 on the CPU, else 8192.
        memory_budget: fraction of the activations kept for the backward; below 1, the others are recomputed.
        skip_nonfinite: skip a step whose loss or gradient is not finite, instead of stopping.
        ema: decay of an exponential average of the weights, kept beside them and evaluated as val/bpb_ema; 0: none.
            0.999 averages over about the last 1000 steps. --experiment=average --set method=ema makes it a run.
        embedding_moments: dtype in which AdamW's moments of token and value embeddings are stored between steps;
            bfloat16 takes half of their memory. They are computed in float32.
    """

    grad: Literal["autograd", "torch_func"] = "autograd"
    attention: Literal["auto", "fa3", "fa3_hub", "fa3_torch", "fa2", "flex", "cudnn", "flash", "sdpa", "math"] = "auto"
    linear: Literal["dense", "fp8"] = "dense"
    chunk_tokens: PositiveInt | None = None
    memory_budget: Fraction = 1.0
    skip_nonfinite: bool = False
    ema: Annotated[float, "at least 0 and below 1", lambda x: 0 <= x < 1] = 0.0
    embedding_moments: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class EvalConfig(Settings):
    """Bits per byte and samples during the run.

    Attributes:
        every_steps: steps between evaluations of bits per byte; none: only after the last step.
        tokens: tokens of the validation split to evaluate on; documents that are fewer are read again from the first.
        sample_every_steps: steps between samples; none: only after the last step.
        sample_tokens: tokens to sample for each prompt.
        prompts: texts that the samples start with.
        temperature: sampling temperature; 0 is greedy.
        top_k: sample from the k most likely tokens; 0: from all.
    """

    every_steps: PositiveInt | None = 250
    tokens: PositiveInt = 80 * 2**19
    sample_every_steps: PositiveInt | None = 2000
    sample_tokens: PositiveInt = 16
    prompts: tuple[str, ...] = PROMPTS
    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Settings):
    """How a step of reinforcement learning samples answers.

    Attributes:
        prompts_per_step: prompts of a step, over all ranks.
        samples_per_prompt: answers to each prompt.
        temperature: sampling temperature; at 0 all answers would be the same. The loss uses the probabilities
            at temperature 1 over all tokens.
        top_k: sample from the k most likely tokens; 0: from all.
        max_tokens: length limit of an answer, tool results included.
        slots: answers that a rank generates at once.
    """

    prompts_per_step: PositiveInt = 16
    samples_per_prompt: Annotated[int, "at least 2", lambda x: x >= 2] = 16
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 50
    max_tokens: PositiveInt = 256
    slots: PositiveInt = 64


@dataclasses.dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters, which are trained in place of the base run's parameters and saved without them.

    Attributes:
        rank: of the adapters; 0: none, all parameters are trained.
        alpha: what an adapter adds to its matrix is scaled by alpha / rank.
        targets: names of the matrices with adapters, * stands for any text. The output layer is among them because a
            base model does not know the special tokens of conversations.
        lr: peak learning rate, of Muon within the layers and of AdamW for the output layer; of the optim settings,
            adapters have the schedule alone.
    """

    rank: NonNegativeInt = 0
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = ("layers.*.attn.[qkv]", "layers.*.attn.proj", "layers.*.mlp.*", "lm_head")
    lr: PositiveFloat = 0.015


@dataclasses.dataclass(frozen=True)
class StageConfig(Settings):
    """Settings of every training stage.

    Attributes:
        name: name of the run's folder.
        seed: seed of the initial parameters and of the data order.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 where a GPU has it, else float16; float32 on CPUs.
        compile: use torch.compile.
        resume: continue from the run's last checkpoint.
        resume_step: continue from the run's checkpoint of this step; those after it move to checkpoints.old, and
            their metrics are kept as metrics.1.jsonl (or .2, …).
        overwrite: replace a run of the same name; its checkpoints move to checkpoints.old.
        device_batch_size: sequences of a micro-batch on each device; auto: the most that fit in memory.
    """

    name: RunName | None = None
    seed: int = 42
    device: Device = "auto"
    dtype: Dtype = "auto"
    compile: bool = True
    resume: bool = False
    resume_step: PositiveInt | None = None
    overwrite: bool = False
    device_batch_size: PositiveInt | Literal["auto"] = 32
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=1000)
    metrics: MetricsConfig = MetricsConfig()

    lora = LoraConfig()  # a setting of the stages that start from a model

    @property
    def rows(self) -> int:
        """`device_batch_size` once auto is resolved."""
        assert self.device_batch_size != "auto"
        return self.device_batch_size


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Settings of every stage that starts from another run.

    Attributes:
        run: name or folder of the base run; none: the newest that suits the stage. name@100: its step 100.
        step: its checkpoint; none: the newest.
    """

    run: str | None = None
    step: NonNegativeInt | None = None
    lora: LoraConfig = LoraConfig()


def run_folder(name: str) -> Path:
    return base_dir() / "runs" / name


def describe(config: StageConfig, facts: Mapping[str, str]) -> str:
    """Return the resolved settings, and what follows from them, as text to print before a run."""
    lines = [f"  {name:<16}{text}" for name, text in facts.items()]
    return "\n".join(["configuration", configs.describe(config), "plan", *lines])
