"""Who started this process? Pure functions of the variables; the first match wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from idist.environments.base import Environment, Rejected
from idist.environments.envvars import EnvVars
from idist.environments.horovod import Horovod
from idist.environments.kubeflow import Kubeflow
from idist.environments.mpi import Mpi
from idist.environments.serial import Serial
from idist.environments.slurm import Slurm
from idist.environments.torchelastic import TorchElastic
from idist.topology import Topology

# The innermost launcher first: srun starts torchrun, mpiexec and horovodrun, which start us. Plain variables come
# last, since batch scripts export RANK and the like for launchers, and serial accepts everything.
DETECTION_ORDER: tuple[Environment, ...] = (
    TorchElastic(),
    Horovod(),
    Mpi(),
    Slurm(),
    Kubeflow(),
    EnvVars(),
    Serial(),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Detection:
    """What was found, and why the candidates before it were not it."""

    topology: Topology
    rejected: tuple[tuple[str, Rejected], ...]

    @property
    def hints(self) -> tuple[str, ...]:
        """What the user most likely wants to know about the rejected candidates.

        Only where nobody else claimed the process: a launcher further down explains what looked like a slip.
        """
        if self.topology.environment != Serial.name:
            return ()
        return tuple(r.hint for _, r in self.rejected if r.hint)


def detect(env: Mapping[str, str]) -> Detection:
    """Find the environment that set ``env``.

    Raises:
        LaunchError: a launcher's variables are half set or contradict each other.
    """
    rejected: list[tuple[str, Rejected]] = []
    for environment in DETECTION_ORDER:
        found = environment.detect(env)
        if isinstance(found, Topology):
            return Detection(found, tuple(rejected))
        rejected.append((environment.name, found))
    raise AssertionError("the serial environment accepts every mapping")
