"""Settings that the training stages share."""

import dataclasses
from pathlib import Path
from typing import Literal

from nanochat.checkpoint import CheckpointConfig
from nanochat.config import UserError, base_dir
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
        grad: autograd (torch.autograd.grad over the compiled loss) or func (torch.func.grad_and_value itself).
        attention: kernel, one of attention.KERNELS; fa3 from wherever it is to be had; auto is the fastest here.
        linear: dense, in the compute dtype, or fp8 (of Hopper and later; emulated elsewhere); evaluation stays dense.
        chunk_tokens: tokens whose logits live at once in the loss; none: 1024 on the CPU, where they stay in the cache,
            else 8192.
        memory_budget: share of the activations that is kept for the backward; below 1, some are computed again.
        skip_nonfinite: go on after a step whose loss or gradient is not finite, leaving it out, instead of stopping.
    """

    grad: Literal["autograd", "func"] = "autograd"
    attention: Literal["auto", "fa3", "fa3_hub", "fa3_torch", "fa2", "flex", "cudnn", "flash", "sdpa", "math"] = "auto"
    linear: Literal["dense", "fp8"] = "dense"
    chunk_tokens: int | None = None
    memory_budget: float = 1.0
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UserError(f"train.chunk_tokens={self.chunk_tokens}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation along the way.

    Attributes:
        every_steps: between evaluations of bits per byte; none: at the end only. tokens: of the validation split.
        sample_every_steps: between samples; none: at the end only. sample_tokens: of each sample.
        prompts: what the samples begin with. temperature, top_k: of the samples; temperature 0 is greedy.
    """

    every_steps: int | None = 250
    tokens: int = 80 * 2**19
    sample_every_steps: int | None = 2000
    sample_tokens: int = 16
    prompts: tuple[str, ...] = PROMPTS
    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "sample_every_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least 1, or none")
        for name, least in {"tokens": 1, "sample_tokens": 1, "temperature": 0, "top_k": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least {least}")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a step samples answers.

    Attributes:
        examples: of a step, all ranks together. samples: answers to each.
        temperature, top_k: of the sampling; top_k 0 takes all tokens in. The loss is of the model's own probabilities:
            that of temperature 1 and all tokens.
        max_tokens: of an answer, what tools add included.
        slots: answers that a rank generates at once.
    """

    examples: int = 16
    samples: int = 16
    temperature: float = 1.0
    top_k: int = 50
    max_tokens: int = 256
    slots: int = 64

    def __post_init__(self) -> None:
        for name, least in {"examples": 1, "samples": 2, "top_k": 0, "max_tokens": 1, "slots": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"rollout.{name}={getattr(self, name)}: must be at least {least}")
        if self.temperature <= 0:
            raise UserError(f"rollout.temperature={self.temperature}: must be above 0, or all answers are the same")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Settings that every training stage has.

    Attributes:
        name: of the run's folder. seed: of initial values and data order.
        device, dtype: auto, or as in `runtime.create`. compile: by torch.compile.
        resume: go on from the run's last checkpoint. overwrite: start anew where a run has this name; its checkpoints
            stay in checkpoints.old until the next time.
        device_batch_size: rows of a micro-batch; auto: the most that fit, by an estimate and a step to try it.
    """

    name: str | None = None
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
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
        """Rows of a micro-batch, once they are resolved."""
        assert self.device_batch_size != "auto"
        return self.device_batch_size


def run_folder(name: str) -> Path:
    """Return where the run called `name` keeps its files."""
    return base_dir() / "runs" / name
