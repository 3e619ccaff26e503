"""torch's process group over MPI: every operation is one nonblocking call of MPI, or a few.

A subclass of ``dist.ProcessGroup`` is the whole group, so whatever torch does by way of groups
works on it: DDP, FSDP2, DeviceMesh, functional collectives, checkpoints, object collectives.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from idist.backends.mpi import datatypes
from idist.backends.mpi.datatypes import LARGEST_COUNT, elements, message
from idist.backends.mpi.library import departures
from idist.backends.mpi.work import MpiWork, Together, Watch
from idist.errors import ConfigError

NAME = "mpi4py"
"""What torch calls this backend; it keeps the name ``mpi`` for its own."""

_TAGS = 2**15 - 1


class MpiGroup(dist.ProcessGroup):
    """Some ranks, with a communicator of their own.

    Args:
        comm: of the members, in the order of the group; it is freed with the group.
        ranks: their global ranks.
        timeout: of every operation.
    """

    def __init__(self, comm: Any, ranks: Sequence[int], timeout: timedelta, name: str) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self._comm = comm
        self._name = name
        self._watch = Watch(name, ranks, timeout, departures(MPI))
        self._order = threading.Lock()
        self._latest: Callable[[], MpiWork | None] = lambda: None
        self._last_tag = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)

    @property
    def begun(self) -> int:
        """How many operations this rank has begun."""
        return self._watch.begun

    # What torch asks a group for

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def set_timeout(self, timeout: timedelta) -> None:
        self._watch.seconds = timeout.total_seconds()

    def shutdown(self) -> None:
        if self._comm != MPI.COMM_NULL:
            self._comm.Free()

    abort = shutdown

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        op = _op_of(opts)
        staged = [_flat(tensor) for tensor in tensors]
        calls = [
            partial(self._comm.Iallreduce, MPI.IN_PLACE, elements(piece), datatypes.reduction(op, piece.dtype))
            for flat in staged
            for piece in datatypes.pieces(flat)
        ]
        landing = _landing(tensors, staged, self._averaging(op, staged))
        return self._collective("all_reduce", calls, tensors, landing, staged)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> MpiWork:
        op, root, [tensor] = _op_of(opts), opts.rootRank, tensors
        flat = _flat(tensor)
        calls = [self._reduce_to(root, piece, op) for piece in datatypes.pieces(flat)]
        staged = [flat] if self.rank() == root else []
        landing = _landing(tensors, staged, self._averaging(op, staged))
        return self._collective("reduce", calls, tensors, landing, flat)

    def _reduce_to(self, root: int, piece: Tensor, op: Any) -> Callable[[], Any]:
        """Reduce ``piece`` on the root, in place there."""
        given = elements(piece)
        sent, received = (MPI.IN_PLACE, given) if self.rank() == root else (given, None)
        return partial(self._comm.Ireduce, sent, received, datatypes.reduction(op, piece.dtype), root)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> MpiWork:
        op, out, flat = _op_of(opts), _flat(output, fill=False), _flat(given)
        flat = _apart(flat, out)
        _check_size("reduce_scatter", flat.numel(), out.numel() * self.size())
        average = self._averaging(op, [out])
        if out.numel() <= LARGEST_COUNT:
            blocks = elements(flat, self.size()), elements(out)
            call = partial(self._comm.Ireduce_scatter_block, *blocks, datatypes.reduction(op, flat.dtype))
            return self._collective("reduce_scatter", [call], [output], _landing([output], [out], average), (out, flat))
        rows = flat.clone().chunk(self.size())  # more than one call can count: the part of each rank on its own
        calls = [self._reduce_to(rank, piece, op) for rank, row in enumerate(rows) for piece in datatypes.pieces(row)]

        def finish() -> None:
            out.copy_(rows[self.rank()])
            average()

        return self._collective("reduce_scatter", calls, [output], _landing([output], [out], finish), (out, rows))

    def reduce_scatter(self, outputs: list[Tensor], given: list[list[Tensor]], opts: Any = None) -> MpiWork:
        [output], [parts] = outputs, given
        return self.reduce_scatter_single(output, _joined(parts), opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> MpiWork:
        pairs = zip(outputs, given, strict=True)
        return self._together([self.reduce_scatter_single(out, tensor, opts) for out, tensor in pairs], outputs)

    # Movements

    def broadcast(self, tensors: list[Tensor], opts: Any) -> MpiWork:
        [tensor] = tensors
        flat = _flat(tensor)
        root = opts.rootRank + opts.rootTensor
        calls = [partial(self._comm.Ibcast, message(flat), root)]
        return self._collective("broadcast", calls, tensors, _landing(tensors, [flat]), flat)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> MpiWork:
        out, flat = _flat(output, fill=False), _flat(given)
        _check_size("all_gather", out.numel(), flat.numel() * self.size())
        flat = _apart(flat, out)  # FSDP gathers into what it gathers from
        calls = [partial(self._comm.Iallgather, message(flat), message(out, self.size()))]
        return self._collective("all_gather", calls, [output], _landing([output], [out]), (out, flat))

    def allgather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> MpiWork:
        [parts], [tensor] = outputs, given
        flat = _flat(tensor)
        gathered = flat.new_empty(flat.numel() * self.size())
        calls = [partial(self._comm.Iallgather, message(flat), message(gathered, self.size()))]
        return self._collective("all_gather", calls, outputs, lambda: _deal(gathered, parts), (gathered, flat))

    def allgather_coalesced(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> MpiWork:
        by_tensor = zip(*outputs, strict=True) if len(outputs) == self.size() != len(given) else outputs
        pairs = zip(by_tensor, given, strict=True)
        return self._together([self.allgather([list(parts)], [tensor]) for parts, tensor in pairs], outputs)

    def all_gather_single_coalesced(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> MpiWork:
        pairs = zip(outputs, given, strict=True)
        return self._together([self.all_gather_single(out, tensor) for out, tensor in pairs], outputs)

    def gather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any) -> MpiWork:
        [tensor], root = given, opts.rootRank
        flat = _flat(tensor)
        if self.rank() != root:
            return self._collective("gather", [partial(self._comm.Igather, message(flat), None, root)], [], None, flat)
        gathered = flat.new_empty(flat.numel() * self.size())
        calls = [partial(self._comm.Igather, message(flat), message(gathered, self.size()), root)]
        return self._collective("gather", calls, outputs, lambda: _deal(gathered, outputs[0]), (gathered, flat))

    def scatter(self, outputs: list[Tensor], given: list[list[Tensor]], opts: Any) -> MpiWork:
        [output], root = outputs, opts.rootRank
        out = _flat(output, fill=False)
        parts = _joined(given[0]) if self.rank() == root else None
        sent = None if parts is None else message(parts, self.size())
        calls = [partial(self._comm.Iscatter, sent, message(out), root)]
        return self._collective("scatter", calls, outputs, _landing(outputs, [out]), (out, parts))

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> MpiWork:
        out, flat = _flat(output, fill=False), _flat(given)
        flat = _apart(flat, out)
        received = self._shares("output", output, output_splits)
        sent = self._shares("input", given, input_splits)
        calls = self._exchange(out, received, flat, sent)
        work = self._collective("all_to_all", calls, [output], _landing([output], [out]), (out, flat))
        work.start_all()
        return work

    def alltoall(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> MpiWork:
        flat = _joined(given)
        out = flat.new_empty(sum(tensor.numel() for tensor in outputs))
        width = flat.element_size()
        received, sent = ([tensor.numel() * width for tensor in tensors] for tensors in (outputs, given))
        calls = self._exchange(out, received, flat, sent)
        work = self._collective("all_to_all", calls, outputs, lambda: _deal(out, outputs), (out, flat))
        work.start_all()
        return work

    def _shares(self, which: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        """The bytes for each rank, of a tensor that is split along its first dimension."""
        size, rows = self.size(), tensor.shape[0] if tensor.ndim else 0
        if not splits:
            _check_size(f"all_to_all: the first dimension of the {which} of {size} ranks", rows % size, 0)
            splits = [rows // size] * size
        _check_size(f"all_to_all: the number of {which} splits", len(splits), size)
        _check_size(f"all_to_all: the sum of the {which} splits", sum(splits), rows)
        row = tensor[0].numel() * tensor.element_size() if rows else 0
        return [split * row for split in splits]

    def _exchange(self, out: Tensor, received: list[int], given: Tensor, sent: list[int]) -> list[Any]:
        """Give every rank its share of the bytes, and get one of each."""
        ends = max(sum(received), sum(sent))
        if ends <= LARGEST_COUNT:
            told = [datatypes.memory(given), sent, _starts(sent), MPI.BYTE]
            return [
                partial(self._comm.Ialltoallv, told, [datatypes.memory(out), received, _starts(received), MPI.BYTE])
            ]
        # More than MPI can count: message by message, with a tag that users cannot have.
        into, of = (tensor.view(torch.uint8) for tensor in (out, given))
        tag = self._last_tag
        takes = [partial(self._comm.Irecv, message(part), rank, tag) for rank, part in enumerate(into.split(received))]
        return takes + [partial(self._comm.Isend, message(part), rank, tag) for rank, part in enumerate(of.split(sent))]

    # Point to point

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> MpiWork:
        [tensor] = tensors
        flat = _flat(tensor)
        return self._work(
            "send", [partial(self._comm.Isend, message(flat), dst, self._checked(tag))], tensors, None, flat
        )

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> MpiWork:
        [tensor] = tensors
        flat = _flat(tensor)  # a shorter message leaves the rest as it is
        call = partial(self._comm.Irecv, message(flat), src, self._checked(tag))
        return self._work("recv", [call], tensors, _landing(tensors, [flat]), flat)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        [tensor] = tensors
        flat = _flat(tensor)
        call = partial(self._comm.Irecv, message(flat), MPI.ANY_SOURCE, self._checked(tag))
        return self._work("recv", [call], tensors, _landing(tensors, [flat]), flat, [MPI.Status()])

    def _checked(self, tag: int) -> int:
        if not 0 <= tag < self._last_tag:
            raise ConfigError(f"a tag is 0 to {self._last_tag - 1} with this MPI, got {tag}")
        return tag

    # The rest

    def barrier(self, opts: Any = None) -> MpiWork:
        return self._collective("barrier", [self._comm.Ibarrier], [])

    def _collective(
        self,
        what: str,
        calls: Sequence[Callable[[], Any]],
        tensors: Any,
        finish: Callable[[], Any] | None = None,
        keep: Any = None,
    ) -> MpiWork:
        """All ranks make the calls of a communicator in one order: those of an operation before those of the next."""
        with self._order:
            before = self._latest()
            if before is not None:
                before.start_all()
            work = self._work(what, calls, tensors, finish, keep)
            self._latest = weakref.ref(work)
        return work

    def _work(
        self,
        what: str,
        calls: Sequence[Callable[[], Any]],
        tensors: Any,
        finish: Callable[[], Any] | None = None,
        keep: Any = None,
        statuses: Sequence[Any] | None = None,
    ) -> MpiWork:
        return MpiWork(self._watch, what, calls, tensors, finish=finish, keep=keep, statuses=statuses)

    def _together(self, works: Sequence[MpiWork], tensors: Any) -> MpiWork:
        return Together(self._watch, f"one of {len(works)} operations", works, tensors)

    def _averaging(self, op: Any, tensors: Sequence[Tensor]) -> Callable[[], None]:
        def divide() -> None:
            for tensor in tensors:
                whole = not (tensor.is_floating_point() or tensor.is_complex())
                tensor.div_(self.size(), rounding_mode="trunc" if whole else None)

        return divide if op == dist.ReduceOp.AVG else lambda: None

    # Names that torch 2.13 replaced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _op_of(opts: Any) -> Any:
    return dist.ReduceOp.SUM if opts is None else opts.reduceOp


def _flat(tensor: Tensor, *, fill: bool = True) -> Tensor:
    """The tensor's own memory in one dimension; where that cannot be, a copy, or without ``fill`` room for one.

    Raises:
        ConfigError: MPI cannot read the memory of this tensor.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ConfigError(
            f"backend mpi moves dense tensors in the memory of the CPU, got a {tensor.layout} tensor on "
            f"{tensor.device}; tensor.to_dense() and .cpu() make one, and idist's own collectives move it by themselves"
        )
    plain = tensor.detach()
    if plain.is_contiguous() and not (plain.is_conj() or plain.is_neg()):
        return plain.view(-1)
    return plain.reshape(-1).resolve_conj().resolve_neg().contiguous() if fill else _room(plain)


