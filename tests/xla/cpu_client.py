"""What lets several ranks of torch_xla on the CPU talk to each other: for tests, and for no other use.

They are threads of one process, and each compiles a program of its own. The CPU client of XLA numbers the collectives
of a program as it is compiled, and ranks with different numbers wait for each other until it aborts the process. So
here one thread at a time compiles; the next finds the same program compiled already. TPUs know no such numbers.

Programs that run when a value is asked for, without ``torch_xla.sync()``, are not covered: a collective in one of them
aborts, so a test that passes has none.
"""

from __future__ import annotations

import os
import threading
from typing import Any

VARIABLES = {"PJRT_DEVICE": "CPU", "XLA_THREAD_POOL_SIZE": "16"}
"""With fewer threads, ranks wait for each other in all of them."""

_compiling = threading.Lock()


def environment(replicas: int) -> dict[str, str]:
    """That of a process whose ranks are so many threads."""
    return {**os.environ, **VARIABLES, "CPU_NUM_DEVICES": str(replicas)}


def let_replicas_talk() -> None:
    """Once for each process will do."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    if getattr(torch_xla.sync, "one_at_a_time", False):
        return
    bare: Any = torch_xla.sync

    def sync(wait: bool = False, reset_scope: bool = True) -> None:
        here = f"CPU:{torch_xla.device().index}"
        xm.wait_device_ops([here])  # else the next line would wait for another rank, which waits for the lock
        with _compiling:
            bare(wait=False, reset_scope=reset_scope)
        if wait:
            xm.wait_device_ops([here])

    sync.one_at_a_time = True  # type: ignore[attr-defined]
    torch_xla.sync = sync
