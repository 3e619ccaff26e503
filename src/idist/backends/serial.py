"""One process on its own: the same contract, nobody to talk to."""

from __future__ import annotations

from datetime import timedelta
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from idist.backends.base import DONE, Backend, Group, Work, accelerator
from idist.errors import ConfigError, UnknownArgument, did_you_mean
from idist.topology import Topology


class Serial(Backend):
    """The world of one that is there before anything was initialised."""

    model_name = "serial"
    rank = 0
    world_size = 1

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("serial",)

    def __init__(self, name: str = "serial") -> None:
        self.name = name

    def unavailable_reason(self) -> tuple[str, str] | None:
        return None

    def start(
        self, topology: Topology, *, timeout: timedelta | None, device: torch.device | None, **options: Any
    ) -> Topology:
        raise ConfigError("the serial backend is what runs when nothing was initialised; it cannot be started")

    def stop(self) -> None:
        return None

    def device(self) -> torch.device:
        return accelerator() or torch.device("cpu")

    def device_for(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        return True

    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        return DONE

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        out.copy_(tensor)
        return DONE

    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        return DONE

    def barrier(self, group: Group) -> None:
        return None

    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """DataParallel where one process sees several CUDA devices, as users of the older API expect.

        Else nobody takes the options; what would be wrong with several ranks is wrong here too.
        """
        if self.device().type == "cuda" and torch.cuda.device_count() > 1:
            return DataParallel(model, **options)
        known = {**signature(DistributedDataParallel).parameters, **signature(DataParallel).parameters}
        for name in options:
            if name not in known:
                raise UnknownArgument(f"auto_model does not know the argument {name!r}.{did_you_mean(name, known)}")
        return model

    def shard_model(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        """The model itself: there is nobody to share it with."""
        from idist.backends.fsdp import shard

        known = signature(shard).parameters
        for name in options:
            if name not in known:
                raise UnknownArgument(f"auto_model does not know the argument {name!r}.{did_you_mean(name, known)}")
        return model
