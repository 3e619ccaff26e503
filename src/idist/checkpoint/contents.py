"""What is in a checkpoint: the tensors of models and optimizers by their names, and plain data."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    metadata,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from idist.errors import ConfigError, PeerFailed

_MODEL, _OPTIMIZER = "model/", "optimizer/"
_METADATA = ".metadata"
# What torch.compile and activation checkpointing put into the names of a model's parameters.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# All that the metadata of torch.distributed.checkpoint is made of, besides torch's names of types.
_METADATA_CLASSES: tuple[type, ...] = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
    type(Path()),
)


def of(model: torch.nn.Module | None, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by their names, and the rest.

    Raises:
        ConfigError: the optimizer is not one of the model.
    """
    state = _model_state(model)
    tensors = {_MODEL + name: value for name, value in state.items() if isinstance(value, Tensor)}
    details: dict[str, Any] = {
        "model": None if model is None else {n: v for n, v in state.items() if not isinstance(v, Tensor)},
        "groups": None,
        "states": {},
    }
    if optimizer is not None:
        names = _names_of(optimizer, model)
        saved = optimizer.state_dict()
        details["groups"] = [{**g, "params": [names[i] for i in g["params"]]} for g in saved["param_groups"]]
        for index, of_parameter in saved["state"].items():
            for key, value in of_parameter.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{names[index]}/{key}"] = value
                else:
                    details["states"].setdefault(names[index], {})[key] = of_value(f"optimizer, {key}", value)
    return tensors, details


