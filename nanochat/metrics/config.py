"""Settings of what a run logs."""

import dataclasses

from nanochat.config import PositiveInt, Settings


@dataclasses.dataclass(frozen=True)
class MetricsConfig(Settings):
    """What is recorded of a run, and where.

    Attributes:
        every_steps: a line of training metrics each so many steps.
        tensorboard: also write event files to <run>/tensorboard.
        wandb: also send to this wandb project; none for no.
    """

    every_steps: PositiveInt = 10
    tensorboard: bool = False
    wandb: str | None = None
