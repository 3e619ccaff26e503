"""One PyTorch training script, every way to run it."""

from idist.auto.data import auto_dataloader
from idist.auto.gradients import MicroBatch, accumulate, clip_grad_norm_
from idist.auto.join import join
from idist.auto.loader import Loader
from idist.auto.model import auto_model
from idist.auto.optim import auto_optim
from idist.auto.samplers import DistributedProxySampler, ShardSampler
from idist.backends import BUILTIN as registered_computation_models
from idist.backends import has_hvd_support, has_native_dist_support, has_xla_support
from idist.checkpoint import load, save
from idist.collectives import (
    Handle,
    all_gather,
    all_gather_tensors_with_shapes,
    all_reduce,
    all_reduce_,
    all_to_all,
    barrier,
    broadcast,
    gather,
    reduce_mean,
    reduce_scatter,
    scatter,
)
from idist.errors import (
    BackendUnavailable,
    CollectiveMismatch,
    ConfigError,
    IdistError,
    LaunchError,
    PeerFailed,
    UnknownArgument,
    WorkerFailed,
)
from idist.groups import new_group
from idist.launchers.argv import drop_local_rank as _drop_local_rank
from idist.logs import get_logger, print_once
from idist.parallel import Parallel, spawn
from idist.preemption import should_stop
from idist.randomness import seed_all
from idist.ranks import (
    available_backends,
    backend,
    device,
    get_local_rank,
    get_nnodes,
    get_node_rank,
    get_nproc_per_node,
    get_rank,
    get_topology,
    get_world_size,
    hostname,
    model_name,
    one_rank_first,
    one_rank_only,
    show_config,
)
from idist.runtime import finalize, initialize, set_local_rank, sync
from idist.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CollectiveMismatch",
    "ConfigError",
    "DistributedProxySampler",
    "Handle",
    "IdistError",
    "LaunchError",
    "Loader",
    "MicroBatch",
    "Parallel",
    "PeerFailed",
    "ShardSampler",
    "Topology",
    "UnknownArgument",
    "WorkerFailed",
    "accumulate",
    "all_gather",
    "all_gather_tensors_with_shapes",
    "all_reduce",
    "all_reduce_",
    "all_to_all",
    "auto_dataloader",
    "auto_model",
    "auto_optim",
    "available_backends",
    "backend",
    "barrier",
    "broadcast",
    "clip_grad_norm_",
    "device",
    "finalize",
    "gather",
    "get_local_rank",
    "get_logger",
    "get_nnodes",
    "get_node_rank",
    "get_nproc_per_node",
    "get_rank",
    "get_topology",
    "get_world_size",
    "has_hvd_support",
    "has_native_dist_support",
    "has_xla_support",
    "hostname",
    "initialize",
    "join",
    "load",
    "model_name",
    "new_group",
    "one_rank_first",
    "one_rank_only",
    "print_once",
    "reduce_mean",
    "reduce_scatter",
    "registered_computation_models",
    "save",
    "scatter",
    "seed_all",
    "set_local_rank",
    "should_stop",
    "show_config",
    "spawn",
    "sync",
]

# Before the script reads its arguments, which is before it calls us.
_drop_local_rank()
