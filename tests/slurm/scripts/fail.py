"""The last rank ends with exit code 3; the others compute on, or wait for it in a collective, in vain."""

from __future__ import annotations

import sys
import time

from telling import tell

import idist

with idist.Parallel(backend="gloo", timeout=120):
    if idist.get_rank() == idist.get_world_size() - 1:
        sys.exit(3)
    tell(rank=idist.get_rank())
    if sys.argv[2] == "compute":
        time.sleep(100)
    idist.barrier()
