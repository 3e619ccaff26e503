"""Fully sharded models, for every backend of torch.distributed: each rank holds a part of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from idist.backends.c10d import check_whole
from idist.errors import ConfigError

Wrap = int | type[torch.nn.Module] | tuple[type[torch.nn.Module], ...] | Callable[[torch.nn.Module], bool]

LARGE = 1_000_000
"""Parameters of a module that is sharded by itself, if nothing else is asked for."""


def shard(
    model: torch.nn.Module,
    mesh: DeviceMesh,
    *,
    wrap: Wrap = LARGE,
    mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool | int | None = None,
) -> torch.nn.Module:
    """Shard the parameters of rank 0 over the ranks of ``mesh``, in place.

    Args:
        wrap: which modules are gathered one at a time, rather than the whole model at once: those of these classes,
            those with at least so many parameters that are not in one already, or those that a function chooses.
        mixed_precision: what to compute in; gradients are reduced in float32. Or torch's policy.
        cpu_offload: keep parameters, gradients and the optimizer's states in the memory of the CPU.
        reshard_after_forward: as in torch's ``fully_shard``.

    Raises:
        ConfigError: ``wrap`` fits no module, or the model is sharded or wrapped already.
    """
    if isinstance(model, (FSDPModule, torch.nn.parallel.DistributedDataParallel)):
        raise ConfigError(f"the model is wrapped already, as {type(model).__name__}; auto_model takes the bare one")
    check_whole(model)
    _take_from_rank_0(model, mesh.get_group())
    how: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": _precision(mixed_precision),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    for module in _chosen(model, wrap):
        fully_shard(module, **how)
    fully_shard(model, **how)
    return model


def _precision(wanted: torch.dtype | MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    if isinstance(wanted, MixedPrecisionPolicy):
        return wanted
    if wanted is None or (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        return MixedPrecisionPolicy(param_dtype=wanted, reduce_dtype=torch.float32 if wanted else None)
    raise ConfigError(f"mixed_precision is a type to compute in, such as torch.bfloat16, or a policy; got {wanted!r}")


def _take_from_rank_0(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Or each rank would hold a part of a model of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    works = [dist.broadcast(tensor.detach(), group=group, group_src=0, async_op=True) for tensor in tensors]
    for work in works:
        work.wait()


def _chosen(model: torch.nn.Module, wrap: Wrap) -> list[torch.nn.Module]:
    """The modules to shard by themselves, inner ones first."""
    if isinstance(wrap, int) and not isinstance(wrap, bool) and wrap > 0:
        return _large(model, wrap)
    classes = wrap if isinstance(wrap, tuple) else (wrap,)
    if all(isinstance(cls, type) and issubclass(cls, torch.nn.Module) for cls in classes):
        found = [module for module in _inner_first(model) if isinstance(module, classes)]  # type: ignore[arg-type]
    elif callable(wrap):
        found = [module for module in _inner_first(model) if wrap(module)]
    else:
        raise ConfigError(f"wrap is a class of modules or several, a number of parameters, or a function; got {wrap!r}")
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(f"wrap={wrap!r} fits no module of the model; it has {', '.join(kinds)}")
    return found


def _large(model: torch.nn.Module, least: int) -> list[torch.nn.Module]:
    found: list[torch.nn.Module] = []
    taken: set[torch.nn.Parameter] = set()
    for module in _inner_first(model):
        own = set(module.parameters()) - taken
        if sum(parameter.numel() for parameter in own) >= least:
            found.append(module)
            taken |= own
    return found


def _inner_first(model: torch.nn.Module) -> list[torch.nn.Module]:
    """All but the model itself, and but lists and dicts of modules, which have no forward pass."""
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict)
    return [module for module in reversed(list(model.modules())[1:]) if not isinstance(module, containers)]
