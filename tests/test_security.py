"""What docs/security.md says: who can reach a job, and what it makes of the bytes that come."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import sockets
import torch
from processes import LOOPBACK, free_port, run_ranks
from test_layers import MODULES

import idist
from idist import rendezvous

# Who listens


def at_work(local_rank: int, *launching: int) -> list[str]:
    """Where this process and those that started it listen, with all that a job may have open."""
    idist.all_reduce(torch.ones(3))
    idist.all_reduce(torch.ones(3), group=[0, 1])
    torch.distributed.new_group([0, 1])  # what a user makes
    idist.all_gather("x" * 10_000)
    return sockets.listening(os.getpid(), *launching)


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_a_job_that_we_start_listens_on_loopback_alone(method: str) -> None:
    told = idist.spawn("gloo", at_work, (os.getpid(),), nproc_per_node=3, start_method=method, timeout=60)
    assert told == [[sockets.LOOPBACK]] * 3


def with_variables(rank: int) -> tuple[list[str], bool]:
    idist.initialize("gloo", timeout=60)
    told = at_work(rank)
    idist.finalize()
    return told, "GLOO_SOCKET_IFNAME" in os.environ


def test_a_job_of_one_node_listens_on_loopback_alone() -> None:
    """Whatever MASTER_ADDR says; a variable that gloo reads is there as long as the context lasts."""
    port = free_port()
    place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": socket.gethostname(), "MASTER_PORT": port}
    told = run_ranks(with_variables, 2, env=lambda rank: {**place, "RANK": rank, "LOCAL_RANK": rank})
    assert told == [([sockets.LOOPBACK], False)] * 2


# What comes over the network

HELLO = struct.pack("=BIBI", 0, 0x3C85F7CE, 13, 0)
GARBAGE = (
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"SSH-2.0-OpenSSH_9.2\r\n",
    bytes(range(256)) * 256,
    b"\xff" * 100_000,
    HELLO + b"\xff" * 64,
    HELLO + b"\x01" + struct.pack("=Q", 2**63) + b"x",  # SET with a key of that length
    HELLO + b"\x03" + struct.pack("=Q", 2**40),
    b'{"pid": 1, "environment": {}}',
)


@contextlib.contextmanager
def under_fire(port: int) -> Iterator[Callable[[], int]]:
    """Bytes that mean nothing come to the port, from the first moment that anybody listens there."""
    over = threading.Event()
    sent = [0]

    def fire(seed: int) -> None:
        generator = random.Random(seed)
        silent = []
        while not over.is_set():
            with contextlib.suppress(OSError):
                caller = socket.create_connection((LOOPBACK, port), timeout=1)
                silent.append(caller)  # some who never say a word, and stay
                if generator.random() < 0.9:
                    silent.pop()
                    with caller:
                        caller.sendall(generator.choice(GARBAGE) or generator.randbytes(64))
                        sent[0] += 1
            over.wait(0.02)
        for caller in silent:
            caller.close()

    threads = [threading.Thread(target=fire, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sent[0]
    finally:
        over.set()
        for thread in threads:
            thread.join()


def meets(rank: int, times: int) -> list[list[int]]:
    told = []
    for _ in range(times):
        idist.initialize("gloo", timeout=60)
        told.append(idist.all_gather(rank))
        time.sleep(0.3)  # the store is under fire too
        idist.barrier()
        idist.finalize()
    return told


def test_garbage_at_the_rendezvous_does_no_harm() -> None:
    port = free_port()
    place = {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    with under_fire(port) as sent:
        told = run_ranks(meets, 3, 3, env=lambda rank: {**place, "RANK": rank, "LOCAL_RANK": rank}, timeout=100)
        assert sent() > 20
    assert told == [[[0, 1, 2]] * 3] * 3


def test_a_store_under_fire_keeps_what_it_has() -> None:
    store = rendezvous.serve(LOOPBACK, 0, "job", 1)
    with under_fire(store.port) as sent:
        for turn in range(500):
            store.set("key", str(turn))
            assert store.get("key") == str(turn).encode()
        while sent() < 100:
            assert store.add("count", 1)


# What runs code

RUNS_CODE = {
    ("idist.backends.horovod.optimizers", "load"): "the state of rank 0's optimizer, which Horovod's own way pickles",
    ("idist.checkpoint.folders", "load"): "weights_only=True",
    ("idist.checkpoint.contents", "load"): "weights_only=True, and an Unpickler that knows six classes of torch",
    ("idist.checkpoint.contents", "Unpickler"): "the base of that",
    ("idist.launchers.crew", "loads"): "what a process that we started returned, through a pipe",
    ("idist.launchers.payload", "load"): "a function and its arguments, from the process that started this one",
    ("idist.launchers.mpi_worker", "spawn_main"): "the same, where mpiexec starts the processes",
    (
        "idist.launchers.xla",
        "loads",
    ): "as payload and crew; a result comes through a file of the user's",
    ("idist.wire", "loads"): "object collectives",
}
CALLS = {"load", "loads", "Unpickler", "eval", "exec", "compile", "__import__", "spawn_main", "recv", "unpickle"}
CALLS |= {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "recv_object_list"}
OF = {
    "pickle",
    "torch",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "reduction",
    "spawn",
    "dist",
    "_Unpickler",
    "builtins",
}


def what_runs_code() -> set[tuple[str, str]]:
    return {(module, name) for module, path in MODULES.items() for name in calls(ast.parse(path.read_text()))}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS - {"load", "compile"}:
            yield node.id
        if isinstance(node, ast.Attribute) and node.attr in CALLS:
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            if not isinstance(of, ast.Name) or of.id in OF:
                yield node.attr
        if isinstance(node, ast.ImportFrom) and node.module in OF:
            yield from (alias.name for alias in node.names if alias.name in CALLS)


def test_nothing_unpickles_but_what_the_page_names() -> None:
    assert what_runs_code() == set(RUNS_CODE)
