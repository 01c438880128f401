"""Settings of what a run logs."""

import dataclasses

from nanochat.config import require_at_least


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """What is recorded of a run, and where.

    Attributes:
        every_steps: a line of training metrics each so many steps.
        tensorboard: also write event files to <run>/tensorboard.
        wandb: also send to this wandb project; none for no.
    """

    every_steps: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, "metrics", every_steps=1)
