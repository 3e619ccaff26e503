"""The command line: ``idist check``, ``idist run`` and ``idist bench``. Each command is a file with ``add_to``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import idist
from idist.cli import bench, check, run
from idist.errors import ConfigError, IdistError
from idist.launchers.argv import drop_local_rank

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0: all is well; 1: a problem was found, or something could not be done; 2: wrong usage.
    """
    drop_local_rank()
    parser = argparse.ArgumentParser(prog="idist", description="PyTorch distributed: one script, every way to run it.")
    parser.add_argument("--version", action="version", version=f"idist {idist.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    check.add_to(commands)
    run.add_to(commands)
    bench.add_to(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.execute(arguments)
    except IdistError as error:
        print(f"idist: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return code
