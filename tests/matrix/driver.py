"""Run one cell of the failure matrix with its real launcher, and look at how it ends and at what it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from scripts import bearing

from idist.launchers.commands.base import Request, Tool
from idist.launchers.commands.horovod import Horovodrun
from idist.launchers.commands.mpi import Mpiexec
from idist.launchers.commands.slurm import Srun
from idist.launchers.commands.torchrun import Python, Torchrun
from matrix import cells
from matrix.cells import KIND, PATIENCE_S, WITHIN_S, Cell

SCENARIO = Path(__file__).with_name("scenario.py")
MARK = "IDIST_MATRIX_CELL"
STARTS_WITHIN_S = 90.0
LATEST_S = 50.0
"""How long a job that does not end in time is watched, to tell when it does."""

_WAITING_S = 1.0
_AGAIN_S = 0.3
_TOOLS: dict[str, tuple[Tool, int | None, int | None]] = {
    "spawn": (Python(), None, None),
    "torchrun": (Torchrun(), 2, None),
    "srun": (Srun(), 1, 2),
    "mpiexec of MPICH": (Mpiexec(), 2, None),
    "mpiexec of Open MPI": (Mpiexec(), 2, None),
    "horovodrun": (Horovodrun(), 2, None),
}
_BACKENDS = {"mpiexec of MPICH": "mpi", "mpiexec of Open MPI": "mpi", "horovodrun": "horovod"}
_LEAVES = {"torchrun": "torchelastic_*"}
"""What a launcher leaves in the temporary folder of every job, also of one that ends well."""
# A traceback of the launcher itself, which is Python too.
_OWN = re.compile(r"ChildFailedError|SignalException|horovod/runner|torch/distributed/run\.py")
_RANK = re.compile(
    r"rank 1\b|\[rank1\]|\[1\]<std|\b1: |task 1\b|\brank +: 1\b|RANK 1\b|Process name: (\[.*,)?1\b|\(PMI_RANK 1\)"
)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        seconds: from the failure until nothing was left of it.
        problems: what is not as it should be, in the words of :mod:`matrix.cells`.
        output: all that was printed, and what was left.
    """

    seconds: float
    code: int | None
    problems: tuple[str, ...]
    output: str


def run(cell: Cell, folder: Path) -> Outcome:
    """Start the job, have it fail, and wait until it has ended."""
    kind = KIND[cell.kind]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    temporary = folder / "tmp"
    temporary.mkdir()
    shared = folder / "shm"
    shared.mkdir()
    variables = {"TMPDIR": str(temporary), MARK: mark, "OMP_NUM_THREADS": "1"}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # torch makes it, and leaves it
    backend = _BACKENDS.get(cell.launcher, "gloo")
    arguments = [str(SCENARIO), *cell, str(folder), backend, str(kind.timeout_s)]
    with (folder / "output").open("wb") as output:
        job = subprocess.Popen(
            [*_with_shared_memory_in(shared, cell.launcher), *command(cell.launcher, *arguments)],
            env=os.environ | variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        failed = _failed(job, folder, kind.interrupts)
        late = kind.timeout_s + PATIENCE_S if cell.kind == "SIGSTOP" else 0.0
        left = _wait(job, mark, failed + late + LATEST_S)
        seconds = time.time() - failed
    finally:
        for pid in bearing(MARK, mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    text = (folder / "output").read_text(errors="replace")
    for what in (*left, *_files(temporary, _LEAVES.get(cell.launcher)), *shared.iterdir()):
        text += f"\n(left: {what})"
    found = {
        cells.LATE: seconds > late + WITHIN_S * busy(),
        cells.EXIT_CODE_0: not left and job.returncode == 0,
        cells.PROCESS_LEFT: bool(left),
        cells.FILE_LEFT: "(left: /" in text,
        **_told(cell, text),
    }
    return Outcome(seconds, job.returncode, tuple(name for name, is_so in found.items() if is_so), text)


def command(launcher: str, *script: str) -> tuple[str, ...]:
    """What `idist run` would execute; for spawn, where the script starts two processes, that is Python."""
    tool, nproc, nnodes = _TOOLS[launcher]
    request = Request(script=script, nproc=nproc, nnodes=nnodes)
    return tool.found(tool.checked(request, os.environ), os.environ).argv


def _failed(job: subprocess.Popen[bytes], folder: Path, interrupts: int) -> float:
    """When it failed; Ctrl-C is pressed here, when all others wait."""
    event = folder / "event"
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not event.exists():
        said = (folder / "output").read_text(errors="replace")
        assert job.poll() is None, f"it ended before its moment:\n{said}"
        assert time.monotonic() < deadline, f"it did not come to its moment:\n{said}"
        time.sleep(0.02)
    if not interrupts:
        return float(event.read_text())
    time.sleep(_WAITING_S)
    failed = time.time()
    for turn in range(interrupts):
        time.sleep(_AGAIN_S if turn else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGINT)
    return failed


def _wait(job: subprocess.Popen[bytes], mark: str, until: float) -> list[str]:
    """Until nothing is left of the job; else the commands of its processes that are."""
    while True:
        ended = job.poll() is not None
        left = bearing(MARK, mark)
        if ended and not left:
            return []
        if time.time() > until:
            return [*left.values()]
        time.sleep(0.05)


def busy() -> float:
    """How much longer everything may take than it would if this machine had nothing else to do."""
    return min(max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0))), 3.0)


def _told(cell: Cell, text: str) -> dict[str, bool]:
    """Whether the first failure is told, with its rank, and no rank speaks after it."""
    kind = KIND[cell.kind]
    if kind.interrupts:
        return {}
    found = [match.start() for match in re.finditer(kind.cause, text)]
    return {
        cells.UNTOLD: not found,
        cells.NOT_LAST: bool(found) and any(at > found[-1] for at in _tracebacks(text)),
        cells.NO_RANK: not _RANK.search(text),
    }


def _tracebacks(text: str) -> list[int]:
    """Where the ranks' tracebacks begin; those of the launcher itself are none of theirs."""
    starts = [match.start() for match in re.finditer(r"Traceback \(most recent call last\)", text)]
    ends = [*starts[1:], len(text)]
    return [start for start, end in zip(starts, ends, strict=False) if not _OWN.search(text[start:end])]


def _files(temporary: Path, theirs: str | None) -> set[Path]:
    return set(temporary.iterdir()) - (set(temporary.glob(theirs)) if theirs else set())


def _with_shared_memory_in(folder: Path, launcher: str) -> tuple[str, ...]:
    """What to put before a command for it to have /dev/shm for itself: other programs of the machine have theirs.

    Only root can; under Slurm the processes are not ours.
    """
    if os.geteuid() != 0 or launcher == "srun":
        return ()
    own = 'mount --bind "$0" /dev/shm && exec "$@"'
    return "unshare", "--mount", "--propagation", "private", "sh", "-c", own, str(folder)
