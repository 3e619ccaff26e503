"""``idist check``: what one needs to see before asking for help. Started by a launcher, it tries the connection too."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from idist import backends
from idist.cli import sections, trial
from idist.cli.sections import Section
from idist.cli.trial import Trial
from idist.errors import BackendUnavailable
from idist.topology import Topology

_DESCRIPTION = """\
Show what idist finds here: versions, devices, backends, who started this process, the network.

Started by a launcher in several processes, all of them meet and reduce something; rank 0 reports. Start it as you
start your script, for example: srun -N2 -n4 python -m idist check
"""
_EXIT_CODES = "exit codes: 0 no problem found, 1 a problem found, 2 wrong usage"
_TIMEOUT_S = 60.0
_LABEL = 12


def add_to(subparsers: Any) -> None:
    """Add this command to the subparsers of argparse."""
    parser = subparsers.add_parser(
        "check",
        help="show what is found here, and try it",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--backend", metavar="NAME", help="try this one, also where there is one process only")
    parser.add_argument("--timeout", type=_seconds, default=_TIMEOUT_S, metavar="S", help="seconds; default: 60")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(execute=execute)


@dataclasses.dataclass
class Report:
    """What was found in this process; a rank other than 0 prints only its problems."""

    sections: list[Section]
    topology: Topology | None
    problems: list[str]
    trial: Trial | None = None

    @property
    def hints(self) -> list[str]:
        """What may be a slip."""
        return [hint for section in self.sections for hint in section.hints]

    @property
    def first(self) -> bool:
        """Whether this process reports: rank 0 or, where no ranks are known, each."""
        return self.topology is None or self.topology.rank == 0


def execute(arguments: argparse.Namespace) -> int:
    """Look, print, try, print the result.

    What was found is printed before the trial: some libraries end the process when they fail.

    Raises:
        ConfigError: no backend has the name that was asked for.
    """
    report = examine(os.environ, arguments.backend)
    shows = report.first and not arguments.json
    if shows:
        print(_text(report.sections), flush=True)
    _try(report, arguments.backend, timedelta(seconds=arguments.timeout))
    if shows:
        print(_conclusion(report), flush=True)
    elif report.first:
        print(json.dumps(as_data(report), indent=2), flush=True)
    else:
        _tell(report)
    return 1 if report.problems else 0


def examine(env: Mapping[str, str], backend: str | None) -> Report:
    """Everything that can be seen without talking to the other ranks.

    Raises:
        ConfigError: no backend has this name.
    """
    environment, detection = sections.environment(env)
    topology = detection.topology if detection else None
    shown = topology.evidence if topology else ()
    found: list[Section | None] = [sections.software(), sections.devices(), sections.usable_backends(backend)]
    found += [environment, sections.place(topology) if topology else None]
    found += [sections.slurm(env, shown), sections.interfaces(env, topology.nnodes if topology else 1)]
    found += [sections.master(topology) if topology else None]
    found += [sections.variables(env, shown)]
    there = [section for section in found if section is not None]
    return Report(there, topology, [problem for section in there for problem in section.problems])


def as_data(report: Report) -> dict[str, Any]:
    """The report for programs."""
    data = {section.title: section.data for section in report.sections}
    tried = None if report.trial is None else dataclasses.asdict(report.trial)
    return data | {"all_reduce": tried, "hints": report.hints, "problems": report.problems}


def _try(report: Report, backend: str | None, timeout: timedelta) -> None:
    """Connect the ranks; one process only if a backend was asked for by name. What goes wrong is a problem found."""
    topology = report.topology
    if topology is None or (topology.world_size == 1 and backend is None):
        return
    name = backend or backends.AUTO
    software = ", ".join(f"{key} {report.sections[0].data[key]}" for key in ("idist", "python", "torch"))
    # Whether the master could be reached is no question any more once all have met there.
    lasting = [section.problems for section in report.sections if section.title != "master"]
    problems = tuple(problem for each in lasting for problem in each)
    try:
        report.trial = trial.run(name, topology, timeout=timeout, software=software, problems=problems)
    except BackendUnavailable:
        return  # among the problems already
    except Exception as error:  # whatever a communication library raises is what the user came to see
        report.problems.append(f"all-reduce with backend {name!r}: {type(error).__name__}: {error}")
        return
    report.problems[:] = _found_by_all(report.trial)


def _found_by_all(tried: Trial) -> list[str]:
    """The problems of every rank; each once, with those who have it."""
    holders: dict[str, list[str]] = {}
    for seat in tried.seats:
        wrong = () if seat.right else ("the result of the all-reduce is wrong",)
        for problem in (*seat.problems, *wrong):
            holders.setdefault(problem, []).append(str(seat.rank))
    problems = [f"rank {', '.join(ranks)}: {problem}" for problem, ranks in holders.items()]
    versions = {seat.software: f"rank {seat.rank} on {seat.host} has {seat.software}" for seat in reversed(tried.seats)}
    if len(versions) > 1:
        problems.append(f"the ranks run different versions: {'; '.join(reversed(versions.values()))}")
    return problems


def _text(found: list[Section]) -> str:
    lines = []
    for section in found:
        width = max([_LABEL, *(len(label) for label, _ in section.rows)])
        rows = [f"  {label:{width}}  {text}" for label, text in section.rows]
        lines += [section.title, *rows] if rows else []
    return "\n".join(lines)


def _conclusion(report: Report) -> str:
    lines = [] if report.trial is None else _table(report.trial)
    lines += ["", *(f"hint: {hint}" for hint in report.hints)] if report.hints else []
    count = len(report.problems)
    lines += ["", f"{count} problem{'s' if count > 1 else ''} found:" if count else "No problem found."]
    lines += [f"  {number}. {problem}" for number, problem in enumerate(report.problems, 1)]
    return "\n".join(lines)


def _table(tried: Trial) -> list[str]:
    head = ("rank", "host", "process", "device", "result", "time")
    rows = [
        (str(s.rank), s.host, str(s.pid), s.device, "right" if s.right else "WRONG", f"{s.milliseconds:.1f} ms")
        for s in tried.seats
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    title = f"all-reduce: {tried.backend} over {len(rows)} ranks, which met in {tried.seconds:.1f} s"
    cells = ([f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in (head, *rows))
    return [title, *(f"  {'  '.join(row)}".rstrip() for row in cells)]


def _tell(report: Report) -> None:
    """A rank other than 0 says only what rank 0 cannot know."""
    if report.trial is None and report.topology is not None:
        for problem in report.problems:
            print(f"rank {report.topology.rank} on {socket.gethostname()}: {problem}", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
