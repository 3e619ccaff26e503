"""Scripts that start processes, run as a user would run them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path


class Script:
    """A script that runs, in a process group of its own as a terminal would have it."""

    def __init__(self, folder: Path, source: str, *command: str) -> None:
        self.folder = folder
        path = folder / "script.py"
        path.write_text(f"FOLDER = {str(folder)!r}\n{source}")
        with path.open() as itself:
            self.process = subprocess.Popen(
                [sys.executable, *(command or (str(path),))],
                cwd=folder,
                stdin=itself,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def workers(self, count: int = 3) -> list[int]:
        """The processes, when all of them are in the function."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            said = [path.read_text() for path in self.folder.glob("[0-9]")]
            if len(said) == count and all(said):
                return [int(pid) for pid in said]
            time.sleep(0.02)
        raise AssertionError(f"the workers did not come: {self.finish()}")

    def end(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def finish(self, seconds: float = 30) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


def all_end(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def bearing(name: str, value: str) -> dict[int, str]:
    """Every process with this variable in its environment, with its command; on Linux only."""
    mark = f"{name}={value}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to read
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (
                    (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found
