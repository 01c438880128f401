"""Settings that the training stages share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nanochat import config as configs
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import Device, Dtype, UserError, base_dir, require_at_least
from nanochat.distributed import ShardingConfig
from nanochat.metrics import MetricsConfig

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
class TrainConfig:
    """How a step is computed.

    Attributes:
        grad: autograd: torch.autograd.grad over the compiled loss; torch_func: torch.func.grad_and_value, in one
            process, without custom backwards.
        attention: attention kernel; auto: the fastest that is correct on this device. fa3 stands for whichever of
            fa3_hub and fa3_torch is installed.
        linear: matmuls of the training step: dense, in the compute dtype, or fp8 (Hopper and later; emulated
            elsewhere). Evaluation is always dense.
        chunk_tokens: tokens whose logits are in memory at once in the loss; none: 1024 on the CPU, else 8192.
        memory_budget: fraction of the activations kept for the backward; below 1, the others are recomputed.
        skip_nonfinite: skip a step whose loss or gradient is not finite, instead of stopping.
    """

    grad: Literal["autograd", "torch_func"] = "autograd"
    attention: Literal["auto", "fa3", "fa3_hub", "fa3_torch", "fa2", "flex", "cudnn", "flash", "sdpa", "math"] = "auto"
    linear: Literal["dense", "fp8"] = "dense"
    chunk_tokens: int | None = None
    memory_budget: float = 1.0
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, "train", chunk_tokens=1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Bits per byte and samples during the run.

    Attributes:
        every_steps: steps between evaluations of bits per byte; none: only after the last step.
        tokens: tokens of the validation split to evaluate on.
        sample_every_steps: steps between samples; none: only after the last step.
        sample_tokens: tokens to sample for each prompt.
        prompts: texts that the samples start with.
        temperature: sampling temperature; 0 is greedy.
        top_k: sample from the k most likely tokens; 0: from all.
    """

    every_steps: int | None = 250
    tokens: int = 80 * 2**19
    sample_every_steps: int | None = 2000
    sample_tokens: int = 16
    prompts: tuple[str, ...] = PROMPTS
    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, "eval", every_steps=1, sample_every_steps=1, tokens=1, sample_tokens=1)
        require_at_least(self, "eval", temperature=0, top_k=0)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a step of reinforcement learning samples answers.

    Attributes:
        prompts_per_step: prompts of a step, over all ranks.
        samples_per_prompt: answers to each prompt.
        temperature: sampling temperature. The loss uses the probabilities at temperature 1 over all tokens.
        top_k: sample from the k most likely tokens; 0: from all.
        max_tokens: length limit of an answer, tool results included.
        slots: answers that a rank generates at once.
    """

    prompts_per_step: int = 16
    samples_per_prompt: int = 16
    temperature: float = 1.0
    top_k: int = 50
    max_tokens: int = 256
    slots: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, "rollout", prompts_per_step=1, samples_per_prompt=2, top_k=0, max_tokens=1, slots=1)
        if self.temperature <= 0:
            raise UserError(f"rollout.temperature={self.temperature}: must be above 0, or all answers are the same")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Settings of every training stage.

    Attributes:
        name: name of the run's folder.
        seed: seed of the initial parameters and of the data order.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
        dtype: dtype of the computation; auto: bfloat16 on GPUs from Ampere on, else float32.
        compile: use torch.compile.
        resume: continue from the run's last checkpoint.
        overwrite: replace a run of the same name; its checkpoints move to checkpoints.old.
        device_batch_size: sequences of a micro-batch on each device; auto: the most that fit in memory.
    """

    name: str | None = None
    seed: int = 42
    device: Device = "auto"
    dtype: Dtype = "auto"
    compile: bool = True
    resume: bool = False
    overwrite: bool = False
    device_batch_size: int | Literal["auto"] = 32
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=1000)
    metrics: MetricsConfig = MetricsConfig()

    @property
    def rows(self) -> int:
        """`device_batch_size` once auto is resolved."""
        assert self.device_batch_size != "auto"
        return self.device_batch_size


def run_folder(name: str) -> Path:
    return base_dir() / "runs" / name


def describe(config: StageConfig, facts: Mapping[str, str]) -> str:
    """Return the resolved settings, and what follows from them, as text to print before a run."""
    lines = [f"  {name:<16}{text}" for name, text in facts.items()]
    return "\n".join(["configuration", configs.describe(config), "plan", *lines])
