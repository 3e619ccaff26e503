"""Tasks of a Slurm step. A batch script or an allocation's shell is one process, whatever the job asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.environments import hostlist
from idist.environments.base import Environment, Rejected, Variables
from idist.errors import LaunchError
from idist.topology import Topology

# https://github.com/SchedMD/slurm/blob/master/slurm/slurm.h.in: the step ids above SLURM_MAX_NORMAL_STEP_ID
_LAST_STEP = 0xFFFFFFF0
_SHELLS = {
    0xFFFFFFFA: "an interactive shell of salloc",
    0xFFFFFFFB: "the batch script",
    0xFFFFFFFC: "a process that joined the job from outside",
}
_MOST_PARTS = 128  # MAX_HET_JOB_COMPONENTS there
_SHELL_NAMES = ("bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh")


class Slurm(Environment):
    """One task of srun.

    Only what Slurm says of the STEP is believed: SLURM_NTASKS, SLURM_NNODES and SLURM_JOB_NODELIST
    may be those of the whole job. ``rank // tasks per node`` is wrong for cyclic, plane, uneven and
    heterogeneous steps; SLURM_NODEID and SLURM_LOCALID are right for all of them.

    Source: output variables of https://slurm.schedmd.com/srun.html
    """

    name: ClassVar[str] = "slurm"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        shell = _shell(env)
        if shell is not None:
            return Rejected(shell, _hint(env, shell))
        told = Variables(self.name, env)
        rank, world_size = told.integer("SLURM_PROCID"), told.integer("SLURM_STEP_NUM_TASKS")
        step = _Step(told)
        mixed = step.mixed_with_another(rank)
        if mixed and world_size == 1:
            return Rejected(mixed, _hint(env, mixed))
        if mixed:
            raise LaunchError(
                f"slurm: {mixed}. These are variables of two steps, as after sbatch or salloc inside a task of another "
                "job. Start this program with `srun python ...`, or for one process run `unset ${!SLURM_STEP*}` first."
            )
        if _in_terminal(env):
            raise LaunchError(
                f"slurm: rank {rank} of {world_size} runs under `srun --pty` and a shell, where rank 0 is taken "
                "for the interactive one. Start the program with srun, without --pty."
            )
        chosen = told.optional_text("MASTER_ADDR")
        host, besides = (chosen, ()) if chosen else step.hosts_of_rank_0()
        return Topology(
            self.name,
            rank=rank,
            world_size=world_size,
            local_rank=step.local_rank,
            nproc_per_node=step.tasks_here,
            node_rank=step.node,
            nnodes=step.nnodes,
            # The user's, if set. Without a port the rendezvous derives some from the token.
            master_addr=host,
            hosts=besides,
            master_port=told.optional_integer("MASTER_PORT"),
            job_token=_job_token(told),
            evidence=told.evidence,
        )


class _Step:
    """What a task knows of its step.

    Beware: SLURM_NODEID counts in the order in which the step's parts were given, while
    SLURM_STEP_NODELIST and with it SLURM_STEP_TASKS_PER_NODE are sorted by name. They differ where
    a part of a heterogeneous step has a node that sorts before those of an earlier part. So the
    place in the lists is that of the own name, not that of the node id.
    """

    def __init__(self, told: Variables) -> None:
        self.node, self.nnodes = told.integer("SLURM_NODEID"), told.integer("SLURM_STEP_NUM_NODES")
        self.local_rank = told.integer("SLURM_LOCALID")
        self.counts = told.text("SLURM_STEP_TASKS_PER_NODE")
        self.names = hostlist.hosts(told.text("SLURM_STEP_NODELIST"))
        name = told.optional_text("SLURMD_NODENAME")
        self.name = name if name in self.names else None
        self.tasks_here = hostlist.tasks_on(
            self.counts, self.node if self.name is None else self.names.index(self.name)
        )
        # The ranks on this node. Some programs need it unset, so it may be missing.
        self.ranks_here = (told.optional_text("SLURM_GTIDS") or "").split(",")
        self._told = told

    def mixed_with_another(self, rank: int) -> str | None:
        """Why these cannot be the variables of one step; a shell keeps those of the step it was started from."""
        told = self._told
        job = told.optional_text("SLURM_JOB_NODELIST")
        if job and not set(self.names) <= set(hostlist.hosts(job)):
            return f"SLURM_STEP_NODELIST={','.join(self.names)} is not within SLURM_JOB_NODELIST={job}"
        if hostlist.total_tasks(self.counts) != (self.nnodes, told.integer("SLURM_STEP_NUM_TASKS")):
            return f"SLURM_STEP_TASKS_PER_NODE={self.counts} does not fit SLURM_STEP_NUM_TASKS and SLURM_STEP_NUM_NODES"
        if len(self.names) != self.nnodes:
            return f"SLURM_STEP_NODELIST has {len(self.names)} nodes, but SLURM_STEP_NUM_NODES={self.nnodes}"
        here = self.ranks_here
        if here == [""]:
            return None
        if len(here) != self.tasks_here:
            return (
                f"SLURM_GTIDS={','.join(here)} does not fit the {self.tasks_here} tasks that the step has on this node"
            )
        if here[self.local_rank : self.local_rank + 1] != [str(rank)]:
            return f"SLURM_GTIDS={','.join(here)} does not fit SLURM_PROCID={rank} and SLURM_LOCALID={self.local_rank}"
        return None

    def hosts_of_rank_0(self) -> tuple[str | None, tuple[str, ...]]:
        """The node of rank 0, None where a task cannot know it; and those that it may be on if it is not sure.

        A task cannot know it for an arbitrary distribution (SLURM_HOSTFILE, ``srun -m arbitrary``)
        over three nodes or more, where it is told only which ranks are on its own node. It is not
        sure of three nodes or more in general: of a heterogeneous step in a plain job nothing but
        the node ids tells that the order is unusual, and a task knows only its own.
        SLURM_LAUNCH_NODE_IPADDR is no help: srun runs there, not rank 0.
        """
        if self.nnodes == 1:
            return self.names[0], ()
        if self.nnodes == 2 and self.name is not None and self.ranks_here != [""]:
            other = self.names[1 - self.names.index(self.name)]
            return self.name if "0" in self.ranks_here else other, ()
        distribution = self._told.optional_text("SLURM_DISTRIBUTION") or "block"
        by_node = self._names_by_node_id()
        astray = self.name is not None and by_node[self.node : self.node + 1] != [self.name]
        unknown = distribution.startswith("arbitrary") or astray
        return None if unknown else by_node[0], tuple(self.names)

    def _names_by_node_id(self) -> list[str]:
        """The step's nodes in the order of their ids: part by part where the job is heterogeneous.

        Source: https://slurm.schedmd.com/heterogeneous_jobs.html#env_var
        """
        parts = self._told.optional_integer("SLURM_HET_SIZE") or 0
        ordered: list[str] = []
        for part in range(min(parts, _MOST_PARTS)):
            nodes = self._told.optional_text(f"SLURM_JOB_NODELIST_HET_GROUP_{part}") or self._told.optional_text(
                f"SLURM_JOB_NODELIST_PACK_GROUP_{part}"  # the older name, which srun 22.05 alone sets
            )
            ordered += [name for name in hostlist.hosts(nodes) if name in self.names] if nodes else []
        return ordered if sorted(ordered) == sorted(self.names) else list(self.names)


def _shell(env: Mapping[str, str]) -> str | None:
    """What this process is, if not a task of a step.

    Slurm 22.05 gives the batch script SLURM_PROCID=0 and no step id at all, newer ones a step id
    of its own; an interactive step has a step id and a rank.
    """
    step = env.get("SLURM_STEP_ID", "")
    if not (env.get("SLURM_JOB_ID") or env.get("SLURM_PROCID") or step):
        return "SLURM_JOB_ID is not set"
    if not step:
        return "SLURM_STEP_ID is not set: the batch script or a shell of the job, not a task of srun"
    if not step.isdecimal():
        return f"SLURM_STEP_ID={step} is not a step of srun"
    number = int(step[:20])
    if number > _LAST_STEP:
        return f"SLURM_STEP_ID={step} is {_SHELLS.get(number, 'not a step of srun')}"
    if _in_terminal(env) and env.get("SLURM_PROCID") == "0":
        return "SLURM_PTY_PORT is set: an interactive shell of `srun --pty`"
    return None


def _in_terminal(env: Mapping[str, str]) -> bool:
    """Whether this is ``srun -n4 --pty bash``: four shells, three of which ended at once for want of input.

    What srun starts from such a shell inherits SLURM_PTY_PORT but is step 1 or later, as the shell
    is step 0 of the job that bears its name. Where that does not hold (a job with a name of its
    own, ``srun --pty`` inside salloc), the variables cannot tell the shell from a launched step,
    and the step is believed: waiting for ranks that do not come ends in an error, but as many
    worlds of one would not.
    """
    return bool(
        env.get("SLURM_PTY_PORT")
        and env.get("SLURM_STEP_ID") == "0"
        and env.get("SLURM_STEP_NUM_TASKS") != "1"
        and env.get("SLURM_JOB_NAME") in _SHELL_NAMES
    )


def _hint(env: Mapping[str, str], reason: str) -> str | None:
    """A slip is likely, unless the job asked for one task only."""
    if not env.get("SLURM_JOB_ID") or (env.get("SLURM_NTASKS") or env.get("SLURM_TASKS_PER_NODE")) == "1":
        return None
    return (
        f"inside Slurm job {env['SLURM_JOB_ID']} but not started by srun ({reason}): running one process; "
        "use `srun python ...` for one process per task"
    )


def _job_token(told: Variables) -> str:
    """Job, step and attempt. The job id differs among the tasks of an array, and is one for all parts of a het job."""
    job, step = told.text("SLURM_JOB_ID"), told.text("SLURM_STEP_ID")
    return f"slurm-{job}.{step}-{told.optional_integer('SLURM_RESTART_COUNT') or 0}"
