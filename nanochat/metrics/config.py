"""Settings of what a run logs."""

import dataclasses

from nanochat.config import NonNegativeInt, PositiveInt, Settings


@dataclasses.dataclass(frozen=True)
class MetricsConfig(Settings):
    """What is recorded of a run, and where.

    Attributes:
        every_steps: a line of training metrics each so many steps.
        tensorboard: also write event files to <run>/tensorboard.
        wandb: also send to this wandb project; none for no.
        noise_scale_every: measure the gradient noise scale, and by it the critical batch, after every so many steps; 0:
            never. A step needs two micro-batches or ranks. 10 costs less than 0.5% of the time, 1 about 4%.
    """

    every_steps: PositiveInt = 10
    tensorboard: bool = False
    wandb: str | None = None
    noise_scale_every: NonNegativeInt = 0
