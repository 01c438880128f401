"""What the sections of bench_gpu share: settings, where results go, and the limits of the machine."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from experiments._bench import Limits
from nanochat import model
from nanochat.distributed import Runtime, hardware
from nanochat.model import ModelConfig
from nanochat.train import TrainConfig

# Bytes/s of the data sheets, for the prediction of a copy.
BANDWIDTH = {"NVIDIA B200": 8e12, "NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.0e12}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure; the defaults are for one H100 or H200.

    Attributes:
        sections: of limits, check, train, attention and linear; they run in the order of importance.
        out: folder of the results; none: $OUT if it is set, else runs/bench_gpu. minutes: for all of it.
        depths, linears: of the training steps (dense: in the compute dtype), the most important first. batches: rows
            of a micro-batch to try, the most first.
        step_tokens: of a step with accumulation. profile_depth: of the step that is profiled.
        train: settings of the step. head_dim, sequence_len, vocab_size, window_pattern: of the models.
        matmul_size, copy_bytes: of the limits. tests: what pytest collects.
        units: of work, for the process that bench_gpu starts; deadline: Unix time at which it ends.
    """

    sections: tuple[str, ...] = ("limits", "check", "train", "attention", "linear")
    out: str | None = None
    minutes: float = 8.5
    depths: tuple[int, ...] = (20, 24, 12)
    linears: tuple[Literal["dense", "fp8"], ...] = ("dense", "fp8")
    batches: tuple[int, ...] = (64, 32, 16, 8)
    step_tokens: int = 2**19
    profile_depth: int = 20
    rounds: int = 5
    compile: bool = True
    train: TrainConfig = TrainConfig()
    head_dim: int = 128
    sequence_len: int = 2048
    vocab_size: int = 32768
    window_pattern: str = "SSSL"
    matmul_size: int = 8192
    copy_bytes: int = 2**32
    tests: str = "tests"
    device: str = "auto"
    dtype: str = "auto"
    units: tuple[str, ...] = ()
    deadline: float = 0.0


class Bench(NamedTuple):
    """What a section works with.

    Attributes:
        config, here: the settings, and where it runs. folder: of the results. report: keeps a row of numbers.
        limits: of the machine, measured on the first call. seconds_left: until the section is stopped.
    """

    config: Config
    here: Runtime
    folder: Path
    report: Callable[..., None]
    limits: Callable[[], Limits]
    seconds_left: Callable[[], float]

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.here.device.type == "cuda"


def shape_of(config: Config, depth: int) -> ModelConfig:
    """Return the model that is measured at a depth."""
    return model.from_depth(
        depth,
        vocab_size=config.vocab_size,
        sequence_len=config.sequence_len,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
    )


def tidy(bench: Bench) -> None:
    """Forget what was compiled and give memory back, so that one measurement leaves nothing to the next."""
    torch.compiler.reset()
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


def limits(bench: Bench) -> None:
    """Measure what the machine reaches, beside its data sheet."""
    found = bench.limits()
    name = torch.cuda.get_device_name(bench.here.device) if bench.cuda else "cpu"
    machine = hardware.gpu_spec(name)
    sheet = {
        "matmul": machine.half_flops if machine else None,
        "fp8": machine.fp8_flops if machine else None,
        "copy": BANDWIDTH.get(machine.device) if machine else None,
    }
    print(f"{name}, torch {torch.__version__}, {bench.here.compute_dtype}")
    for what, value in found._asdict().items():
        unit = "TB/s" if what == "copy" else "TFLOP/s"
        if value is None:
            print(f"  {what:8} not here: this {bench.here.device.type} device multiplies no float8")
            continue
        # A large product is held back by power: about four fifths of the data sheet; a copy reaches nine tenths.
        share = {"matmul": 0.8, "fp8": 0.75, "copy": 0.9}[what]
        predicted = sheet[what]
        text = f"predicted {share * predicted / 1e12:.4g}, data sheet {predicted / 1e12:.4g}" if predicted else "-"
        print(f"  {what:8} {value / 1e12:8.4g} {unit:8} ({text})")
        bench.report(what=what, value=value, predicted=share * predicted if predicted else None, data_sheet=predicted)
