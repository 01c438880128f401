"""Checkpoints with orbax: `save` and `restore` a train state, `load` a trained model.

`convert` converts weights from and to karpathy/nanochat, `huggingface` and `tensor_files` write folders for others.
"""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.checkpoint import adapters, convert, huggingface, manager, pretrained, tensor_files
    from nanochat.checkpoint.adapters import base_reference, find_base
    from nanochat.checkpoint.config import CheckpointConfig, LoadConfig
    from nanochat.checkpoint.integrity import CorruptCheckpointError
    from nanochat.checkpoint.manager import (
        Manager,
        add_metrics,
        close,
        latest_step,
        load_arrays,
        load_params,
        open_manager,
        restore,
        save,
        step_metrics,
        steps,
        wait,
    )
    from nanochat.checkpoint.pretrained import (
        TRAIN_COMMAND,
        CheckpointInfo,
        Pretrained,
        describe_model,
        find_run,
        infer_config,
        inspect,
        list_runs,
        load,
        load_tokenizer,
        runs_folder,
        split_step,
        warning,
    )

__getattr__ = lazy_exports(__name__, __file__)
