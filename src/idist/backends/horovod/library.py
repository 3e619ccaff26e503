"""Horovod itself: is it here, what is it told, how does it end."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from idist.backends.base import accelerator
from idist.backends.c10d import device_index
from idist.backends.horovod.process_sets import ProcessSets
from idist.errors import BackendUnavailable, CollectiveMismatch, ConfigError, PeerFailed
from idist.topology import Topology

_DOCUMENT = "docs/backends/horovod.md of idist"
_BUILD = f'`pip install numpy "$(tools/horovod-wheel.sh)"` builds and installs it: see {_DOCUMENT}.'
_LONGEST_PAUSE_S = 0.001
WAITS: Counter[str] = Counter(waits=0)
"""How often this rank has begun to wait for Horovod."""


def installed() -> Path | None:
    """Where Horovod is, if this Python has one that was built for torch. Imports nothing of it."""
    spec = importlib.util.find_spec("horovod")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]
    return next((folder for folder in folders if any(folder.glob("torch/mpi_lib_v2*.so"))), None)


def problem() -> tuple[str, str] | None:
    """Why it cannot be used here, and what to do about it; ``None`` if it can."""
    folder = installed()
    if folder is None:
        return "Horovod is not installed", _BUILD
    built_for = json.loads((folder / "metadata.json").read_text()).get("pytorch")
    if built_for != torch.__version__:
        return f"this Horovod was built for torch {built_for}, and this is {torch.__version__}", _BUILD
    if importlib.util.find_spec("numpy") is None:  # without it, it fails in places, and hangs in others
        return "numpy is not installed, which Horovod needs and does not ask for", "`pip install numpy`"
    return None


def load() -> Any:
    """``horovod.torch``.

    Raises:
        BackendUnavailable: it cannot be imported, or has no Gloo.
    """
    try:
        hvd = importlib.import_module("horovod.torch")
        if hvd.gloo_built():
            return hvd
        reason = "this Horovod was built without Gloo"
    except (ImportError, AttributeError) as error:  # without its library it has no functions
        reason = f"Horovod cannot be imported: {error}"
    raise BackendUnavailable("horovod", reason, _BUILD)


def training_device(hvd: Any, requested: torch.device | None, placed: Topology | None) -> torch.device:
    """A CUDA device where Horovod was built for them and there is one, else the CPU; made the current one.

    Args:
        placed: of this process; ``None``: the user has chosen the device already.
    """
    here = accelerator()
    cuda = here if here is not None and here.type == "cuda" and hvd.nccl_built() else None
    device = requested or cuda or torch.device("cpu")
    if device.type == "cpu":
        return device
    if cuda is None or device.type != "cuda":
        why = "there is none" if hvd.nccl_built() else "this Horovod was built without NCCL"
        raise ConfigError(f"device {str(device)!r} cannot be used with backend 'horovod': {why}. {_BUILD}")
    if placed is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index is None:
        device = torch.device("cuda", device_index("cuda", placed))
    torch.cuda.set_device(device)
    return device


def await_all(hvd: Any, handles: Iterable[int], timeout: timedelta) -> None:
    """Return when all these calls of Horovod have ended, well or not.

    Horovod itself keeps a core busy while it waits and does not hear of Ctrl-C. Nor has it a timeout: its stall
    check sees nothing when it talks by Gloo, because it then looks through an empty list of ranks.
    https://github.com/horovod/horovod/blob/v0.28.1/horovod/common/gloo/gloo_controller.cc#L92

    Raises:
        PeerFailed: not in time.
    """
    WAITS["waits"] += 1
    deadline = time.monotonic() + timeout.total_seconds()
    for handle in handles:
        pause = _LONGEST_PAUSE_S / 16
        while not hvd.poll(handle):
            if time.monotonic() > deadline:
                raise PeerFailed(
                    f"a collective timed out: not all ranks joined it within {timeout.total_seconds():g} s. Did one "
                    "fail, end, or take another path through the script?"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def clear_errors(hvd: Any) -> Iterator[None]:
    """Horovod tells a disagreement and the end of another rank by one type, and says little of the second."""
    try:
        yield
    except hvd.HorovodInternalError as error:
        said = str(error)
        if said.startswith("Mismatched"):
            raise CollectiveMismatch(said) from error
        raise PeerFailed(
            "another rank failed, ended, or, as one that is stopped, did not answer in time; Horovod has told on "
            f"standard error what it has seen of it: {said}"
        ) from error


class HorovodWork:
    """A call of Horovod under way.

    Args:
        finish: gets what Horovod returns, once.
    """

    def __init__(
        self, hvd: Any, handle: int, timeout: timedelta, finish: Callable[[Any], object] | None = None
    ) -> None:
        self._hvd = hvd
        self._handle: int | None = handle
        self._timeout = timeout
        self._finish = finish

    def wait(self) -> None:
        """See :class:`idist.backends.base.Work`."""
        if self._handle is None:
            return
        await_all(self._hvd, [self._handle], self._timeout)
        handle, self._handle = self._handle, None
        with clear_errors(self._hvd):
            result = self._hvd.synchronize(handle)
        if self._finish is not None:
            self._finish(result)


class Session:
    """From ``hvd.init()`` to ``hvd.shutdown()``.

    Horovod is told by environment variables where it stands and how the ranks find each other, and
    looks at them whenever it makes a process set. They are set as long as the session lasts.
    horovodrun has set its own; but its server mixes up the addresses of one ``init()`` with those
    of the next, so each session has a server of its own, whoever started the processes.

    Args:
        store: where the ranks have met; all make the session at once.
        timeout: of every collective, if the user gave one.
    """

    def __init__(self, hvd: Any, store: dist.Store, topology: Topology, timeout: timedelta | None) -> None:
        self._hvd = hvd
        self._server = _serve(topology) if topology.rank == 0 else None
        if self._server is not None:
            store.set("horovod", f"{socket.getfqdn()} {self._server.server_port}")
        host, port = store.get("horovod").decode().split()
        if topology.nnodes == 1:
            host = "127.0.0.1"
        told = _place(store, topology) | {"HOROVOD_GLOO_RENDEZVOUS_ADDR": host, "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
        if timeout is not None:  # of its connections: a process that was stopped answers nobody
            told["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(math.ceil(timeout.total_seconds()))
        told |= _defaults(topology, os.environ)
        self._before = {name: os.environ.get(name) for name in told}
        self._store_server: dist.TCPStore | None = None
        self._process_sets: ProcessSets | None = None
        os.environ.update(told)
        try:
            hvd.init()
        except BaseException:
            self.end()
            raise

    def keep(self, store_server: dist.TCPStore | None, process_sets: ProcessSets) -> None:
        """What ends with this session."""
        self._store_server = store_server
        self._process_sets = process_sets

    def end(self) -> None:
        """End Horovod, on all ranks; those that are in a collective get an error."""
        if self._process_sets is not None:
            self._process_sets.end(linger=self._store_server is not None)
        self._hvd.shutdown()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._store_server = None
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(topology: Topology) -> Any:
    """Horovod's own server, where its ranks tell each other their addresses; on the loopback interface of one node."""
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer(("127.0.0.1" if topology.nnodes == 1 else "", 0), RendezvousHandler, 0)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), name="idist horovod server", daemon=True).start()
    return server


