"""Muon and AdamW as pure functions of their state, their schedules, and how settings scale with depth."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.optim import muon_adamw, scaling, schedules
    from nanochat.optim.muon_adamw import (
        POLAR_EXPRESS,
        OptState,
        compiled,
        init,
        second_shape,
        update,
        update_,
    )
    from nanochat.optim.scaling import FinetunePlan, OptimConfig, Plan, learning_rates
    from nanochat.optim.schedules import MATRIX, SMEAR_LR, Hparams, as_hparams, hparams, param_group_settings

__getattr__ = lazy_exports(__name__, __file__)
