"""The registry of backends: the one place, beside a backend's own file, where names are known.

Another package adds a backend with an entry point of the group ``idist.backends`` that names a
subclass of :class:`idist.backends.base.Backend`.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import torch.distributed as dist

from idist.backends.base import Backend, accelerator
from idist.backends.c10d import C10d
from idist.backends.horovod import Horovod
from idist.backends.mpi import Mpi
from idist.backends.serial import Serial
from idist.backends.xla import Xla
from idist.errors import BackendUnavailable, ConfigError, close_match

__all__ = [
    "BUILTIN",
    "Backend",
    "available",
    "classes",
    "create",
    "has_hvd_support",
    "has_native_dist_support",
    "has_xla_support",
]

AUTO = "auto"

BUILTIN: tuple[type[Backend], ...] = (Serial, Mpi, Xla, C10d, Horovod)
"""Ours. ``import idist`` looks at no other package: :func:`classes` does, when a backend is asked for."""


has_native_dist_support = dist.is_available()
has_xla_support = Xla.installed()
has_hvd_support = Horovod.installed()


@cache
def classes() -> tuple[type[Backend], ...]:
    """All backend classes: ours, then those of installed packages. Of one name, the first counts."""
    return (*BUILTIN, *filter(None, map(_load, entry_points(group="idist.backends"))))


def _load(entry: EntryPoint) -> type[Backend] | None:
    """What another package offers; one that cannot be imported must not keep us from all the others."""
    try:
        cls = entry.load()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if isinstance(cls, type) and issubclass(cls, Backend):
            return cls
        problem = f"{cls!r} is not a subclass of idist.backends.Backend"
    package = f" of {entry.dist.name}" if entry.dist else ""
    warnings.warn(f"the backend {entry.name!r}{package} is left out: {problem}", RuntimeWarning, stacklevel=2)
    return None


def create(name: str) -> Backend:
    """A backend, not yet started, that can be used here.

    Args:
        name: as in the table of the documentation, ``"auto"`` for what suits this machine, or a
            composite such as ``cpu:gloo,cuda:nccl``.

    Raises:
        ConfigError: no backend has this name.
        BackendUnavailable: it exists, but not here; the message says why and what to do.
    """
    if not isinstance(name, str):
        raise ConfigError(f"backend must be a string or None, got {name!r}")
    if name == AUTO:
        name = dist.get_default_backend_for_device(accelerator() or "cpu")
    if name in Serial.names():
        raise ConfigError(f"backend {name!r} is what runs when nothing is initialised: pass None instead")
    backend = _find(name)
    reason = backend.unavailable_reason()
    if reason is not None:
        raise BackendUnavailable(name, *reason)
    return backend


def available() -> tuple[str, ...]:
    """The names that :func:`create` accepts on this machine, composites aside."""
    names = [(name, cls) for cls in classes() if cls is not Serial for name in cls.names()]
    return tuple(name for name, cls in names if cls(name).unavailable_reason() is None)


def _find(name: str) -> Backend:
    parts = {part.partition(":")[2] or part for part in name.split(",")}
    for cls in classes():
        if parts <= set(cls.names()):
            return cls(name)
    known = [known for cls in classes() for known in cls.names()]
    unknown = sorted(parts - set(known))[0] if parts - set(known) else name
    raise ConfigError(
        f"backend {unknown!r} is unknown; available here: {', '.join(available())}.{_advice(unknown, known)}"
    )


def _advice(unknown: str, known: list[str]) -> str:
    """The closest name, and why it would not do either: nobody should have to ask twice."""
    closest = close_match(unknown, known)
    if closest is None:
        return ""
    reason = _find(closest).unavailable_reason()
    return f" Did you mean {closest!r}{f' (not usable: {reason[0]})' if reason else ''}?"
