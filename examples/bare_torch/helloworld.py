"""The same hello on torch.distributed alone: what the launcher does not say, somebody has to export before.

torchrun says it all; for Slurm there is slurm_multinode_helper.sh.
"""

import argparse
import os
import socket

import torch
import torch.distributed as dist


def hello(backend: str) -> None:
    master = f"http://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    place = f"{socket.gethostname()}:{backend}"
    print(f"[{master}] hello from [{place}] process {dist.get_rank()}/{dist.get_world_size()}\n", end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="from torch.distributed.launch; not used")
    backend = parser.parse_args().backend
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    hello(backend)
    dist.barrier()
    dist.destroy_process_group()
