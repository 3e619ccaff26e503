"""Checkpoints on the disk: folders with numbers, each whole or not there. Rank 0 alone writes here."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from idist.errors import ConfigError

_DETAILS = "details.pt"
_DIGITS = 8
_PARTIAL = ".partial"


def check_keep(keep: int | None) -> None:
    """Raises: ConfigError: not a number of checkpoints, or none at all."""
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ConfigError(f"keep is the number of checkpoints to keep, at least 1, or None for all; got {keep!r}")


def begin(folder: Path) -> Path:
    """Make a place for what is to become the next checkpoint."""
    if _is_checkpoint(folder):
        raise ConfigError(f"{folder} is itself a checkpoint; save takes the folder around it, {folder.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    number = max(map(int, _names(folder)), default=0) + 1
    partial = folder.absolute() / f".{number:0{_DIGITS}}.{secrets.token_hex(4)}{_PARTIAL}"
    partial.mkdir()
    return partial


def check_shared(partial: Path) -> None:
    """Raises: ConfigError: what rank 0 has made cannot be seen here."""
    if not partial.is_dir():
        raise ConfigError(
            f"rank 0 has made {partial}, and it cannot be seen here: all ranks of all nodes have to share that folder"
        )


def packed(details: dict[str, Any]) -> bytes:
    """As :func:`complete` writes them."""
    buffer = io.BytesIO()
    torch.save(details, buffer)
    return buffer.getvalue()


def complete(partial: Path, details: bytes, keep: int | None) -> Path:
    """Write the rest, give the checkpoint its name, and remove those that are not to be kept."""
    with (partial / _DETAILS).open("wb") as file:
        file.write(details)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    folder = partial.parent
    done = partial.rename(folder / partial.name.split(".")[1])
    _sync(folder)
    for name in _names(folder)[: -keep if keep else 0]:
        (folder / name).rename(folder / f".{name}{_PARTIAL}")  # one that is half removed is none
    for leftover in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(leftover)
    return done


def newest(path: Path, missing_ok: bool) -> Path | None:
    """The checkpoint to load: ``path`` itself, or the newest one in it.

    Raises:
        FileNotFoundError: there is none, unless that is ``missing_ok``.
    """
    if _is_checkpoint(path):
        return path.absolute()
    names = _names(path) if path.is_dir() else []
    if names:
        return path.absolute() / names[-1]
    if missing_ok:
        return None
    raise FileNotFoundError(f"there is no checkpoint in {path.absolute()}")


def details(checkpoint: Path) -> dict[str, Any]:
    """What :func:`packed` was given."""
    loaded: dict[str, Any] = torch.load(checkpoint / _DETAILS, map_location="cpu", weights_only=True)
    return loaded


def _is_checkpoint(path: Path) -> bool:
    return (path / _DETAILS).is_file()


def _names(folder: Path) -> list[str]:
    """Of the checkpoints in it, the oldest first."""
    return sorted((path.name for path in folder.iterdir() if path.name.isdecimal() and _is_checkpoint(path)), key=int)


def _sync(folder: Path) -> None:
    """Have the disk remember the names in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
