"""torch.distributed: gloo, nccl, a native mpi, whatever else torch has registered, and composites of them."""

from __future__ import annotations

import atexit
import gc
import hashlib
import ipaddress
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupMember
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from idist import rendezvous
from idist.backends.base import Backend, Group, Pending, Work, accelerator
from idist.errors import ConfigError
from idist.topology import Topology

_OPS = {
    "SUM": dist.ReduceOp.SUM,
    "PRODUCT": dist.ReduceOp.PRODUCT,
    "MIN": dist.ReduceOp.MIN,
    "MAX": dist.ReduceOp.MAX,
    "AND": dist.ReduceOp.BAND,
    "OR": dist.ReduceOp.BOR,
}
_ARITHMETIC = frozenset({"SUM", "PRODUCT", "MIN", "MAX"})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int32, torch.int64})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_COMMON = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})

# What each library reduces by itself; a library that is not listed gets the types they all have.
# https://docs.pytorch.org/docs/stable/distributed.html#backends
_REDUCES: dict[str, dict[str, frozenset[torch.dtype]]] = {
    "gloo": {**dict.fromkeys(_ARITHMETIC, _INTEGERS | _FLOATS), "AND": _INTEGERS, "OR": _INTEGERS},
    "nccl": dict.fromkeys(_ARITHMETIC, _INTEGERS | _FLOATS),
}
# torch 2.13 renamed these.
_ALL_GATHER = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
# How the flight recorder calls types that have another name in Python.
_RECORDED_TYPES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "char": "int8",
    "byte": "uint8",
}
# https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
_FLIGHT_RECORDS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_USUAL_FLIGHT_RECORDS = "~/.cache/torch/comm_lib_trace_rank_"

_NOT_BACKENDS = frozenset({"undefined", "fake", "mpi4py"})  # the last is ours, under another name

