"""``save`` and ``load``: checkpoints that are whole or not there, for any number of ranks.

A checkpoint is a folder with a number for its name. Tensors of the model and the optimizer are in the
format of :mod:`torch.distributed.checkpoint`, each by its name, so that sharded and plain models,
and any number of ranks, read what any other wrote. All else is in one file of :func:`torch.save`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch.optim import Optimizer

from idist import collectives
from idist.checkpoint import background, folders, random_states
from idist.collectives import Handle
from idist.errors import ConfigError
from idist.runtime import current
from idist.wire import Call

__all__ = ["load", "save"]


@overload
def save(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    loader: Any = None,
    keep: int | None = None,
    async_op: Literal[False] = False,
    **values: Any,
) -> Path: ...
@overload
def save(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    loader: Any = None,
    keep: int | None = None,
    async_op: Literal[True],
    **values: Any,
) -> Handle: ...
def save(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    loader: Any = None,
    keep: int | None = None,
    async_op: bool = False,
    **values: Any,
) -> Path | Handle:
    """Write a checkpoint. Every rank calls this.

    It gets its name when all of it is on the disk: whatever happens on the way, those that were there
    before stay as they are. The random states of Python, NumPy (if imported) and torch are part of it.

    Args:
        path: a folder for checkpoints, which all ranks share and one job at a time writes to; made if it is not there.
        model: the one that :func:`idist.auto_model` returned, or any other.
        optimizer: of parameters of ``model``.
        loader: the one that :func:`idist.auto_dataloader` returned, in the middle of an epoch or not.
        keep: how many checkpoints to keep, the newest ones; default: all.
        async_op: return a :class:`Handle` when all is copied to the memory of the CPU, and write while training goes
            on. Its ``wait()``, called on all ranks, returns the folder; the next save waits for it by itself, and so
            does :func:`idist.finalize`. Needs a process group of torch, if there are several ranks.
        **values: what else to save: objects with ``state_dict()`` (schedulers, a GradScaler), tensors, and plain
            data: numbers, strings, lists, dicts, ... Rank 0's count.

    Returns:
        The folder of this checkpoint, ``path/00000001`` for the first.

    Raises:
        ConfigError: an argument is wrong, or a value is not plain data. Nothing was written then.
        RuntimeError, OSError: this rank could not write. The checkpoints that were there are as they were.
        PeerFailed: on the other ranks, if one rank failed.

    Cost: some collectives of objects, besides those of :func:`torch.distributed.checkpoint.save`. Of tensors that
    all ranks have, rank 0 writes its own: ranks may differ in what they do not synchronise, and a mixture would be
    nobody's.

    Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
    """
    from idist.checkpoint import contents  # with all that torch needs for it, which is much

    context, folder = current(), Path(path)
    background.finish_latest(context)
    with collectives.together(context, Call.SAVE):
        folders.check_keep(keep)
        tensors, details = contents.of(model, optimizer)
        details["values"] = {name: contents.of_value(name, value) for name, value in values.items()}
        mine = {
            "random": random_states.get(context.backend),
            "loader": None if loader is None else loader.state_dict(),
        }
    details["by_rank"] = collectives.gather(mine)
    with collectives.together(context, Call.SAVE):
        begun = folders.begin(folder) if context.rank == 0 else None
    partial: Path = collectives.broadcast(begun)
    with collectives.together(context, Call.SAVE):
        folders.check_shared(partial)
        packed = folders.packed(details) if context.rank == 0 else b""
        if async_op:
            tensors = contents.copied(tensors)

    def write(group: Any) -> Path | None:
        contents.write(tensors, partial, context.rank, group)
        return folders.complete(partial, packed, keep) if context.rank == 0 else None

    if async_op:
        return background.begin(context, write)
    with collectives.together(context, Call.SAVE):
        done = write(None)
    named: Path = collectives.broadcast(done)
    return named


def load(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | None = None,
    loader: Any = None,
    missing_ok: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Put back what :func:`save` wrote. Every rank calls this, with models as they were made, wrapped or not.

    ::

        start = idist.load("checkpoints", model=model, optimizer=optimizer, missing_ok=True).get("epoch", 0)
        for epoch in range(start, epochs):
            ...
            idist.save("checkpoints", model=model, optimizer=optimizer, epoch=epoch + 1, keep=3)

    The number of ranks, the backend and the way the model is wrapped may be others than they were. With as many ranks
    as there were, each gets its random states back.

    Args:
        path: a folder of checkpoints, of which the newest is taken, or one checkpoint.
        model: into which to load, in place.
        optimizer: likewise; gradients are dropped.
        loader: likewise; the next pass goes on where it was.
        missing_ok: return an empty dict if there is no checkpoint.
        **values: objects with ``load_state_dict()``, by the names under which they were saved.

    Returns:
        All other values by their names, tensors in the memory of the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ConfigError: the checkpoint has not what was asked for, or does not fit it; says what differs. Nothing was
            loaded then.
        RuntimeError, OSError: this rank could not read a file of it. To go on from the checkpoint before, name that.
        PeerFailed: on the other ranks, if one rank failed.

    Nothing is unpickled but plain data and tensors: a checkpoint cannot run code.

    Cost: some collectives of objects, besides those of :func:`torch.distributed.checkpoint.load`.
    """
    from idist.checkpoint import contents

    context = current()
    with collectives.together(context, Call.LOAD):
        newest = folders.newest(Path(path), missing_ok) if context.rank == 0 else None
    found: Path | None = collectives.broadcast(newest)
    if found is None:
        return {}
    with collectives.together(context, Call.LOAD):
        details = folders.details(found)
        ours, theirs = details["by_rank"], details["values"]
        stateful = {name: value for name, value in values.items() if _has_state(name, value, theirs)}
        if loader is not None and ours[0]["loader"] is None:
            raise ConfigError(f"{found} was saved without a loader")
        tensors = contents.room(found, model, optimizer, details)
    with collectives.together(context, Call.LOAD):
        contents.read(tensors, found)
        contents.put_back(model, optimizer, tensors, details)
        for name, value in stateful.items():
            value.load_state_dict(theirs[name])
    same_ranks = len(ours) == context.world_size
    if loader is not None:
        loader.load_state_dict(ours[context.rank if same_ranks else 0]["loader"])
    if same_ranks:
        random_states.set(ours[context.rank]["random"], context.backend)
    return {name: value for name, value in theirs.items() if name not in stateful}


def _has_state(name: str, value: Any, saved: dict[str, Any]) -> bool:
    if not hasattr(value, "load_state_dict"):
        raise ConfigError(
            f"{name}={value!r}: load puts back objects with load_state_dict(); plain values are in what it returns"
        )
    if name not in saved:
        raise ConfigError(f"the checkpoint has no {name!r}; it has {', '.join(sorted(saved)) or 'no other values'}")
    return True
