"""The states of the generators that everybody draws from: of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def get(device: torch.device) -> dict[str, Any]:
    """Those of this process, as plain data; of NumPy if it is imported, of ``device`` if it has one."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        drawn = sys.modules["numpy"].random.get_state(legacy=False)
        states["numpy"] = {**drawn, "state": {**drawn["state"], "key": drawn["state"]["key"].tolist()}}
    if (module := _of_device(device)) is not None:
        states["device"] = module.get_rng_state()
    return states


def set(states: dict[str, Any], device: torch.device) -> None:  # noqa: A001 - of this module
    """Put them back, those that are of use here."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        drawn = states["numpy"]
        key = numpy.array(drawn["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**drawn, "state": {**drawn["state"], "key": key}})
    if "device" in states and (module := _of_device(device)) is not None:
        module.set_rng_state(states["device"])


def _of_device(device: torch.device) -> Any:
    """What draws on this device, if that is not the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device)
