"""What a tool is: a request in, the command line of a real launcher out."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from idist.errors import ConfigError, LaunchError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user wants to be started.

    Attributes:
        script: with its arguments.
        nproc: processes per node.
        nnodes: number of nodes.
        node_rank: index of this node.
        master: ``host:port`` where the nodes meet, of node 0.
        hosts: the nodes, for tools that reach them by themselves.
    """

    script: tuple[str, ...]
    nproc: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    hosts: tuple[str, ...] = ()

    @property
    def python(self) -> tuple[str, ...]:
        """The script, run by this Python."""
        return (sys.executable, *self.script)

    def placing(self) -> dict[str, object]:
        """What was given of where processes are to run."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "script"}
        return {name: value for name, value in fields.items() if value not in (None, ())}


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A command line, and what the user should know about options that nobody asked for."""

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.argv)


class Tool(ABC):
    """A launcher that is a program of its own.

    Attributes:
        flag: of `idist run`, that chooses it.
        program: its name, for messages.
        source: where it comes from, for a user who does not have it.
        takes: the fields of :class:`Request` that mean something to it.
    """

    flag: ClassVar[str]
    program: ClassVar[str]
    source: ClassVar[str]
    takes: ClassVar[frozenset[str]]

    @abstractmethod
    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """The command line, with the program by its name alone, or Python by its path.

        Raises:
            ConfigError: the request is incomplete or contradicts itself.
        """

    def checked(self, request: Request, env: Mapping[str, str]) -> Command:
        """:meth:`command`, of a request in which nothing is left without effect."""
        for name in request.placing():
            if name not in self.takes:
                known = ", ".join(map(spelled, sorted(self.takes)))
                raise ConfigError(f"{spelled(name)} means nothing to {self.program}, which takes {known}")
        return self.command(request, env)

    def found(self, command: Command, env: Mapping[str, str]) -> Command:
        """The command line of :meth:`checked`, made sure that its program is here.

        Raises:
            LaunchError: it is not; says where it comes from.
        """
        program = find(command.argv[0], env)
        if program is None:
            raise LaunchError(f"{self.program} is neither beside this Python nor on PATH. {self.source}")
        return dataclasses.replace(command, argv=(program, *command.argv[1:]))


def find(program: str, env: Mapping[str, str]) -> str | None:
    """How to call the program of this Python's environment, or else that on PATH: by name where that will do.

    Two MPIs on one machine do not understand each other, so that of the environment counts.
    """
    on_path = shutil.which(program, path=env.get("PATH", os.defpath))
    beside = shutil.which(program, path=str(Path(sys.executable).parent))
    if on_path is None or beside not in (None, on_path):
        return beside
    return program


def spelled(name: str) -> str:
    """A field of :class:`Request` as an option."""
    return f"--{name.replace('_', '-')}"
