"""Groups of ranks: made once for each set of ranks, cached in the context, freed with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from idist.backends.base import Group
from idist.errors import ConfigError
from idist.runtime import Context, current


def new_group(ranks: Sequence[int], **options: Any) -> Any:
    """A group of some ranks, for the ``group`` argument of all collectives and for the backend's own library.

    The same ranks give the same group again; options make a new one each time. Only members need
    to call this. Collectives of a group go through its ranks in ascending order.

    Args:
        ranks: global ranks, each once, in any order.
        **options: passed on to the backend, for example ``timeout`` of torch's ``new_group``.

    Returns:
        What the backend calls a group, a ``ProcessGroup`` of torch (the world's, for all ranks),
        its ``NON_GROUP_MEMBER`` on other ranks, the tuple of ranks where it has no groups of its own.

    Raises:
        ConfigError: not a sequence of different ranks of this job.

    Cost: no collective; torch's groups take a few round trips to the store when they are first used.
    """
    context = current()
    members = _checked(ranks, context.world_size)
    if options:
        handle = context.backend.new_group(members, **options)
        if context.rank in members:
            context.extra_groups.append(handle)
        return handle
    group = _cached(context, members)
    return context.backend.world() if group is context.everyone else group.handle


def resolve(context: Context, group: Any) -> Group:
    """What the user gave as ``group``: nothing for all ranks, ranks, or a handle.

    Raises:
        ConfigError: none of these.
    """
    if group is None:
        return context.everyone
    if isinstance(group, Group):
        return group
    if isinstance(group, (list, tuple, range)):
        given = group if isinstance(group, range) else tuple(group)  # a range of thousands is a key as it is
        # Equal to ranks are True and 1.0 as well, and a list is not even a key.
        is_key = isinstance(given, range) or set(map(type, given)) == {int}
        known = context.known_groups.get(given) if is_key else None
        if known is None:
            known = context.known_groups[given] = _cached(context, _checked(group, context.world_size))
        return known
    if (ours := context.own_handles.get(id(group))) is not None:
        return ours
    ranks = context.backend.ranks_of(group)
    if ranks is None:
        raise ConfigError(f"group must be a list of ranks or what idist.new_group() returned, got {group!r}")
    return Group(ranks, ranks.index(context.rank) if context.rank in ranks else -1, group)


def _cached(context: Context, ranks: tuple[int, ...]) -> Group:
    group = context.groups.get(ranks)
    if group is None:
        group = context.groups[ranks] = _make(context, ranks)
    return group


def _make(context: Context, ranks: tuple[int, ...]) -> Group:
    if ranks == context.everyone.ranks:
        return context.everyone
    index = ranks.index(context.rank) if context.rank in ranks else -1
    group = Group(ranks, index, context.backend.new_group(ranks))
    if index >= 0:
        context.own_handles[id(group.handle)] = group
    return group


def _checked(ranks: Any, world_size: int) -> tuple[int, ...]:
    is_ranks = isinstance(ranks, (list, tuple, range)) and all(type(rank) is int for rank in ranks)
    if not is_ranks or not ranks or len(set(ranks)) != len(ranks):
        raise ConfigError(f"a group is a list of different integer ranks, at least one, got {ranks!r}")
    outside = [rank for rank in ranks if not 0 <= rank < world_size]
    if outside:
        raise ConfigError(f"rank {outside[0]} is not in this job: ranks go from 0 to {world_size - 1}, got {ranks!r}")
    return tuple(sorted(ranks))