def of_value(name: str, value: Any) -> Any:
    """A value, or the state of one that has it, if it can be loaded again without running code.

    Raises:
        ConfigError: it cannot.
    """
    state = value.state_dict() if hasattr(value, "state_dict") else value
    if any(isinstance(leaf, DTensor) for leaf in tree_leaves(state)):
        raise ConfigError(
            f"{name!r} has tensors that are sharded over the ranks; save takes those of model and optimizer"
        )
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name!r}, a {type(value).__name__}, is not plain data, which alone is safe to load: numbers, strings, "
            f"tensors, lists, tuples, dicts, or an object with state_dict(). {str(error).splitlines()[0]}"
        ) from error
    return state


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the CPU, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write(tensors: Mapping[str, Tensor], folder: Path, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Write the tensors. All ranks call this; without a process group of torch rank 0 alone writes."""
    alone = not dist.is_initialized()
    if tensors and (rank == 0 or not alone):
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        writer = FileSystemWriter(folder)
        with _quiet(), _as_exceptions(f"{folder} cannot be written (is the disk full?)"):
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=alone)


def room(
    checkpoint: Path, model: torch.nn.Module | None, optimizer: Optimizer | None, details: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors to read into: the model's own, and new ones for the optimizer.

    Raises:
        ConfigError: the checkpoint does not fit.
    """
    for what, given in (("model", model), ("groups", optimizer)):
        if given is not None and details[what] is None:
            raise ConfigError(f"{checkpoint} was saved without a{'n optimizer' if what == 'groups' else ' model'}")
    saved = _tensors_in(checkpoint)
    tensors: dict[str, Tensor] = {}
    if model is not None:
        mine = {n: v for n, v in _model_state(model).items() if isinstance(v, Tensor)}
        theirs = {n.removeprefix(_MODEL): v.size for n, v in saved.items() if n.startswith(_MODEL)}
        _check_fit(checkpoint, {name: value.shape for name, value in mine.items()}, theirs)
        tensors |= {_MODEL + name: value for name, value in mine.items()}
    if optimizer is not None:
        parameters = _parameters_of(optimizer, model)
        groups = [list(group["params"]) for group in details["groups"]]
        _check_groups(checkpoint, optimizer, groups, parameters)
        for name, value in saved.items():
            if name.startswith(_OPTIMIZER):
                owner, _, _ = name.removeprefix(_OPTIMIZER).rpartition("/")
                tensors[name] = _like(parameters[owner], value)
    return tensors


def read(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read into the tensors. All ranks call this."""
    if tensors:
        alone = not dist.is_initialized()
        with _quiet(), _as_exceptions(f"{folder} cannot be read"):
            dcp.load(tensors, storage_reader=_Reader(folder), planner=DefaultLoadPlanner(), no_dist=alone)


@contextmanager
def _as_exceptions(what: str) -> Iterator[None]:
    """Raise what whoever waits for this rank can hear of: torch's failure of a checkpoint is no ``Exception``.

    Raises:
        RuntimeError: it failed on this rank.
        PeerFailed: on another one.
    """
    try:
        yield
    except CheckpointException as failure:
        alone = not dist.is_initialized()
        said = [
            f"{'' if alone else f'rank {rank}: '}{type(error).__name__}: {error}"
            for rank, (error, _) in failure.failures.items()
        ]
        failed = RuntimeError if alone or dist.get_rank() in failure.failures else PeerFailed
        raise failed(f"{what}: {'; '.join(said)}") from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning that there is no process group, and so that one process reads and writes alone.

    And before 2.11, of what it does itself with tensors that come from another device.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def put_back(
    model: torch.nn.Module | None,
    optimizer: Optimizer | None,
    tensors: Mapping[str, Tensor],
    details: Mapping[str, Any],
) -> None:
    """Hand over what was read."""
    if model is not None:
        bare = _unwrapped(model)
        loaded = {n.removeprefix(_MODEL): v for n, v in tensors.items() if n.startswith(_MODEL)} | details["model"]
        bare.load_state_dict({name: loaded[_plain(name)] for name in bare.state_dict()})
    if optimizer is not None:
        states = {name: dict(values) for name, values in details["states"].items()}
        for name, value in tensors.items():
            if name.startswith(_OPTIMIZER):
                owner, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
                states.setdefault(owner, {})[key] = value
        index = {name: i for i, name in enumerate(_names_of(optimizer, model))}
        groups = [{**group, "params": [index[name] for name in group["params"]]} for group in details["groups"]]
        optimizer.zero_grad()
        optimizer.load_state_dict({"state": {index[n]: s for n, s in states.items()}, "param_groups": groups})


# Names


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def _plain(name: str) -> str:
    """The name that a parameter has where the model is not compiled and nothing is wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _model_state(model: torch.nn.Module | None) -> dict[str, Any]:
    state = {} if model is None else _unwrapped(model).state_dict()
    return {_plain(name): value for name, value in state.items()}


def _parameters_of(optimizer: Optimizer, model: torch.nn.Module | None) -> dict[str, Tensor]:
    """The optimizer's parameters by their names in the model, in the order of the optimizer."""
    if model is None:
        raise ConfigError("optimizer without model: its parameters are saved by the names that the model gives them")
    names = {parameter: _plain(name) for name, parameter in _unwrapped(model).named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(parameter not in names for parameter in parameters)
    if foreign:
        raise ConfigError(
            f"{foreign} of the optimizer's {len(parameters)} parameters are not of this model. "
            "Make the optimizer after the model has been wrapped: wrapping may replace its parameters."
        )
    return {names[parameter]: parameter for parameter in parameters}


def _names_of(optimizer: Optimizer, model: torch.nn.Module | None) -> list[str]:
    return list(_parameters_of(optimizer, model))


# Loading


def _check_fit(checkpoint: Path, ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size]) -> None:
    problems = [f"not in the checkpoint: {name}" for name in ours.keys() - theirs.keys()]
    problems += [f"not in the model: {name}" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name}: {list(theirs[name])} in the checkpoint, {list(ours[name])} in the model"
        for name in ours.keys() & theirs.keys()
        if theirs[name] != ours[name]
    ]
    if problems:
        raise ConfigError(f"{checkpoint} does not fit the model: {_some(sorted(problems))}")


def _check_groups(
    checkpoint: Path, optimizer: Optimizer, theirs: list[list[str]], parameters: Mapping[str, Tensor]
) -> None:
    names = iter(parameters)
    ours = [[next(names) for _ in group["params"]] for group in optimizer.param_groups]
    if list(map(sorted, ours)) != list(map(sorted, theirs)):
        lengths = [
            f"{len(groups)} groups of {', '.join(str(len(group)) for group in groups)}" for groups in (theirs, ours)
        ]
        unlike = {name for group in theirs for name in group} ^ set(parameters)
        raise ConfigError(
            f"{checkpoint} does not fit the optimizer: {lengths[0]} parameters in the checkpoint, {lengths[1]} here"
            + (f"; only in one of them: {_some(sorted(unlike))}" if unlike else "")
        )


def _some(items: Iterable[str], most: int = 5) -> str:
    listed = list(items)
    return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more" if len(listed) > most else "")


def _like(parameter: Tensor, saved: metadata.TensorStorageMetadata) -> Tensor:
    """Room for a state of this parameter: sharded as that is, if it has its shape."""
    if isinstance(parameter, DTensor) and parameter.shape == saved.size:
        return torch.zeros_like(parameter.detach(), dtype=saved.properties.dtype)
    return torch.zeros(saved.size, dtype=saved.properties.dtype)


def _tensors_in(checkpoint: Path) -> dict[str, metadata.TensorStorageMetadata]:
    if not (checkpoint / _METADATA).exists():  # neither model nor optimizer
        return {}
    found = _Reader(checkpoint).read_metadata().state_dict_metadata
    return {name: value for name, value in found.items() if isinstance(value, metadata.TensorStorageMetadata)}


class _Unpickler(pickle.Unpickler):
    """For the metadata of torch.distributed.checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        for known in _METADATA_CLASSES:
            if (module, name) == (known.__module__, known.__qualname__):
                return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):  # a layout by its name
            return torch.serialization._get_layout
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class _Reader(FileSystemReader):
    """Reads what :class:`FileSystemWriter` wrote, and runs no code that came with it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            found: metadata.Metadata = _Unpickler(file).load()
        return found
