"""One ``with`` block that runs a function on every rank, whoever starts the processes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from typing_extensions import Self

from idist import backends, launchers, runtime
from idist.errors import ConfigError
from idist.launchers import worker

__all__ = ["Parallel", "spawn"]

logger = logging.getLogger("idist")


class Parallel:
    """Run a function on every rank: in processes that it starts, or in those that a launcher has started.

    - With ``nproc_per_node`` it starts that many processes on this node for each :meth:`run`.
    - Without, it attaches: under torchrun, Slurm, mpiexec, ... this process is one of the ranks;
      with plain ``python`` it is the only one. A process group that exists already is used as it is.

    ::

        def training(local_rank, config):
            model = idist.auto_model(...)

        if __name__ == "__main__":
            with idist.Parallel(backend="auto", nproc_per_node=2) as parallel:
                parallel.run(training, config)

    Args:
        backend: a name of :func:`idist.available_backends`, a composite such as
            ``cpu:gloo,cuda:nccl``, or ``"auto"`` for what suits this machine. ``None`` means not
            distributed: one process, and an error if a launcher has started several.
        nproc_per_node: number of processes to start on this node.
        nnodes: number of nodes, each of which runs this script; default 1.
        node_rank: index of this node, needed with several.
        master_addr: host of node 0; needed with several nodes, unless there is an ``init_method``.
        master_port: a free port there. On one node both are best left out: the processes then meet
            on the loopback interface, at a port that nobody has to choose.
        init_method: ``tcp://host:port``, ``file:///path/that/all/nodes/share`` or ``env://``
            (MASTER_ADDR and MASTER_PORT), instead of the two.
        **spawn_kwargs: ``start_method``: ``forkserver`` (default), ``spawn``, or ``fork`` (default in a
            notebook, whose functions no other process can import). ``timeout``: of the meeting and
            of every collective, in seconds or a timedelta. ``device``: to train on. ``daemon``: whether
            the processes may not start processes of their own. ``verify``, ``warn_after`` and the
            backend's own options as in :func:`idist.initialize`. What concerns the start of processes has no
            effect where none is started.

    Raises:
        ConfigError: arguments are wrong or contradict each other, or ``nproc_per_node`` is given in a
            process that a launcher or another Parallel has started. Nothing was started then.
        BackendUnavailable: the backend exists but cannot be used here.

    The started processes get the environment of this one and RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT besides; this process's own environment stays as it
    is. Unless OMP_NUM_THREADS is set, each computes with its share of the cores (a forked one with
    one thread); torchrun sets it to 1, so set it for results that are bit by bit the same under both.
    Arguments and results are pickled. Tensors among them travel by value, unless they are in shared
    memory. The fork server imports torch once; it keeps the resource limits that it found at the
    first run.

    With a backend whose library needs its own launcher, ``mpi`` for one, :meth:`run` starts that, on
    this node: ``mpiexec`` of this Python's environment, else of PATH. What places processes
    (``nnodes``, ``master_addr``, ``init_method``, ``start_method``, ...) is then an error, and the
    function has to be in a file. For several nodes start the script with ``mpiexec``.

    Cost: the first run starts the fork server, about as long as ``import torch``; every process then
    imports the script, and joins. Processes of ``mpiexec`` import torch each by themselves, in every run.
    """

    def __init__(
        self,
        backend: str | None = None,
        nproc_per_node: int | None = None,
        nnodes: int | None = None,
        node_rank: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        init_method: str | None = None,
        **spawn_kwargs: Any,
    ) -> None:
        self._entered = False
        self._owns = False
        self._backend = backend
        placing = {"nnodes": nnodes, "node_rank": node_rank, "master_addr": master_addr, "master_port": master_port}
        given = {name: value for name, value in placing.items() if value is not None}
        if nproc_per_node is None:
            self._job = None
            self._options = _attaching(backend, given, init_method, spawn_kwargs)
        else:
            self._job = _plan(backend, nproc_per_node, **given, init_method=init_method, **spawn_kwargs)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``fn(local_rank, *args, **kwargs)`` on every rank, as often as you like.

        Returns:
            What ``fn`` returned in the processes that this call ran, by local rank: a list of one
            where no processes are started.

        Raises:
            WorkerFailed: a process that was started failed; it has the rank and the traceback of the
                first failure. All processes have ended. An attached ``fn`` raises as any function does.
            LaunchError: the processes could not be started; there is no ``mpiexec``, for one.
            ConfigError: outside of the ``with`` block, ``fn`` cannot be called, or it or an argument
                cannot be sent to another process.

        A process that calls ``sys.exit(0)`` has returned None.
        """
        if not self._entered:
            raise ConfigError(
                "run works inside the with block: `with idist.Parallel(...) as parallel: parallel.run(...)`"
            )
        if self._job is None:
            _check_callable(fn, args, kwargs)
            return [fn(runtime.get_local_rank(), *args, **kwargs)]
        return _launch(self._job, fn, args, kwargs)

    def __enter__(self) -> Self:
        worker.refuse_unguarded_main()
        if self._entered:
            raise ConfigError("this Parallel is in use already; it can be entered again when its with block has ended")
        if self._job is None:
            self._owns = _attach(self._backend, self._options)
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self._entered = False
        if not self._owns:
            return
        self._owns = False
        if error is not None:
            runtime.explain(error)
        try:
            runtime.finalize()
        except Exception:
            if error is None:
                raise
            logger.warning("the context could not be ended after a failure", exc_info=True)


