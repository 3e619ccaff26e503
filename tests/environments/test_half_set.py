"""Half-set and contradicting variables: an error that names what is missing, never one process on the quiet."""

from __future__ import annotations

import corpus
import pytest

from idist.environments import detect
from idist.errors import LaunchError

NEEDED = {
    "torchrun --nproc-per-node 2": (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    "srun -N2 -n3": (
        "SLURM_JOB_ID",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_NUM_NODES",
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_TASKS_PER_NODE",
    ),
    "mpiexec -n 3 (MPICH 5.0.2)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "mpirun -np 4 (Open MPI 5.0.11)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "horovodrun -np 2 --gloo": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "a PyTorchJob of two pods that run python": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "pods of an operator without PET variables": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
CASES = [(name, variable) for name, variables in NEEDED.items() for variable in variables]


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize(("name", "variable"), CASES)
def test_a_missing_variable_is_named(name: str, variable: str, value: str | None) -> None:
    variables = dict(corpus.launch(name).processes[1].variables)
    del variables[variable]
    if value is not None:
        variables[variable] = value
    with pytest.raises(LaunchError, match=f"{variable} is not set.*(unset|set RANK)"):
        detect(variables)


@pytest.mark.parametrize("value", ["two", "-1", "1.0", "0x1", "\N{ARABIC-INDIC DIGIT TWO}", "9" * 5000])
@pytest.mark.parametrize(("name", "variable"), [case for case in CASES if case[1].endswith(("RANK", "SIZE"))])
def test_a_variable_that_is_no_number_is_named(name: str, variable: str, value: str) -> None:
    variables = {**corpus.launch(name).processes[1].variables, variable: value}
    with pytest.raises(LaunchError, match=variable):
        detect(variables)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "RANK"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "MASTER_PORT"),
        ({"HOROVOD_SIZE": "2"}, "HOROVOD_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({"MPI_LOCALRANKID": "0"}, "PMI_RANK"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "RANK"),
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}, "SLURM_PROCID"),
    ],
)
def test_variables_alone(variables: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        detect(variables)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("torchrun --nproc-per-node 2", {"RANK": "2"}, "rank 2 is not in the range of 2"),
        ("torchrun --nproc-per-node 2", {"LOCAL_RANK": "2"}, "local rank 2"),
        ("torchrun --nproc-per-node 2", {"LOCAL_WORLD_SIZE": "3"}, "3 processes on this node"),
        ("torchrun --nproc-per-node 2", {"WORLD_SIZE": "4"}, "2 processes on this node leave 2"),
        ("torchrun --nproc-per-node 2", {"GROUP_WORLD_SIZE": "2"}, "for 1 other nodes"),
        ("torchrun --nproc-per-node 2", {"MASTER_PORT": "65536"}, "master port 65536"),
        ("srun -N2 -n3", {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "two steps"),
        ("srun -N2 -n3", {"SLURM_STEP_TASKS_PER_NODE": "2;1"}, "not a list of tasks per node"),
        ("srun -N2 -n3", {"SLURM_STEP_NODELIST": "node[1-"}, "not a host list"),
        ("srun -N2 -n3", {"SLURM_STEP_NODELIST": "node[1-3]"}, "two steps"),
        ("srun -N2 -n3", {"SLURM_STEP_NUM_NODES": "3"}, "two steps"),
        ("srun -N2 -n3", {"SLURM_PROCID": "2"}, "SLURM_PROCID=2"),
        ("srun -N2 -n3", {"SLURM_GTIDS": "0"}, "SLURM_GTIDS=0"),
        ("srun -N4 -n5", {"SLURM_NODEID": "7"}, "node rank 7"),
        ("two processes of one node, set by hand", {"NNODES": "2", "NODE_RANK": "0"}, "for 1 other nodes"),
        ("two processes of one node, set by hand", {"LOCAL_WORLD_SIZE": "1", "NNODES": "1"}, "local rank 1"),
        ("two processes of one node, set by hand", {"WORLD_SIZE": "3", "NNODES": "1"}, "for 0 other nodes"),
    ],
)
def test_contradictions(name: str, wrong: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        detect({**corpus.launch(name).processes[1].variables, **wrong})


def test_a_range_of_nodes_for_torchruns_command_line_is_not_ours() -> None:
    variables = corpus.launch("local ranks 0 1 0 on two nodes, set by hand").processes[0].variables
    assert not detect({**variables, "NNODES": "1:3", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}).topology.placed
