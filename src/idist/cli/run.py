"""``idist run``: a script and a size in; the command of the tool that starts it out, and executed in our place.

It is no launcher of its own: after ``exec`` the process is the tool, with its signals and exit codes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from idist import environments
from idist.errors import ConfigError, LaunchError
from idist.launchers import commands
from idist.launchers.commands import PYTHON, SRUN, TOOLS, TORCHRUN, Command, Request, Tool
from idist.topology import SERIAL, Topology

_DESCRIPTION = """\
Start a script in several processes with the tool that does it here, and become that tool.

Without the choice of a tool: one process without --nproc; srun inside an allocation of Slurm; else torchrun.
What comes after the script belongs to the script.
"""
_EXAMPLES = """\
examples:
  idist run --nproc 4 train.py --epochs 10                  four processes on this machine
  idist run --nproc 4 --nnodes 2 --node-rank 0 --master node1:29500 train.py
                                                            on each of two nodes, with its own --node-rank
  idist run --slurm --nproc 4 --nnodes 2 train.py           the same with one command, through Slurm
  idist run --sbatch job.sh --nproc 4 --nnodes 2 train.py   the same as a batch script: sbatch job.sh
"""


def add_to(subparsers: Any) -> None:
    """Add this command to the subparsers of argparse."""
    parser = subparsers.add_parser(
        "run",
        help="start a script in several processes",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    spellings = ("--nproc", "--nproc_per_node", "--nproc-per-node")
    parser.add_argument(*spellings, dest="nproc", type=_positive, metavar="N", help="processes per node")
    parser.add_argument("--nnodes", type=_positive, metavar="N", help="nodes; default: this one, or the allocation's")
    parser.add_argument("--node-rank", "--node_rank", type=int, metavar="I", help="index of this node")
    parser.add_argument("--master", metavar="HOST:PORT", help="node 0, and a free port there, where the nodes meet")
    parser.add_argument("--hosts", type=_names, default=(), metavar="A,B", help="the nodes, for tools that reach them")
    choice = parser.add_mutually_exclusive_group()
    for tool in TOOLS:
        choice.add_argument(
            f"--{tool.flag}", dest="tool", action="store_const", const=tool, help=f"start it with {tool.program}"
        )
    parser.add_argument("--sbatch", type=Path, metavar="FILE", help="write a batch script for Slurm, start nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what would be executed or written, that is all")
    # As of a subcommand: the first positional and all that follows, also a -- among it, which REMAINDER would drop.
    parser.add_argument("script", nargs=argparse.PARSER, help="the Python file to run, and its arguments")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Become the tool. Returns only if nothing is to be executed.

    Raises:
        ConfigError: the arguments contradict each other, or there is no such script.
        LaunchError: the tool is not installed, or a launcher has started this very process already.
    """
    request = Request(
        script=tuple(arguments.script[arguments.script[0] == "--" :]),
        nproc=arguments.nproc,
        nnodes=arguments.nnodes,
        node_rank=arguments.node_rank,
        master=arguments.master,
        hosts=arguments.hosts,
    )
    if not arguments.dry_run and not Path(request.script[0]).exists():
        raise ConfigError(f"there is no script {request.script[0]!r} in {Path.cwd()}")
    if arguments.sbatch is not None:
        if arguments.tool not in (None, SRUN):
            raise ConfigError(f"--sbatch writes a batch script for srun, not for {arguments.tool.program}")
        return _write(arguments.sbatch, request, only_print=arguments.dry_run)
    tool = arguments.tool or choose(request, os.environ)
    refuse_second_launch(tool, request, os.environ)
    command = tool.checked(request, os.environ)
    _say(*command.notes)
    if not arguments.dry_run:
        _become(tool.found(command, os.environ))
    return _show(tool, command)


def choose(request: Request, env: Mapping[str, str]) -> Tool:
    """The tool for a user who named none. srun, inside an allocation; said aloud, since it may be a surprise."""
    if _in_allocation(env) and request.node_rank is None and request.master is None and not request.hosts:
        _say(f"inside Slurm job {env['SLURM_JOB_ID']}: using srun (--{TORCHRUN.flag} stays on this node)")
        return SRUN
    return TORCHRUN if request.placing() else PYTHON


def refuse_second_launch(tool: Tool, request: Request, env: Mapping[str, str]) -> None:
    """Each process of a launcher would start a job of its own. Only agents of torchrun may be started so, one per node.

    Raises:
        LaunchError: it would.
    """
    topology = _detected(env)
    agents = tool is TORCHRUN and (request.nnodes or 1) > 1
    if topology is None or topology.world_size == 1 or tool is PYTHON or agents:
        return
    raise LaunchError(
        f"{topology.environment} has started {topology.world_size} processes already, and each of them would start a "
        f"job of its own ({', '.join(topology.evidence)}). Start the script itself in them, or use `idist run` alone."
    )


def _in_allocation(env: Mapping[str, str]) -> bool:
    """A batch script or a shell of a job. A task of a step is none: srun there would wait for the step to end."""
    return bool(env.get("SLURM_JOB_ID")) and _detected(env) == SERIAL


def _detected(env: Mapping[str, str]) -> Topology | None:
    try:
        return environments.detect(env).topology
    except LaunchError:  # left over in this shell; the tool sets them anew, and plain Python says what is wrong
        return None


def _write(path: Path, request: Request, *, only_print: bool) -> int:
    script = commands.batch_script(request, os.getcwd())
    if only_print:
        print(script, end="")
        return 0
    if path.exists():
        raise ConfigError(f"{path} exists already and is left as it is; remove it, or choose another name")
    path.write_text(script)
    _say(f"wrote {path}. Submit it with: sbatch {path}")
    return 0


def _show(tool: Tool, command: Command) -> int:
    """As it would be executed here; with a bare name if it would not, for the machine where it will be."""
    try:
        command = tool.found(command, os.environ)
    except LaunchError as error:
        _say(str(error))
    print(command)
    return 0


def _become(command: Command) -> NoReturn:
    sys.stdout.flush()
    os.execvp(command.argv[0], command.argv)


def _say(*lines: str) -> None:
    for line in lines:
        print(f"idist run: {line}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