def spawn(
    backend: str,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs_dict: Mapping[str, Any] | None = None,
    nproc_per_node: int = 1,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(local_rank, *args, **kwargs_dict)`` in ``nproc_per_node`` new processes on this node.

    Args:
        backend: as for :class:`Parallel`.
        fn: at the top level of a module, unless the processes are forked.
        args: its arguments after the local rank.
        kwargs_dict: its keyword arguments.
        nproc_per_node: number of processes.
        **kwargs: ``nnodes``, ``node_rank``, ``master_addr``, ``master_port``, ``init_method`` and the
            ``spawn_kwargs`` of :class:`Parallel`.

    Returns:
        What ``fn`` returned, by local rank.

    Raises:
        ConfigError, BackendUnavailable, LaunchError, WorkerFailed: as :class:`Parallel` and :meth:`Parallel.run`.
    """
    worker.refuse_unguarded_main()
    if not isinstance(args, (tuple, list)):
        raise ConfigError(f"args must be a tuple of the arguments after local_rank, got {args!r}")
    if not isinstance(kwargs_dict, (Mapping, type(None))):
        raise ConfigError(f"kwargs_dict must be a mapping, got {kwargs_dict!r}")
    return _launch(_plan(backend, nproc_per_node, **kwargs), fn, args, kwargs_dict or {})


def _plan(backend: str | None, nproc_per_node: int, **kwargs: Any) -> launchers.Job:
    worker.refuse_unguarded_main()
    if worker.inside():
        raise ConfigError(
            f"nproc_per_node={nproc_per_node} asks for processes to be started, but this process is itself one that "
            "idist.Parallel or idist.spawn has started. Call them once, in the main process."
        )
    return launchers.plan(backend, os.environ, nproc_per_node=nproc_per_node, **kwargs)


def _launch(job: launchers.Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    _check_callable(fn, args, kwargs)
    return launchers.launch(job, fn, args, kwargs, dict(os.environ))


def _attaching(
    backend: str | None, placing: Mapping[str, Any], init_method: str | None, spawn_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of ``initialize``, out of those of Parallel without ``nproc_per_node``."""
    if placing:
        raise ConfigError(
            f"{', '.join(placing)} without nproc_per_node: they place processes that are started here. Without it, "
            "the launcher's variables tell the place of this process."
        )
    if backend is None:
        if init_method is not None:
            raise ConfigError(f"backend=None means not distributed, but init_method={init_method!r} was given")
    else:
        own = inspect.signature(runtime.initialize).parameters
        others = {name: value for name, value in spawn_kwargs.items() if name not in own}
        launchers.refuse_unknown(others, backends.create(backend))
    starting = ("start_method", "daemon", "join")
    options = {name: value for name, value in spawn_kwargs.items() if name not in starting}
    return options if init_method is None else {**options, "init_method": init_method}


def _attach(backend: str | None, options: Mapping[str, Any]) -> bool:
    """Whether a context was made that is to be ended again."""
    context = runtime.current()
    if context.backend.model_name == "serial":
        runtime.initialize(backend, **options)
        return backend is not None
    if backend not in (None, backends.AUTO) and backends.create(backend).name != context.backend.name:
        raise ConfigError(
            f"backend={backend!r} was asked for, but a {context.backend.name} context exists already; "
            "leave backend out to use it, or end it before"
        )
    runtime.place()
    logger.info("the %s context with %d ranks is used as it is", context.backend.name, context.world_size)
    return False


def _check_callable(fn: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Whether it takes what it will get is seen here, where the call stands, and not in every process."""
    if not callable(fn):
        raise ConfigError(f"run expects a function, called as fn(local_rank, *args, **kwargs); got {fn!r}")
    try:
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):  # of C, for one
        return
    try:
        signature.bind(0, *args, **kwargs)
    except TypeError as error:
        name = getattr(fn, "__qualname__", repr(fn))
        given = ", ".join(["local_rank", *map(_short, args), *(f"{key}={_short(kwargs[key])}" for key in kwargs)])
        raise ConfigError(
            f"the function is {name}{signature}, and would be called as {name}({given}): {error}. "
            "Its first argument is the local rank, the others are those of the call."
        ) from None


def _short(value: object) -> str:
    """It may be a model."""
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
