"""torchrun for real, where it starts the ranks more than once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import LOOPBACK, free_port

SCRIPT = """
import os, sys
from pathlib import Path
import idist

idist.initialize("gloo", timeout=60)
assert idist.all_gather(idist.get_rank()) == [0, 1]
first = Path(sys.argv[1], f"rank {idist.get_rank()} came")
if not first.exists():
    first.touch()
    idist.barrier()
    if idist.get_rank() == 1:
        os._exit(3)
    idist.barrier()
assert idist.all_reduce(1) == 2
Path(sys.argv[1], f"rank {idist.get_rank()} ended").touch()
idist.finalize()
"""


@pytest.mark.parametrize("agents", [1, 2], ids=["one agent", "two agents, as on two nodes"])
def test_a_rank_that_dies_is_started_again_with_all_others(tmp_path: Path, agents: int) -> None:
    """The agents' store outlives the ranks, and tells the second attempt nothing of the first."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    size = ["--nnodes", str(agents), "--nproc-per-node", str(2 // agents), "--max-restarts", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:{free_port()}", "--rdzv-id", "job"]
    command = [sys.executable, "-m", "torch.distributed.run", *size, *meeting, str(script), str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(agents)]
    try:
        for agent in running:
            _, errors = agent.communicate(timeout=90)
            assert agent.returncode == 0, errors
    finally:
        for agent in running:
            agent.terminate()
            agent.communicate(timeout=30)
    assert sorted(path.name for path in tmp_path.glob("rank * ended")) == ["rank 0 ended", "rank 1 ended"]
