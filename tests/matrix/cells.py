"""The failure matrix: every way to fail, at every moment, under every launcher, and what is not as it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MOMENTS = ("before init", "between steps", "inside a collective", "inside backward", "during finalize")
LAUNCHERS = ("spawn", "torchrun", "srun", "mpiexec of MPICH", "mpiexec of Open MPI", "horovodrun")

WITHIN_S = 10.0
"""From the failure to the end of the job: nothing may be left of it then."""

TIMEOUT_S = 40.0
"""Of the collectives: no job that ends in time has waited for it."""

STOPPED_TIMEOUT_S = 8.0
"""Where nothing but the timeout can tell that a rank has stopped: so much later may the job end."""

PATIENCE_S = 5.0
"""And so long a rank that hears of it may wait for another to tell the cause."""


class Kind(NamedTuple):
    """A way to fail.

    Attributes:
        cause: what has to be told of it, a regular expression; where the rank itself can tell nothing, it is what the
            launcher says.
        silent: whether the rank ends without a word.
    """

    name: str
    cause: str
    silent: bool = False
    interrupts: int = 0
    timeout_s: float = TIMEOUT_S


KINDS = (
    Kind("raise", "ValueError: boom of rank 1"),
    Kind("raise while others wait", "ValueError: boom of rank 1"),
    Kind("raise in a DataLoader worker", "KeyError: 'no such item'|KeyError: no such item"),
    Kind("raise what cannot be pickled", "Unpicklable: has a lock"),
    Kind("out of memory", "MemoryError"),
    Kind("sys.exit(3)", r"\b3\b|ended without taking part", silent=True),
    Kind("os._exit(4)", r"\b4\b|ended without taking part", silent=True),
    Kind("SIGTERM", r"SIGTERM|[Ss]ignal 15|-15|\b143\b|Terminated", silent=True),
    Kind("SIGKILL", r"SIGKILL|[Ss]ignal 9|-9|\b137\b|Killed|EXIT CODE: 9", silent=True),
    Kind("segmentation fault", r"SIGSEGV|[Ss]ignal 11|-11|\b139\b|Segmentation fault|EXIT CODE: 139", silent=True),
    Kind(
        "SIGSTOP",
        r"(?i)timed out|in time|has not started within|never came|is stopped",
        silent=True,
        timeout_s=STOPPED_TIMEOUT_S,
    ),
    Kind("Ctrl-C", "", silent=True, interrupts=1),
    Kind("Ctrl-C twice", "", silent=True, interrupts=2),
)
KIND = {kind.name: kind for kind in KINDS}


class Cell(NamedTuple):
    launcher: str
    kind: str
    moment: str

    def __str__(self) -> str:
        return ", ".join(self)


class Fact(NamedTuple):
    """What a launcher, or Python, does not give, and idist cannot; where it may be seen, and why it is so.

    Attributes:
        problems: as the driver names them.
        launchers, kinds, moments: regular expressions for whole names.
        busy: whether it is seen only where the machine has more to do than it has cores.
    """

    problems: tuple[str, ...]
    launchers: str
    kinds: str
    moments: str
    reason: str
    busy: bool = False

    def holds(self, cell: Cell) -> bool:
        places = zip((self.launchers, self.kinds, self.moments), cell, strict=True)
        return all(re.fullmatch(pattern, name) for pattern, name in places)


LATE = "it takes longer"
UNTOLD = "the cause is not told"
NOT_LAST = "the cause is not told last"
NO_RANK = "the rank is not told"
PROCESS_LEFT = "a process is left"
FILE_LEFT = "a file is left"
EXIT_CODE_0 = "the exit code is 0"

_EXITS = r"sys\.exit\(3\)|os\._exit\(4\)"
_SIGNALS = "SIGTERM|SIGKILL|segmentation fault"
_MPICH = "mpiexec of MPICH"
_MPI = "mpiexec of (MPICH|Open MPI)"

FACTS = (
    Fact(
        (NOT_LAST,),
        "spawn",
        "raise.*|out of memory",
        "before init",
        "multiprocessing imports the script before anything of idist runs, and shows the traceback itself: it stands "
        "above that of the caller, which names the rank and points there.",
    ),
    Fact(
        (UNTOLD,),
        "spawn",
        r"sys\.exit\(3\)",
        "before init",
        "multiprocessing turns it into exit code 1, and shows nothing. The rank is told.",
    ),
    Fact(
        (UNTOLD, NO_RANK),
        _MPI,
        _EXITS,
        ".*",
        "mpiexec says nothing of a process that ends with an exit code of its own, MPICH's at no time and Open MPI's "
        "not after MPI has ended; its own exit code is that. Ranks that wait for the one that has gone name it.",
    ),
    Fact(
        (NO_RANK,),
        _MPICH,
        _SIGNALS,
        ".*",
        "mpiexec of MPICH names the process and the signal, not the rank, and ends the others before they can tell.",
    ),
    Fact(
        (NO_RANK,),
        ".*",
        "raise.*|out of memory",
        "before init",
        "a rank that fails before `idist.initialize` has nothing but its traceback to show; most launchers add the "
        "rank.",
    ),
    Fact(
        (LATE,),
        _MPICH,
        "raise.*|out of memory|" + _EXITS,
        "before init",
        "mpiexec of MPICH goes on when a process ends with an exit code before MPI has started in it, and MPI starts "
        "with all or not at all. The job ends when `timeout` is over.",
    ),
    Fact(
        (FILE_LEFT,),
        _MPICH,
        ".*",
        "before init",
        "shared memory, where the job is killed while MPI starts; later idist removes its name in time.",
    ),
    Fact(
        (LATE, PROCESS_LEFT, FILE_LEFT, UNTOLD, NO_RANK),
        "torchrun|srun|mpiexec.*|horovodrun",
        "SIGSTOP",
        "during finalize",
        "no rank waits for another there, so no timeout counts: the job waits for the stopped rank as for one that "
        "still computes, until it is continued or Ctrl-C is pressed. `idist.spawn` looks for stopped processes.",
    ),
    Fact(
        (LATE,),
        "torchrun|srun|horovodrun",
        "SIGSTOP",
        "before init|between steps|inside.*",
        "the others end when `timeout` is over, and the launcher then asks the stopped process to end, which cannot "
        "hear it, before it kills it: torchrun waits 30 s, horovodrun 5 to 10, srun what Slurm's KillWait says.",
    ),
    Fact(
        (NO_RANK,),
        "srun|mpiexec.*|horovodrun",
        "SIGSTOP",
        "before init|between steps|inside.*",
        "the ranks that wait know of the timeout, and not all libraries tell whom they waited for.",
    ),
    Fact(
        (LATE, PROCESS_LEFT, FILE_LEFT),
        "mpiexec of Open MPI",
        "raise.*|out of memory|" + _EXITS + "|" + _SIGNALS,
        "before init",
        "where a process ends just while another connects to mpiexec, mpiexec of Open MPI ends the processes and may "
        "then wait for ever, for nobody: end it by hand. In two of fourteen runs.",
    ),
    Fact(
        (EXIT_CODE_0,),
        "horovodrun",
        "Ctrl-C.*",
        ".*",
        "two threads of horovodrun wait for the same process, and where the wrong one hears first of its end, that "
        "counts as exit code 0. Seldom: in one of sixteen runs.",
    ),
    Fact(
        (NOT_LAST,),
        "torchrun|srun|horovodrun",
        "raise.*|out of memory|SIGSTOP",
        "between steps|inside.*",
        "on this machine, which was busy, the rank that failed took longer to end than the others wait with what they "
        "show: theirs stands below it.",
        busy=True,
    ),
)


def cells() -> Iterator[Cell]:
    """The whole matrix."""
    return (Cell(launcher, kind.name, moment) for launcher in LAUNCHERS for kind in KINDS for moment in MOMENTS)


# Defects were found here.
_FOUND = {
    Cell("spawn", "SIGTERM", "before init"),
    Cell("torchrun", "raise", "inside a collective"),
    Cell("mpiexec of MPICH", "sys.exit(3)", "inside backward"),
}


def is_sample(cell: Cell) -> bool:
    """Whether it is one of those that run every time: of each launcher every other kind, at every moment."""
    if cell in _FOUND:
        return True
    if cell.kind == "SIGSTOP":  # where it takes least; torchrun takes half a minute to end a stopped process
        return cell.moment == "inside a collective" and cell.launcher != "torchrun"
    turn = [kind.name for kind in KINDS].index(cell.kind) + LAUNCHERS.index(cell.launcher)
    return turn % 2 == 0 and MOMENTS.index(cell.moment) == turn % len(MOMENTS)


def known(cell: Cell, *, busy: bool) -> set[str]:
    """The problems that may be seen in this cell."""
    facts = [fact for fact in FACTS if fact.holds(cell) and (busy or not fact.busy)]
    return {problem for fact in facts for problem in fact.problems}
