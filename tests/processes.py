"""Start ranks as plain processes, each with an environment and a deadline: what is tested is below any launcher.

They are forked by the fork server of :mod:`multiprocessing`, which has torch imported already.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it, and it then sets a variable: not within a test

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "idist", "idist.launchers", "pytest"])

# A process starts without these, whatever is set where the tests run.
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "IDIST_VERIFY")

LOOPBACK = "127.0.0.1"

Env = Callable[[int], Mapping[str, object]]
"""The variables of a rank, on top of the environment of the tests."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        result: what its function returned.
        error: the type and message of what it raised, None if it returned.
        output: what it wrote, with its traceback.
        seconds: how long its function ran.
    """

    result: Any
    error: str | None
    output: str
    seconds: float


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, env: Env | None = None, timeout: float = 40.0
) -> list[Any]:
    """What ``fn(rank, *args)`` returns in ``world_size`` processes, all of which have to succeed."""
    ended = end_ranks(fn, world_size, *args, env=env, timeout=timeout)
    failed = [f"rank {rank}: {each.error}\n{each.output}" for rank, each in enumerate(ended) if each.error is not None]
    assert not failed, "\n".join(failed)
    return [each.result for each in ended]


def end_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, env: Env | None = None, timeout: float = 40.0
) -> list[Ended]:
    """How ``fn(rank, *args)`` ends in each of ``world_size`` processes."""
    with started(fn, world_size, *args, env=env, timeout=timeout) as wait:
        return wait()


@contextlib.contextmanager
def started(
    fn: Callable[..., Any], world_size: int, *args: Any, env: Env | None = None, timeout: float = 40.0
) -> Iterator[Callable[[], list[Ended]]]:
    """Start ``fn(rank, *args)``, a function at the top level of a module, in each of ``world_size`` processes.

    Gives a function that waits for them to end, and ends those that then still run.
    """
    with TemporaryDirectory(prefix="idist-ranks-") as folder, contextlib.ExitStack() as stack:
        running = []
        for rank in range(world_size):
            reader, writer = CONTEXT.Pipe(duplex=False)
            stack.callback(reader.close)
            output = Path(folder, str(rank))
            own = {name: str(value) for name, value in (env(rank) if env else {}).items()}
            variables = {name: value for name, value in os.environ.items() if name not in UNSET} | own
            process = CONTEXT.Process(target=_main, args=(writer, output, variables, timeout, fn, rank, *args))
            process.start()
            writer.close()
            stack.callback(_end, process)
            running.append((process, reader, output))
        deadline = time.monotonic() + timeout
        yield lambda: [_wait(process, reader, output, deadline) for process, reader, output in running]


def free_port() -> int:
    """A port that is free, below those that the system hands out to clients: nobody is given it by chance."""
    while True:
        port = random.Random().randrange(10000, 20000)
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)):
            return port


def _main(
    writer: Connection,
    output: Path,
    variables: Mapping[str, str],
    timeout: float,
    fn: Callable[..., Any],
    *args: Any,
) -> None:
    with output.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The stacks of a rank that hangs; it ends, even if there is nobody any more to end it.
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
    torch.set_num_threads(1)
    result, error = None, None
    begun = time.monotonic()
    try:
        result = fn(*args)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        traceback.print_exc()
    writer.send((result, error, time.monotonic() - begun))


def _wait(process: ForkServerProcess, reader: Connection, output: Path, deadline: float) -> Ended:
    grace = 2.0  # the process itself keeps the deadline; this is for the one that cannot
    result, error, seconds = None, "it did not end in time", 0.0
    if reader.poll(max(deadline + grace - time.monotonic(), 0)):
        try:
            result, error, seconds = reader.recv()
        except EOFError:
            error = "it ended without an answer"
    process.join(max(deadline + grace - time.monotonic(), grace))
    if process.exitcode != 0:
        error = f"{error or 'it returned'}, exit code {process.exitcode}"
    return Ended(result, error, output.read_text(errors="replace") if output.exists() else "", seconds)


def _end(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
    process.close()
