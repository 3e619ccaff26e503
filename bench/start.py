"""How long it takes to start processes that meet at a barrier: `python bench/start.py`.

Each start is a program of its own, from its first instruction until rank 0 has passed the barrier: what a person waits
for who types a command. One `import torch` in a process of its own is measured in the same turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from alternate import Comparison, alternate, arguments, report, with_bytecode

PEERS = {
    "pytorch-ignite": 1 / 6,
    "lightning-fabric": 1 / 6,
    "torchrun": 1 / 3,
    "torch.multiprocessing.spawn": 1 / 3,
    "accelerate's debug_launcher": 1.0,
    "one import torch": 2.2,
}
"""With the target of the ratio."""

FORKED = 'idist with start_method="fork"'
"""As Accelerate does it by itself: what the process has imported is imported once."""

DONE = "BENCH_DONE"
"""The variable with the file into which rank 0 writes the time."""


def arrived(rank: int) -> None:
    """Rank 0 has passed the barrier. The clock is that of the machine, the same in all processes."""
    if rank == 0:
        Path(os.environ[DONE]).write_text(str(time.monotonic()))


def with_idist(local_rank: int) -> None:
    """What idist's processes do."""
    import idist

    idist.barrier()
    arrived(idist.get_rank())


def with_ignite(local_rank: int) -> None:
    """What pytorch-ignite's processes do."""
    import ignite.distributed as peer

    peer.barrier()
    arrived(peer.get_rank())


def with_accelerate() -> None:
    """What Accelerate's processes do."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    state.wait_for_everyone()
    arrived(state.process_index)


def with_torch(rank: int, processes: int, port: int) -> None:
    """What processes of torch's spawn do."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    dist.barrier()
    arrived(rank)
    dist.destroy_process_group()


def with_torchrun() -> None:
    """What processes of torchrun do."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    arrived(dist.get_rank())
    dist.destroy_process_group()


def start(peer: str, processes: int) -> None:
    """The program of one peer; runs in a process of its own."""
    if peer in ("idist", FORKED):
        import idist

        options = {"start_method": "fork"} if peer == FORKED else {}
        with idist.Parallel(backend="gloo", nproc_per_node=processes, **options) as parallel:
            parallel.run(with_idist)
    elif peer == "pytorch-ignite":
        import ignite.distributed as peer_idist

        with peer_idist.Parallel(backend="gloo", nproc_per_node=processes) as parallel:
            parallel.run(with_ignite)
    elif peer == "accelerate's debug_launcher":
        from accelerate import debug_launcher

        debug_launcher(with_accelerate, num_processes=processes)
    elif peer == "lightning-fabric":
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp_spawn")
        fabric.launch(with_fabric)
    elif peer == "torch.multiprocessing.spawn":
        import torch.multiprocessing

        torch.multiprocessing.spawn(with_torch, (processes, free_port()), nprocs=processes)
    elif peer == "torchrun":
        with_torchrun()
    else:
        import torch

        arrived(0)


def with_fabric(fabric: object) -> None:
    """What Fabric's processes do."""
    fabric.barrier()  # type: ignore[attr-defined]
    arrived(fabric.global_rank)  # type: ignore[attr-defined]


def free_port() -> int:
    """A port that nobody has at the moment."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def seconds(peer: str, processes: int) -> float:
    """One start."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        command = [sys.executable, *(launcher if peer == "torchrun" else []), __file__, "--peer", peer, str(processes)]
        # Half of the peers leave this to the user, and without it each process computes on all cores.
        env = {**with_bytecode(os.environ), "OMP_NUM_THREADS": "1", DONE: str(done)}
        begun = time.monotonic()
        ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        if ended.returncode:
            raise SystemExit(f"{peer} failed:\n{ended.stderr}")
        return float(done.read_text()) - begun


def main() -> None:
    """Measure all."""
    if "--peer" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--peer", nargs=2)
        peer, processes = parser.parse_args().peer
        start(peer, int(processes))
        return
    options = arguments(__doc__, turns=5)
    processes = 2 if options.quick else 8
    times = alternate({peer: partial(seconds, peer, processes) for peer in ("idist", FORKED, *PEERS)}, options.turns)
    what = f"start {processes} processes to their first barrier"
    report(
        (
            Comparison(what + how, peer, times[ours], times[peer], target)
            for ours, how in (("idist", ""), (FORKED, ", forked"))
            for peer, target in PEERS.items()
        ),
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
