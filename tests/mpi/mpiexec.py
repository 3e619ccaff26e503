"""Start Python scripts under the mpiexec of the environment that the tests run in: MPICH's or Open MPI's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
IS_OPEN_MPI = (BIN / "ompi_info").exists()
HEAD = "import json, os, sys, idist\n"
SAY = "\nwith open(os.path.join({folder!r}, str(idist.get_rank())), 'w') as file: json.dump(said, file)\n"


def command(size: int, hosts: str | None = None) -> list[str]:
    """mpiexec for ``size`` processes; ``hosts`` are names of this machine that stand for nodes."""
    words = [str(BIN / "mpiexec"), "-n", str(size)]
    if IS_OPEN_MPI:
        words += ["--oversubscribe"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    return words + (["-hosts", hosts] if hosts else [])


def run(
    script: str, size: int, folder: Path, *, hosts: str | None = None, wrapped: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script, which may assign ``said``, on every rank; ``wrapped`` in a shell as job scripts do."""
    path = folder / "script.py"
    path.write_text(HEAD + textwrap.dedent(script) + ("" if "said" not in script else SAY.format(folder=str(folder))))
    python = [sys.executable, str(path)]
    if wrapped:
        python = ["sh", "-c", f"true; {sys.executable} {path}; exit $?"]
    return subprocess.run(
        [*command(size, hosts), *python],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )


def said(script: str, size: int, folder: Path, **how: Any) -> list[Any]:
    """What every rank of :func:`run` said, by rank; all must end well."""
    ended = run(script, size, folder, **how)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(size)]