def _apart(flat: Tensor, out: Tensor) -> Tensor:
    """The input, or a copy where the output overlaps it: MPI refuses those."""
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (flat, out)), strict=True)
    return flat.clone() if max(starts) < min(ends) else flat


def _room(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype)


def _landing(
    tensors: Sequence[Tensor], staged: Sequence[Tensor], first: Callable[[], Any] | None = None
) -> Callable[[], None]:
    """What to do at the end: ``first``, and then bring what came elsewhere to where it belongs."""

    def land() -> None:
        if first is not None:
            first()
        for tensor, flat in zip(tensors, staged, strict=False):
            if tensor.data_ptr() != flat.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))

    return land


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_flat(tensor) for tensor in tensors])


def _deal(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def _starts(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts[:-1], initial=0))


def _check_size(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise ConfigError(f"{what}: expected {expected}, got {got}")


def _create(opts: Any, options: Any) -> MpiGroup:
    """What torch calls on the members of a new group.

    Raises:
        RuntimeError: not all of them come to make it, in time.
    """
    ranks = list(opts.global_ranks_in_group) or list(range(opts.group_size))
    _meet(opts.store, ranks, opts.timeout)
    world = MPI.COMM_WORLD
    if len(ranks) == world.Get_size():
        comm = world.Dup() if ranks == sorted(ranks) else world.Split(0, opts.group_rank)
    else:
        members = world.Get_group().Incl(ranks)
        comm = world.Create_group(members, zlib.crc32(opts.group_id.encode()) % _TAGS)
        members.Free()
    return MpiGroup(comm, ranks, opts.timeout, opts.group_id)


def _meet(store: dist.Store, ranks: Sequence[int], timeout: timedelta) -> None:
    """MPI makes communicators without any timeout: see first that all members are there."""
    if store.add("idist/came", 1) == len(ranks):
        store.set("idist/all", "")
    try:
        store.wait(["idist/all"], timeout)
    except dist.DistError as error:
        raise RuntimeError(
            f"{store.add('idist/came', 0)} of the {len(ranks)} ranks of the group {ranks} came to make it "
            f"in {timeout.total_seconds():.0f} s"
        ) from error


dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
