"""Every process says hello: where the job meets, this host, how the processes talk, which of them this is."""

from __future__ import annotations

import argparse
from typing import Any

import idist


def hello(local_rank: int) -> None:
    place = f"{idist.hostname()}:{idist.backend()}"
    # Written at once, so that the lines of several processes do not mix.
    print(f"[{master()}] hello from [{place}] process {idist.get_rank()}/{idist.get_world_size()}\n", end="")


def master() -> str:
    topology = idist.get_topology()
    return f"http://{topology.master_addr}:{topology.master_port}" if topology.master_addr else "no master"


def arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Say hello from every process.")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--nnodes", type=int, help="nodes on which this is started with --nproc_per_node")
    parser.add_argument("--node_rank", type=int, help="which of them this one is")
    parser.add_argument("--master_addr", help="host of node 0")
    parser.add_argument("--master_port", type=int, help="a free port there")
    return vars(parser.parse_args())


if __name__ == "__main__":
    with idist.Parallel(**arguments()) as parallel:
        parallel.run(hello)
