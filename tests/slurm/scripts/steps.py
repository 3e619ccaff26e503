"""Take one step after the other until told to stop; then save the number of steps, from which a later run goes on."""

from __future__ import annotations

import os
import time

from telling import FOLDER, tell

import idist

with idist.Parallel(backend="gloo", timeout=60):
    rank, restarts = idist.get_rank(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    saved = FOLDER / "saved"
    begun = step = idist.broadcast(int(saved.read_text()) if saved.exists() else 0)
    deadline = time.monotonic() + 100
    while not (stop := idist.should_stop()) and time.monotonic() < deadline:
        if step == begun:
            tell(rank=rank, restarts=restarts, begun=begun, running=True)
        step += 1
        time.sleep(0.05)
    if rank == 0:
        saved.write_text(str(step))
    tell(rank=rank, restarts=restarts, begun=begun, running=False, stop=stop, step=step)
