"""Training: the pure step, the loop around it, and the stages (pretraining, fine-tuning, RL)."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.train import build, config, dpo, functional, init_from, planner, rl, sft, stage, step
    from nanochat.train.build import build_step_functions, estimate_batch_size, planner_setup, try_batch_size
    from nanochat.train.config import (
        PROMPTS,
        EvalConfig,
        FinetuneConfig,
        LoraConfig,
        RolloutConfig,
        RunName,
        StageConfig,
        TrainConfig,
        describe,
        run_folder,
    )
    from nanochat.train.init_from import InitCheckpoint, init_state_from, load_base, load_own, resume_after_restart
    from nanochat.train.planner import Estimate
    from nanochat.train.rl import Reward, Rollout
    from nanochat.train.sft import Packing
    from nanochat.train.stage import Evaluation, Result, RunContext, Stage, progress_from, run_stage
    from nanochat.train.step import (
        NonFiniteLossError,
        Progress,
        StepFn,
        StopFlag,
        TrainState,
        fit,
        gradient,
        init,
        make_update,
        scheduled,
        split_batch,
        stop_on_signals,
        train_step,
    )

__getattr__ = lazy_exports(__name__, __file__)
