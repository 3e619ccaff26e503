"""What lets several ranks of torch_xla on the CPU talk to each other: for tests, and for no other use.

They are threads of one process, and each compiles a program of its own. The CPU client of XLA numbers the collectives
of a program as it is compiled, and ranks with different numbers wait for each other until it aborts the process. So
here one thread at a time compiles; the next finds the same program compiled already. TPUs know no such numbers.

And ``torch_xla.sync()`` ends by letting go of the token of a collective, which waits until that has run, with the lock
of Python held that the other ranks need to join it. So here a rank first waits without that lock.

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
    native: Any = torch_xla._XLAC

    def sync(wait: bool = False, reset_scope: bool = True) -> None:
        here = f"CPU:{torch_xla.device().index}"
        xm.wait_device_ops([here])  # else the next line would wait for another rank, which waits for the lock
        with _compiling:
            native._xla_step_marker(native._xla_get_default_device(), [], wait=False, reset_scope=reset_scope)
        xm.wait_device_ops([here])
        bare(wait=wait, reset_scope=reset_scope)  # nothing is left for it to run

    sync.one_at_a_time = True  # type: ignore[attr-defined]
    torch_xla.sync = sync
