"""``idist bench``: what the collectives cost here, on the backend and under the launcher that one is on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import idist
from idist import backends, runtime
from idist.cli import measure
from idist.cli.measure import Plan, Result, Row
from idist.errors import BackendUnavailable, ConfigError, LaunchError

_DESCRIPTION = """\
Latency and bandwidth of every collective over sizes, as nccl-tests print them, with every result checked, beside the
bare backend: its own primitive, called in turns with idist's.

Started by a launcher in several processes, these are measured; else --nproc starts some on this machine.
"""
_EPILOG = """\
columns: size in bytes and count in elements, of the larger of what a rank gives and gets; time of one call on the
  slowest rank; algbw = size / time; busbw = algbw times 2(n-1)/n for all_reduce, 1 for broadcast, (n-1)/n for the rest
  (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md); #wrong elements, on all ranks; bare: time of
  idist / time of the bare backend.
examples:
  idist bench --nproc 2                                     two processes on this machine
  idist bench --nproc 2 --compare A,B                  both backends, side by side
  torchrun --nproc-per-node 2 -m idist bench                the processes of a launcher; so with srun, mpiexec, ...
exit codes: 0 all results were right, 1 some were wrong or a backend failed, 2 wrong usage"""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_TIMEOUT_S = 300.0
_WIDTHS = (12, 12, 8, 6, 11, 8, 8, 7, 7)
_HEADS = ("size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong", "bare")
_UNITS_OF_HEADS = ("(B)", "(elements)", "", "", "(us)", "(GB/s)", "(GB/s)", "", "(ratio)")


def add_to(subparsers: Any) -> None:
    """Add this command to the subparsers of argparse."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the collectives",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    spellings = ("--nproc", "--nproc_per_node", "--nproc-per-node")
    parser.add_argument(*spellings, dest="nproc", type=_positive, metavar="N", help="start N processes here")
    parser.add_argument("--backend", metavar="NAME", help="default: what suits this machine")
    parser.add_argument("--compare", type=_names, metavar="A,B", help="several backends, one after the other")
    known = tuple(measure.COLLECTIVES)
    parser.add_argument("--collectives", type=_names, default=known, metavar="A,B", help=f"of {', '.join(known)}")
    parser.add_argument("--minbytes", type=_bytes, default=8, metavar="SIZE", help="bytes, also as in 4K; default: 8")
    parser.add_argument("--maxbytes", type=_bytes, default=16 << 20, metavar="SIZE", help="default: 16M")
    parser.add_argument("--stepfactor", type=_factor, default=8, metavar="F", help="between two sizes; default: 8")
    parser.add_argument("--dtype", choices=measure.DTYPES, default="float32", help="default: float32")
    parser.add_argument("--op", choices=measure.OPS, default="SUM", help="default: SUM")
    parser.add_argument("--turns", type=_positive, default=5, metavar="N", help="measurements of each case; default: 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture too, a png or svg")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Measure each backend, print as it goes, compare.

    Raises:
        ConfigError: the arguments do not fit together, or nobody else is there.
        BackendUnavailable, LaunchError, WorkerFailed: the only backend that was asked for cannot be measured.
    """
    plan, names = _plan(arguments), arguments.compare or (arguments.backend or backends.AUTO,)
    if arguments.plot is not None:
        _require_matplotlib()
    attached = _attached(arguments.nproc)
    show = None if arguments.json else _show
    results: list[Result] = []
    failures: dict[str, str] = {}
    for name in names:
        try:
            results.append(_attach(name, plan, show) if attached else _start(name, arguments.nproc, plan, show))
        except (BackendUnavailable, LaunchError) as error:
            if not arguments.compare:
                raise
            failures[name] = str(error)
    if not attached or runtime.detect(os.environ).rank == 0:
        _print(results, failures, as_json=arguments.json)
        if arguments.plot is not None:
            from idist.cli.plot import draw

            draw(results, arguments.plot)
    return 1 if not results or any(row.wrong for result in results for row in result.rows) else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.compare and arguments.backend:
        raise ConfigError("--compare names the backends itself: leave --backend out")
    unknown = sorted(set(arguments.collectives) - set(measure.COLLECTIVES))
    if unknown:
        raise ConfigError(f"collective {unknown[0]!r} is unknown; expected some of {', '.join(measure.COLLECTIVES)}")
    if arguments.minbytes > arguments.maxbytes:
        raise ConfigError(f"--minbytes {arguments.minbytes} is more than --maxbytes {arguments.maxbytes}")
    sizes = measure.sizes(arguments.minbytes, arguments.maxbytes, arguments.stepfactor)
    return Plan(arguments.collectives, tuple(sizes), arguments.dtype, arguments.op, arguments.turns)


def _attached(nproc: int | None) -> bool:
    """Whether a launcher has started the ranks.

    Raises:
        ConfigError: there is one process only, or both the launcher's and others.
    """
    world_size = runtime.detect(os.environ).world_size
    if world_size == 1 and nproc is None:
        raise ConfigError(
            "one process has nobody to talk to: `idist bench --nproc 2` starts two here, or let a launcher start them: "
            "torchrun --nproc-per-node 2 -m idist bench"
        )
    if world_size > 1 and nproc is not None:
        raise ConfigError(f"--nproc {nproc} starts processes, but a launcher has started {world_size} already")
    return world_size > 1


def _start(name: str, nproc: int, plan: Plan, show: Any) -> Result:
    found: list[Result] = idist.spawn(name, measure.measure, (plan, show), nproc_per_node=nproc, timeout=_TIMEOUT_S)
    return found[0]


def _attach(name: str, plan: Plan, show: Any) -> Result:
    topology = runtime.detect(os.environ)
    runtime.start(backends.create(name), topology, timeout=timedelta(seconds=_TIMEOUT_S))
    try:
        return measure.measure(runtime.get_local_rank(), plan, show)
    finally:
        runtime.finalize()


def _show(result: Result, row: Row) -> None:
    """A line of the table, when it is known; before the first of a collective, and of all, what it is about."""
    lines = []
    if not result.rows:
        lines.append(
            f"idist {idist.__version__}, backend {result.backend} on {result.device}; {result.ranks} ranks on "
            f"{result.nodes} node{'s' if result.nodes > 1 else ''}, started by {result.environment}"
        )
    if not result.rows or result.rows[-1].collective != row.collective:
        lines += ["", row.collective, _line(_HEADS), _line(_UNITS_OF_HEADS)]
    figures = (f"{row.time_us:.1f}", f"{row.algbw:.3f}", f"{row.busbw:.3f}", row.wrong)
    bare = "-" if row.ratio is None else f"{row.ratio:.3f}"
    lines.append(_line((row.size, row.count, row.dtype, row.redop, *figures, bare)))
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _line(cells: Sequence[object]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _print(results: list[Result], failures: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps({"results": [dataclasses.asdict(result) for result in results], "not_run": failures}, indent=2)
        )
        return
    if len(results) > 1:
        print(f"\n{_compared(results)}")
    for name, why in failures.items():
        print(f"\nbackend {name} was not measured: {why}")
    wrong = sum(row.wrong for result in results for row in result.rows)
    print(f"\n{wrong} elements were wrong." if wrong else "\nAll results were right.", flush=True)


def _compared(results: list[Result]) -> str:
    """The backends side by side: the time of each, and how often that of the first it is."""
    first, *others = results
    heads = "".join(f"{other.backend + ' (us)':>16} {'ratio':>7}" for other in others)
    lines = [f"{'collective':<15} {'size (B)':>12} {first.backend + ' (us)':>16}{heads}"]
    for rows in zip(*(result.rows for result in results), strict=True):
        beside = "".join(f"{row.time_us:>16.1f} {row.time_us / rows[0].time_us:>7.2f}" for row in rows[1:])
        lines.append(f"{rows[0].collective:<15} {rows[0].size:>12} {rows[0].time_us:>16.1f}{beside}")
    return "\n".join(lines)


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _factor(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 2")
    return int(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: bytes, or as in 4K, 16M, 1G")
    return int(found[1]) * _UNITS[found[2]]


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
