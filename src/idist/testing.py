"""Run a function on N ranks, in threads or in processes: for your tests, and for ours.

Threads take milliseconds: every rank is a thread of this process with a context of its own, and
the tensors really are exchanged. They share what threads share: the global random state, the
current CUDA device, ``os.environ``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from idist import runtime
from idist.backends.base import DONE, Backend, Group, Work
from idist.errors import ConfigError, PeerFailed
from idist.parallel import Parallel
from idist.runtime import Context
from idist.topology import Topology

__all__ = ["run_processes", "run_threads"]

R = TypeVar("R")

_GRACE_S = 1.0
"""For a rank whose collective is over time to say so."""


def run_threads(
    fn: Callable[..., R],
    world_size: int,
    *args: Any,
    timeout: float = 30.0,
    verify: bool = True,
    warn_after: float | None = None,
    **kwargs: Any,
) -> list[R]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` ranks that are threads of this process.

    Args:
        timeout: in seconds, of every collective and of the whole call.
        verify: tensor collectives check that the ranks agree.
        warn_after: seconds; as of :func:`idist.initialize`.

    Returns:
        What ``fn`` returned, by rank.

    Raises:
        Exception: what the first rank to fail raised; the other ranks end with PeerFailed.
        TimeoutError: a rank did not end in time.
    """
    hub = _Hub(world_size, timeout)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        backend = Threads(hub, rank)
        topology = Topology("threads", rank, world_size, rank, world_size, node_rank=0, nnodes=1)
        context = Context(backend, topology, owned=True, verify=verify)
        with runtime.thread_context(context):
            context.begin_to_watch(warn_after)
            try:
                results[rank] = fn(*args, **kwargs)
            except BaseException as error:
                runtime.explain(error)
                failures.append((rank, error))
                hub.abort(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout + _GRACE_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    if failures:
        raise failures[0][1]
    late = [thread.name for thread in threads if thread.is_alive()]
    if late:
        hub.abort("the time is over")
        raise TimeoutError(f"{', '.join(late)} did not end within {timeout} s")
    return results


def run_processes(
    fn: Callable[..., R], world_size: int, *args: Any, backend: str = "auto", timeout: float = 60.0, **kwargs: Any
) -> list[R]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` ranks that are processes of this machine.

    Args:
        backend: as of :class:`idist.Parallel`.
        timeout: in seconds, of every collective.

    Returns:
        What ``fn`` returned, by rank.

    Raises:
        WorkerFailed: a rank failed; tells which one first and why.
    """
    with Parallel(backend=backend, nproc_per_node=world_size, timeout=timeout) as parallel:
        return parallel.run(_without_local_rank, fn, args, kwargs)


def _without_local_rank(local_rank: int, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    return fn(*args, **kwargs)


class _Hub:
    """Where threads put what they send: one table and one barrier for each group of ranks."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, ...], tuple[threading.Barrier, list[Any]]] = {}
        self._aborted: str | None = None
        self.store = dist.HashStore()

    def exchange(self, group: Group, value: Any) -> list[Any]:
        """Every member's value. Nobody goes on before all have read, so senders may reuse their memory."""
        with self._lock:
            if self._aborted is not None:
                raise PeerFailed(self._aborted)
            barrier, table = self._tables.setdefault(group.ranks, (threading.Barrier(group.size), [None] * group.size))
        table[group.index] = value
        try:
            barrier.wait(self.timeout)
            values = [item.clone() if isinstance(item, Tensor) else item for item in table]
            barrier.wait(self.timeout)
        except threading.BrokenBarrierError:
            self.abort(f"a rank of {group.ranks} did not come within {self.timeout} s")
            raise PeerFailed(str(self._aborted)) from None
        return values

    def abort(self, why: str) -> None:
        with self._lock:
            self._aborted = self._aborted or why
            for barrier, _ in self._tables.values():
                barrier.abort()


class Threads(Backend):
    """A backend whose ranks are threads. It has the primitives that every backend must have, and no others."""

    model_name = "threads"
    rank_is_thread = True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ()

    def __init__(self, hub: _Hub, rank: int) -> None:
        self.name = "threads"
        self.rank, self.world_size = rank, hub.world_size
        self.timeout = timedelta(seconds=hub.timeout)
        self._hub = hub
        self._begun: Counter[str] = Counter()

    def unavailable_reason(self) -> tuple[str, str] | None:
        return None

    def start(
        self, topology: Topology, *, timeout: timedelta | None, device: torch.device | None, **options: Any
    ) -> Topology:
        raise ConfigError("ranks that are threads come from idist.testing.run_threads")

    def stop(self) -> None:
        return None

    def device(self) -> torch.device:
        return torch.device("cpu")

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        return False

    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        raise AssertionError("never called: reduces() says no")

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        parts = self._exchange(group, tensor)
        sizes = {part.numel() for part in parts}
        if len(sizes) > 1:
            raise RuntimeError(f"ranks gathered {sorted(sizes)} elements")
        torch.cat(parts, out=out)
        return DONE

    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        parts = self._exchange(group, tensor)
        tensor.copy_(parts[group.ranks.index(src)])
        return DONE

    def barrier(self, group: Group) -> None:
        self._exchange(group, None)

    def _exchange(self, group: Group, value: Any) -> list[Any]:
        self._begun["all" if group.size == self.world_size else ",".join(map(str, group.ranks))] += 1
        return self._hub.exchange(group, value)

    def store(self) -> dist.Store:
        return self._hub.store

    def begun(self) -> dict[str, int]:
        return dict(self._begun)

    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """Rank 0's weights and buffers, and gradients averaged one by one as backward makes them."""
        self._reject(options)
        everyone = Group(tuple(range(self.world_size)), self.rank)
        for tensor in [*model.parameters(), *model.buffers()]:
            self.broadcast_(tensor.detach(), 0, everyone)

        def average(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.copy_(torch.stack(self._exchange(everyone, parameter.grad)).mean(0))

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)
        return _Replica(model)


class _Replica(torch.nn.Module):
    """A model of one thread, where DistributedDataParallel would be: the original is ``module``."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
