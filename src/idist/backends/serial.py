"""One process on its own: the same contract, nobody to talk to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from idist.backends.base import DONE, Backend, Group, Work
from idist.errors import ConfigError
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
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

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
        """DataParallel where one process sees several CUDA devices, as users of the older API expect."""
        if self.device().type == "cuda" and torch.cuda.device_count() > 1:
            return torch.nn.DataParallel(model, **options)
        return model
