"""Every process brings a tensor; all get the sum."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import idist


def reduction(local_rank: int) -> None:
    data = idist.all_reduce(torch.ones(1, device=idist.device()))
    # Written at once, so that the lines of several processes do not mix.
    print(f"[{master()}] process {idist.get_rank()}/{idist.get_world_size()} has data {data.cpu()}\n", end="")


def master() -> str:
    topology = idist.get_topology()
    return f"http://{topology.master_addr}:{topology.master_port}" if topology.master_addr else "no master"


def arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Add up a tensor of every process.")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    return vars(parser.parse_args())


if __name__ == "__main__":
    with idist.Parallel(**arguments()) as parallel:
        parallel.run(reduction)
