"""What a run reports: metrics files, the progress bar, plots, reports."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.metrics import config, logger, machine, noise_scale, plots, progress, report, run_folder, run_lock
    from nanochat.metrics.config import MetricsConfig
    from nanochat.metrics.report import Sample
    from nanochat.metrics.run_folder import Curve, RunInfo

__getattr__ = lazy_exports(__name__, __file__)
