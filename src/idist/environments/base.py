"""What an environment is: a mapping of variables in, a topology out, the standard library alone."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from idist.errors import LaunchError
from idist.topology import Topology


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """Why an environment is not the one we are in.

    Attributes:
        reason: one clause for ``idist check``.
        hint: what the user most likely wants to know, where the variables look like a slip.
    """

    reason: str
    hint: str | None = None


class Environment(ABC):
    """One way in which a process may have been started.

    Add one: a file beside this one, and a line in ``DETECTION_ORDER`` of the package.
    """

    name: ClassVar[str]

    @abstractmethod
    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        """The topology, if ``env`` was set by this launcher, or why it was not.

        Raises:
            LaunchError: the launcher's variables are there but incomplete or contradict each other.
        """


class Variables:
    """Reads the variables of one environment and remembers which ones were believed."""

    def __init__(self, environment: str, env: Mapping[str, str]) -> None:
        self.environment = environment
        self.evidence: tuple[str, ...] = ()
        self._env = env

    def text(self, name: str) -> str:
        """The variable's value; a missing or empty one is a LaunchError that names it."""
        value = self._env.get(name, "")
        if not value:
            found = ", ".join(self.evidence) or "another of its variables"
            raise LaunchError(
                f"{self.environment}: {name} is not set, though found: {found}. Either set {name} as the launcher "
                "would, or unset the others to run as one process."
            )
        self._believe(name, value)
        return value

    def integer(self, name: str) -> int:
        """The variable as an integer, never negative; anything else is a LaunchError that names it."""
        value = self.text(name)
        # Nineteen digits: beyond every rank and size, and before Python's limit on converting text.
        if not (value.isascii() and value.isdecimal() and len(value) < 20):
            raise LaunchError(f"{self.environment}: {name}={value!r} is not a non-negative integer.")
        return int(value)

    def optional_text(self, name: str) -> str | None:
        """The variable's value, if it has one."""
        return self.text(name) if self._env.get(name) else None

    def optional_integer(self, name: str) -> int | None:
        """The variable as an integer, if it has a value; :meth:`integer` says which are none."""
        return self.integer(name) if self._env.get(name) else None

    def _believe(self, name: str, value: str) -> None:
        entry = f"{name}={value}"
        if entry not in self.evidence:
            self.evidence += (entry,)


def on_one_node(topology: Topology, local_rank: int) -> Topology:
    """The same topology, where all processes of the job are known to be on this node."""
    return dataclasses.replace(
        topology, local_rank=local_rank, nproc_per_node=topology.world_size, node_rank=0, nnodes=1
    )
