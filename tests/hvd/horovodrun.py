"""Start Python scripts under the real horovodrun of the environment that the tests run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
HEAD = "import json, os, sys, torch, idist\n"
SAY = "\nwith open(os.path.join({folder!r}, os.environ['HOROVOD_RANK']), 'w') as file: json.dump(said, file)\n"


def command(size: int, hosts: str | None = None) -> list[str]:
    """horovodrun for ``size`` processes; ``hosts`` are names of this machine that stand for nodes."""
    return [str(BIN / "horovodrun"), "--gloo", "-np", str(size), "-H", hosts or f"localhost:{size}"]


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | variables


def run(
    script: str, size: int, folder: Path, *, hosts: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script, which may assign ``said``, on every rank."""
    path = folder / "script.py"
    path.write_text(HEAD + textwrap.dedent(script) + ("" if "said" not in script else SAY.format(folder=str(folder))))
    return subprocess.run(
        [*command(size, hosts), sys.executable, str(path)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )


def said(script: str, size: int, folder: Path, **how: Any) -> list[Any]:
    """What every rank of :func:`run` said, by rank; all must end well."""
    ended = run(script, size, folder, **how)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(size)]
