"""Processes and devices: torchrun's environment, collectives, where tensors live, torch.compile, the GPU table."""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.distributed import collectives, compile, config, hardware, runtime, sharding
    from nanochat.distributed.collectives import (
        ControlGroup,
        LostRankError,
        all_gather_object,
        broadcast_object,
        control_group,
        raise_on_any_failure,
    )
    from nanochat.distributed.compile import compile_fn
    from nanochat.distributed.config import ShardingConfig
    from nanochat.distributed.hardware import GIB, GPU_SPECS, GpuSpec, cpu_cores
    from nanochat.distributed.runtime import (
        DTYPES,
        Runtime,
        all_reduce_max,
        all_reduce_sum,
        barrier,
        choose_device,
        choose_dtype,
        close,
        distributed_context,
        free_bytes,
        init,
        mark_restart,
        peak_flops,
        peak_memory_bytes,
        require_single,
        synchronize,
        time_best,
        was_restarted,
    )
    from nanochat.distributed.sharding import Gather, MuonAllToAll, ShardingPlan, mesh_shape, shard_dim

__getattr__ = lazy_exports(__name__, __file__)
