"""torch_xla itself: is it here, does it fit this torch, which ranks does its runtime have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from idist.errors import BackendUnavailable, LaunchError
from idist.topology import Topology

_RUN = "2.9.0"
"""The version that the tests are run with."""

_DOCUMENT = "docs/backends/xla.md of idist"


def installed() -> bool:
    """Whether this Python has torch_xla; imports nothing of it."""
    return importlib.util.find_spec("torch_xla") is not None


def problem() -> tuple[str, str] | None:
    """Why it cannot be used here, and what to do about it; ``None`` if it can."""
    try:
        found = version("torch_xla")
    except PackageNotFoundError:
        return "torch_xla is not installed", _pair(_RUN)
    if _minor(found) != _minor(torch.__version__):
        return (
            f"torch_xla {found} works with torch {_minor(found)} only, and this is torch {torch.__version__}",
            _pair(found),
        )
    return None


def load() -> Any:
    """``torch_xla``.

    Raises:
        BackendUnavailable: it cannot be imported.
    """
    try:
        return importlib.import_module("torch_xla")
    except ImportError as error:
        raise BackendUnavailable("xla-tpu", f"torch_xla cannot be imported: {error}", _pair(_RUN)) from error


def has_ranks() -> bool:
    """Whether the runtime has been told that there are ranks: by torch_xla.launch, ``xla://``, or :func:`join`.

    That torch_xla is imported, or a tensor on its device, says nothing. Asked before the runtime has started, the
    second question would start it, and torch_xla.launch would then refuse.
    """
    native = getattr(sys.modules.get("torch_xla"), "_XLAC", None)  # not there while it is being imported
    return bool(
        native is not None and native._xla_runtime_is_initialized() and native._xla_get_replication_devices_count() > 0
    )


def join(topology: Topology) -> None:
    """Tell the runtime of this process that it is one of several on this host.

    As torch_xla does it for ``init_process_group("xla", init_method="xla://")``, for which it has no other public name.

    Raises:
        LaunchError: the processes of the launcher are not the ranks of the runtime.
    """
    from torch_xla import runtime
    from torch_xla._internal import pjrt

    pjrt.initialize_multiprocess(topology.local_rank, topology.nproc_per_node)
    if runtime.world_size() != topology.world_size:
        leave()
        raise LaunchError(
            f"{topology.environment} has started {topology.world_size} processes, but the runtime of XLA for "
            f"{runtime.device_type()} connects {runtime.world_size()} of them. On TPU hosts there is one process for "
            "each chip; on the CPU each process is alone. Start the script once on every host, with nproc_per_node "
            "or torch_xla.launch."
        )


def leave() -> None:
    """The opposite of :func:`join`. The runtime itself ends with the process."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    xm.set_replication(torch_xla.device(), [])


def _minor(full: str) -> str:
    return ".".join(full.split(".")[:2])


def _pair(xla: str) -> str:
    return f"`pip install 'torch=={_minor(xla)}.*' 'torch_xla[tpu]=={_minor(xla)}.*'` on a TPU host; see {_DOCUMENT}."
