"""Checkpoints by orbax: `save`, `restore`, and `load` for a trained model; conversion from and to the reference."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.checkpoint import convert, integrity, manager, pretrained, storage
    from nanochat.checkpoint.integrity import CorruptCheckpointError, fingerprint
    from nanochat.checkpoint.manager import (
        CheckpointConfig,
        Manager,
        add_metrics,
        close,
        describe,
        latest_step,
        load_params,
        open_manager,
        restore,
        save,
        steps,
        wait,
    )
    from nanochat.checkpoint.pretrained import (
        TRAIN_COMMAND,
        Pretrained,
        describe_model,
        find_run,
        infer_config,
        list_runs,
        load,
        load_tokenizer,
        runs_folder,
        warning,
    )

__getattr__ = lazy_exports(__name__, __file__)