def _place(store: dist.Store, topology: Topology) -> dict[str, str]:
    """Where this rank stands. Its cross rank counts only the nodes that have a process with its local rank."""
    store.set(f"horovod/{topology.rank}", f"{topology.node_rank} {topology.local_rank}")
    places = [store.get(f"horovod/{rank}").decode().split() for rank in range(topology.world_size)]
    nodes = sorted(int(node) for node, local_rank in places if int(local_rank) == topology.local_rank)
    told = {
        "RANK": topology.rank,
        "SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_SIZE": topology.nproc_per_node,
        "CROSS_RANK": nodes.index(topology.node_rank),
        "CROSS_SIZE": len(nodes),
        "HOSTNAME": f"node{topology.node_rank}",
        "CONTROLLER": "gloo",
        "CPU_OPERATIONS": "gloo",
    }
    return {f"HOROVOD_{name}": str(value) for name, value in told.items()}


def _defaults(topology: Topology, env: Mapping[str, str]) -> dict[str, str]:
    wanted = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    if "GLOO_SOCKET_IFNAME" in env:
        wanted["HOROVOD_GLOO_IFACE"] = env["GLOO_SOCKET_IFNAME"]
    elif topology.nnodes == 1 and "lo" in {name for _, name in socket.if_nameindex()}:
        wanted["HOROVOD_GLOO_IFACE"] = "lo"
    return {name: value for name, value in wanted.items() if name not in env}
