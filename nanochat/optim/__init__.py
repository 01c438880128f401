"""Muon and AdamW as pure functions of their state, their schedules, and how settings scale with depth."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.optim import muon_adamw, scaling, schedules
    from nanochat.optim.muon_adamw import (
        MATRIX,
        POLAR_EXPRESS,
        SMEAR_LR,
        Hparams,
        OptState,
        Row,
        as_hparams,
        compiled,
        init,
        muon,
        param_group_settings,
        reduced_axis,
        update,
        update_,
    )
    from nanochat.optim.scaling import OptimConfig, Plan

__getattr__ = lazy_exports(__name__, __file__)
