"""Where processes listen, by the tables of the kernel; on Linux only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LOOPBACK = "0100007F"
"""127.0.0.1, as the table has it."""


def listening(*pids: int) -> list[str]:
    """The addresses at which these processes listen, in the words of /proc/net/tcp; those of IPv6 as well."""
    inodes = {target for pid in pids for target in descriptors(pid)}
    table = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return sorted({row[1].partition(":")[0] for row in table if row[3] == "0A" and f"socket:[{row[9]}]" in inodes})


def descriptors(pid: int) -> list[str]:
    """What they lead to."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            found.append(os.readlink(path))
    return found