_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""Those that somebody holds, as a model of DistributedDataParallel does its own."""

_GIVE_WAY_S = 0.05


# Registered before that of the runtime, and so called after it: what idist has started has ended then.
@atexit.register
def _give_way() -> None:
    """Let the threads of groups that outlive their context come to rest before the interpreter ends.

    What a collective held is given back by the thread that has done it, a moment after the rank goes on, and for that
    it needs Python's lock. Where it asks for it while the interpreter ends, the process is aborted: one exit in ten
    of a script that ends right after its last collective (torch 2.13, gloo, two ranks, a busy machine).
    """
    if _groups:
        gc.collect()  # a sharded model is full of cycles
    if _groups:
        time.sleep(_GIVE_WAY_S)


class C10d(Backend):
    """A torch process group, ours or one that the user made.

    Args:
        name: one backend of torch, or device types with one each: ``cpu:gloo,cuda:nccl``.
    """

    model_name = "native-dist"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        if not dist.is_available():
            return ()
        return tuple(name for name in dist.Backend.backend_list if name not in _NOT_BACKENDS)

    def __init__(self, name: str, *, adopted: bool = False) -> None:
        self.name = name
        self._torch_name = name
        self._by_device = _devices_of(name)
        if not adopted:  # what torch has started is right, whatever we think of it
            _check_capabilities(name, self._by_device)
        self._device = torch.device("cpu")
        self._server: dist.TCPStore | None = None
        self._one_node = False
        self._told_gloo = False
        self._started_ns = 0

    # Life

    def unavailable_reason(self) -> tuple[str, str] | None:
        for library in sorted(set(self._by_device.values())):
            built = getattr(dist, f"is_{library}_available", lambda: True)
            if not built():
                return f"this torch ({torch.__version__}) is built without it", _install_hint(library)
            types = dist.Backend.backend_capability.get(library, [])
            if "cpu" not in types and not self._accelerator_in(types):
                return (
                    f"there is no {' or '.join(types)} device",
                    f"Use backend {_cpu_backend()!r} for training on CPUs.",
                )
        return None

    @classmethod
    def attach(cls) -> Self | None:
        world = GroupMember.WORLD
        if world is None:
            return None
        config = dist.get_backend_config(world)
        libraries = {part.partition(":")[2] for part in config.split(",")}
        backend = cls(libraries.pop() if len(libraries) == 1 else config, adopted=True)
        backend.rank, backend.world_size = world.rank(), world.size()
        backend._device = backend._current_device()
        backend.timeout = _timeout_of(world, backend._device)
        backend._started_ns = time.time_ns()
        _groups.add(world)
        backend._one_node = _meets_on_loopback(dist.distributed_c10d._get_default_store())
        return backend

    @property
    def one_node(self) -> bool:
        return self._one_node or self.world_size == 1

    def start(
        self,
        topology: Topology,
        *,
        timeout: timedelta | None,
        device: torch.device | None,
        init_method: str | None = None,
        pg_options: Any = None,
        **options: Any,
    ) -> Topology:
        """See :meth:`Backend.start`.

        Args:
            init_method: ``tcp://host:port`` or ``file:///path/that/all/ranks/share``, instead of
                what the environment says.
            pg_options: passed on to ``torch.distributed.init_process_group``.
        """
        self._reject(options)

        def bind(placed: Topology) -> None:
            self._device = self._bind(placed, device)

        def connect(store: dist.Store, placed: Topology) -> None:
            # Some libraries make their connections at the first collective, by way of the store.
            store.set_timeout(timeout or rendezvous.DEFAULT_TIMEOUT)
            if placed.nnodes == 1:
                self._listen_on_loopback()
            dist.init_process_group(
                self._torch_name,
                store=store,
                rank=placed.rank,
                world_size=placed.world_size,
                timeout=timeout,
                pg_options=pg_options,
            )

        _, topology, self._server = rendezvous.join(
            topology, self.name, init_method=init_method, timeout=timeout, prepare=bind, connect=connect
        )
        self.rank, self.world_size = topology.rank, topology.world_size
        self.timeout = timeout
        self._started_ns = time.time_ns()
        _groups.add(self.world())
        return topology

    def stop(self) -> None:
        if GroupMember.WORLD is not None:
            dist.destroy_process_group()
        self._server = None
        if self._told_gloo:
            self._told_gloo = False
            os.environ.pop(_GLOO_INTERFACE, None)

    def _listen_on_loopback(self) -> None:
        """Where all ranks are on this node, nobody else need reach them.

        Gloo listens where the name of the host leads, for every group anew, also for those that the user makes; it
        can be told otherwise by an environment variable alone, so that is set as long as the group of all ranks lasts.
        """
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback and "gloo" in self._by_device.values() and _GLOO_INTERFACE not in os.environ:
            os.environ[_GLOO_INTERFACE] = loopback[0]
            self._told_gloo = True

    def device(self) -> torch.device:
        return self._device

    def device_for(self, tensor: Tensor) -> torch.device:
        composite = len(set(self._by_device.values())) > 1
        return tensor.device if composite and tensor.device.type in self._by_device else self._device

    # Primitives

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        libraries = set(self._by_device.values())
        return all(dtype in _REDUCES.get(library, _common_reductions()).get(op, ()) for library in libraries)

    # These two as torch.distributed has them, but for the checks that come before, which take 5 µs: ours are done.

    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        options = AllreduceOptions()
        options.reduceOp, options.asyncOp = _OPS[op], True  # type: ignore[assignment] # the kind of it, in the stubs
        return _process_group(group).allreduce([tensor], options)  # type: ignore[no-any-return]

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        options = AllgatherOptions()
        options.asyncOp = True
        gather = getattr(_process_group(group), _ALL_GATHER)
        return gather(_wire(out), _wire(tensor), options)  # type: ignore[no-any-return]

    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        return dist.broadcast(_wire(tensor), src, group.handle, async_op=True)  # type: ignore[no-any-return]

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: str, group: Group) -> Work:
        return _reduce_scatter_single(out, tensor, _OPS[op], group.handle, async_op=True)  # type: ignore[no-any-return]

    def all_to_all_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        return dist.all_to_all_single(_wire(out), _wire(tensor), group=group.handle, async_op=True)  # type: ignore[no-any-return]

    def gather_into(self, out: Tensor | None, tensor: Tensor, dst: int, group: Group) -> Work:
        parts = None if out is None else list(_wire(out).chunk(group.size))
        return dist.gather(_wire(tensor), parts, dst, group.handle, async_op=True)  # type: ignore[no-any-return]

    def scatter_into(self, out: Tensor, tensor: Tensor | None, src: int, group: Group) -> Work:
        parts = None if tensor is None else list(_wire(tensor).chunk(group.size))
        return dist.scatter(_wire(out), parts, src, group.handle, async_op=True)  # type: ignore[no-any-return]

    def barrier(self, group: Group) -> None:
        # Without device_ids a GPU library guesses the device from the rank, which is wrong for many placements.
        ids = None if self._device.type == "cpu" else [self._device.index]
        dist.barrier(group.handle, device_ids=ids)

    def new_group(self, ranks: tuple[int, ...], **options: Any) -> Any:
        options.setdefault("timeout", self.timeout)  # torch would take its default, not the world's
        if "mpi" in self._by_device.values() and dist.is_mpi_available():
            # A native MPI makes groups with the help of all ranks only.
            return dist.new_group(list(ranks), **options)
        if self.rank not in ranks:
            return GroupMember.NON_GROUP_MEMBER
        # Members only: a rank that has no part in the group need not take part in making it.
        with _names_groups(_next_name(ranks, self.rank)):
            group = dist.new_group(list(ranks), use_local_synchronization=True, **options)
        _groups.add(group)
        return group

    def world(self) -> Any:
        return GroupMember.WORLD

    def free_group(self, handle: Any) -> None:
        with suppress(ValueError):  # the user has destroyed it
            dist.destroy_process_group(handle)

    def ranks_of(self, handle: Any) -> tuple[int, ...] | None:
        if handle is None or handle == GroupMember.NON_GROUP_MEMBER:
            return ()
        return tuple(dist.get_process_group_ranks(handle)) if isinstance(handle, dist.ProcessGroup) else None

    # What is under way

    def store(self) -> dist.Store | None:
        return dist.distributed_c10d._get_default_store()

    def begun(self) -> dict[str, int]:
        return {name: begun_in(group) for group, name in list(dist.distributed_c10d._world.pg_names.items())}

    def pending(self) -> list[Pending] | None:
        """What torch's flight recorder has of the groups that there are; it does not record where it has no room."""
        groups = {name: group for group, name in list(dist.distributed_c10d._world.pg_names.items())}
        recorded = _recorded()
        return (
            None
            if recorded is None
            else [
                Pending(
                    _recorded_as(entry),
                    entry["collective_seq_id"],
                    name,
                    tuple(dist.get_process_group_ranks(groups[name])),
                )
                for entry in recorded
                if (name := entry["process_group"][0]) in groups
                and not entry["retired"]
                and entry["state"] != "completed"
                and entry["time_created_ns"] > self._started_ns
            ]
        )

    def traces_of_a_hang(self) -> str:
        if "nccl" not in self._by_device.values():
            return ""
        files = next(filter(None, map(os.environ.get, _FLIGHT_RECORDS)), _USUAL_FLIGHT_RECORDS)
        return (
            "  With TORCH_NCCL_DUMP_ON_TIMEOUT=1 torch writes at the timeout what each rank had under way, to files "
            f"{files}RANK; `torchfrtrace` compares them."
        )

    # Hooks

    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """DistributedDataParallel on this rank's device; ``options`` are its arguments."""
        if isinstance(model, DistributedDataParallel):
            raise ConfigError("the model is wrapped in DistributedDataParallel already; auto_model takes the bare one")
        check_whole(model)
        if sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        devices = {parameter.device for parameter in model.parameters()}
        if self._device.type != "cpu" and len(devices) == 1:
            options.setdefault("device_ids", [self._device])
        wrapped = DistributedDataParallel(model, **options)
        # A model that outlives the process group has the last reference to it. If that is the reducer's, in C++, the
        # group joins its threads with the GIL held, and hangs if one of them wants it just then; the reference of
        # Python lets go of the GIL. Attributes go in the order in which they came, so this one has to be the last.
        # https://github.com/pytorch/pytorch/issues/56297
        vars(wrapped)["process_group"] = vars(wrapped).pop("process_group")
        return wrapped

    def shard_model(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        """See :func:`idist.backends.fsdp.shard`, which takes ``options``."""
        from idist.backends.fsdp import shard

        group = GroupMember.WORLD
        assert group is not None, "a backend that is started or adopted has a group"
        return shard(model, DeviceMesh.from_group(group, self._device.type), **options)

    @contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        wrapped: Any = model  # a compiled one passes on what it is asked for
        if hasattr(wrapped, "no_sync"):
            with wrapped.no_sync():
                yield
        elif hasattr(wrapped, "set_requires_gradient_sync"):  # a sharded one
            wrapped.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                wrapped.set_requires_gradient_sync(True)
        else:
            yield

    def clip_grad_norm_(self, model: torch.nn.Module, max_norm: float, norm_type: float) -> Tensor:
        norm: Any = super().clip_grad_norm_(model, max_norm, norm_type)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        return whole

    # Devices

    def _accelerator_in(self, types: list[str]) -> torch.device | None:
        device = accelerator()
        return device if device is not None and device.type in types else None

    def _trains_on(self) -> str:
        """CPU where one library serves it, else the accelerator of the machine; a composite prefers that."""
        composite = len(set(self._by_device.values())) > 1
        if "cpu" in self._by_device and not composite:
            return "cpu"
        device = self._accelerator_in(list(self._by_device))
        return device.type if device else "cpu"

    def _current_device(self) -> torch.device:
        """For a group that the user made: the device that the user has chosen."""
        kind = self._trains_on()
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    def _bind(self, topology: Topology, requested: torch.device | None) -> torch.device:
        device = torch.device(self._trains_on()) if requested is None else requested
        if device.type == "cpu" and "cpu" in self._by_device:
            return device
        if device.type not in self._by_device or self._accelerator_in([device.type]) is None:
            usable = ", ".join(
                sorted(kind for kind in self._by_device if kind == "cpu" or self._accelerator_in([kind]))
            )
            raise ConfigError(
                f"device {str(device)!r} cannot be used with backend {self.name!r}; here it serves: {usable}"
            )
        if device.index is None:
            device = torch.device(device.type, device_index(device.type, topology))
        elif device.index >= torch.accelerator.device_count():
            raise ConfigError(f"device {str(device)!r} does not exist: {torch.accelerator.device_count()} visible")
        torch.accelerator.set_device_index(device.index)
        return device


def check_whole(model: torch.nn.Module) -> None:
    """Raises: ConfigError: each rank has a part of a parameter, of which the wrappers would take rank 0's."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"{name} is spread over ranks already, as tensor parallelism or fully_shard do: pass strategy='none' "
                "to auto_model. clip_grad_norm_, save and load take such a model as it is."
            )


def device_index(kind: str, topology: Topology) -> int:
    """One visible device is this process's own (Slurm and Kubernetes bind so); of several, take the local rank's."""
    count = torch.accelerator.device_count()
    if count == 1:
        return 0
    if topology.local_rank >= count:
        raise ConfigError(
            f"local rank {topology.local_rank} has no device: {topology.nproc_per_node} processes on this node, "
            f"{count} {kind} devices visible. Start at most {count} processes per node, or pass a device."
        )
    return topology.local_rank


def _next_name(ranks: tuple[int, ...], rank: int) -> str:
    """A name that all members find without each other: how many groups of these ranks there were, is their own count.

    It is kept in the store, which lives as long as the group of all ranks and keeps the keys of earlier groups.
    """
    kind = hashlib.sha1("_".join(map(str, ranks)).encode(), usedforsecurity=False).hexdigest()
    count = dist.distributed_c10d._get_default_store().add(f"idist/groups/{kind}/{rank}", 1)
    return f"idist {kind} {count}"


@contextmanager
def _names_groups(name: str) -> Iterator[None]:
    """Have torch give the next group this name.

    Its own depends on how many groups this rank is in. Members that are in more or fewer would wait for each
    other under different names for ever: https://github.com/pytorch/pytorch/issues/173608
    """
    module = dist.distributed_c10d
    theirs = module._hash_ranks_to_str
    module._hash_ranks_to_str = lambda ranks: name
    try:
        yield
    finally:
        module._hash_ranks_to_str = theirs


def _devices_of(name: str) -> dict[str, str]:
    """Device type -> library: ``cpu:gloo,cuda:nccl`` says it itself, else what torch says of the library."""
    known = C10d.names()
    if ":" not in name and "," not in name:
        if name not in dist.Backend.backend_list:  # also what only the user may start, such as the fake one
            raise ConfigError(f"torch has no backend {name!r}; it has {', '.join(known)}")
        return dict.fromkeys(dist.Backend.backend_capability.get(name, ["cpu"]), name)
    by_device: dict[str, str] = {}
    for part in name.split(","):
        device, colon, library = part.partition(":")
        if not colon or library not in known or device in by_device:
            raise ConfigError(
                f"backend {name!r}: {part!r} is not a device type, a colon and a backend, "
                f"each device once, as in 'cpu:gloo,cuda:nccl'; torch has {', '.join(known)}"
            )
        by_device[device] = library
    return by_device


def _check_capabilities(name: str, by_device: dict[str, str]) -> None:
    for device, library in by_device.items():
        serves = dist.Backend.backend_capability.get(library, [device])
        if device not in serves:
            raise ConfigError(f"backend {name!r}: {library} is for {' and '.join(serves)}, not for {device!r}")


def _timeout_of(world: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """What the user gave to the group; None where the library of this device does not tell."""
    with suppress(RuntimeError):
        options = getattr(world._get_backend(device), "options", None)
        return getattr(options, "_timeout", None)
    return None


def _process_group(group: Group) -> Any:
    return GroupMember.WORLD if group.handle is None else group.handle


def begun_in(group: Any) -> int:
    """How many operations this rank has begun in a group; 0 where its library does not count them."""
    with suppress(RuntimeError):
        libraries = {group._get_backend(device) for device in group._device_types}
        return sum(library._get_sequence_number_for_group() for library in libraries)
    return 0


def _recorded() -> list[dict[str, Any]] | None:
    """What torch's flight recorder holds, the oldest first; None where it does not record, or has no such function."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return None if dump is None else json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries")


def _recorded_as(entry: dict[str, Any]) -> str:
    name = entry["profiling_name"].rpartition(":")[2]
    if not entry["input_sizes"]:
        return str(name)
    dtype = entry["input_dtypes"][0].lower()
    return f"{name} of {_RECORDED_TYPES.get(dtype, dtype)} {'x'.join(map(str, entry['input_sizes'][0])) or 'scalar'}"


def _common_reductions() -> dict[str, frozenset[torch.dtype]]:
    return dict.fromkeys(_ARITHMETIC, _COMMON)


def _wire(tensor: Tensor) -> Tensor:
    """The same memory in a type that every library moves: bytes, where the type is not one they compute with."""
    if tensor.dtype in _INTEGERS or tensor.dtype in _FLOATS:
        return tensor
    return tensor.view(-1).view(torch.uint8)


def _meets_on_loopback(store: dist.Store) -> bool:
    """All ranks that reach a store on the loopback interface are on this node."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return False
    try:
        return ipaddress.ip_address(store.host).is_loopback
    except ValueError:
        return store.host == "localhost"


def _cpu_backend() -> str:
    return str(dist.get_default_backend_for_device("cpu"))


def _install_hint(library: str) -> str:
    builds = {"nccl": "Install a CUDA build of torch: https://pytorch.org/get-started/locally/"}
    return builds.get(library, "It needs a torch that was built from source with it.")
