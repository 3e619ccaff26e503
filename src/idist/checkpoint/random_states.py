"""The states of the generators that everybody draws from: of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import torch

from idist.backends.base import Backend

_one_at_a_time = threading.Lock()
"""Two threads that are ranks must not ask torch for its state at once: that hangs."""


def get(backend: Backend) -> dict[str, Any]:
    """Those of this process, as plain data; of NumPy if it is imported, of the backend's device if it has one."""
    with _one_at_a_time:
        states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        drawn = sys.modules["numpy"].random.get_state(legacy=False)
        states["numpy"] = {**drawn, "state": {**drawn["state"], "key": drawn["state"]["key"].tolist()}}
    if (state := backend.random_state()) is not None:
        states["device"] = state
    return states


def set(states: dict[str, Any], backend: Backend) -> None:  # noqa: A001 - of this module
    """Put them back, those that are of use here."""
    with _one_at_a_time:
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
    if "numpy" in states and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        drawn = states["numpy"]
        key = numpy.array(drawn["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**drawn, "state": {**drawn["state"], "key": key}})
    if "device" in states:
        backend.set_random_state(states["device"])
