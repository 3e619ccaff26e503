"""What each launcher sets, and what has to be found in it."""

from __future__ import annotations

from collections import Counter

import corpus
import pytest
from corpus import LAUNCHES, PROCESSES, Launch, Process

from idist.environments import DETECTION_ORDER, Detection, detect
from idist.errors import LaunchError
from idist.topology import Topology

TOGETHER = [launch for launch in LAUNCHES if not launch.fails]
SURE = {name: process for name, process in PROCESSES.items() if not process.error}
UNSURE = {name: process for name, process in PROCESSES.items() if process.error}


def topologies(launch: Launch) -> list[Topology]:
    return [detect(process.variables).topology for process in launch.processes]


STEPS = [launch for launch in TOGETHER if topologies(launch)[0].environment == "slurm"]


def nodes(topology: Topology) -> tuple[int, int, int, int] | None:
    if not topology.placed:
        return None
    return (topology.local_rank, topology.nproc_per_node, topology.node_rank, topology.nnodes)


@pytest.mark.parametrize("process", SURE.values(), ids=SURE.keys())
def test_a_process_finds_its_place(process: Process) -> None:
    """KNOWN-FAILURES 9, 10, 20, 21, 27."""
    detection = detect(process.variables)
    found = detection.topology
    assert found.environment == process.environment
    assert nodes(found) == (process.nodes if found.environment != "serial" else (0, 1, 0, 1))
    assert found.master_addr == process.master_addr
    assert bool(detection.hints) == bool(process.hint), detection.hints
    assert all(word in "".join(detection.hints) for word in process.hint)


@pytest.mark.parametrize("process", UNSURE.values(), ids=UNSURE.keys())
def test_a_process_that_cannot_know_its_place_says_so(process: Process) -> None:
    with pytest.raises(LaunchError) as caught:
        detect(process.variables)
    assert all(word in str(caught.value) for word in process.error)


@pytest.mark.parametrize("launch", TOGETHER, ids=lambda launch: launch.name)
def test_the_processes_of_a_launch_agree(launch: Launch) -> None:
    """KNOWN-FAILURES 10, 20: judged by where each process really ran, not by its variables."""
    found = topologies(launch)
    if found[0].environment == "serial":
        return
    hosts = [process.host for process in launch.processes]
    assert [each.rank for each in found] == list(range(len(hosts)))
    assert {each.world_size for each in found} == {len(hosts)}
    assert len({each.placed for each in found}) == 1, "some would exchange their hosts and some would not"
    assert len({(each.job_token, each.master_port, each.store_served) for each in found}) == 1
    if found[0].placed:
        assert_placed_where_they_ran(found, hosts)


def assert_placed_where_they_ran(found: list[Topology], hosts: list[str]) -> None:
    per_host = Counter(hosts)
    assert [each.nproc_per_node for each in found] == [per_host[host] for host in hosts]
    assert {each.nnodes for each in found} == {len(per_host)}
    assert len({(each.node_rank, host) for each, host in zip(found, hosts, strict=True)}) == len(per_host)
    assert sorted({each.node_rank for each in found}) == list(range(len(per_host)))
    places = {(each.node_rank, each.local_rank) for each in found}
    assert len(places) == len(found)
    assert all(each.local_rank < each.nproc_per_node for each in found)


@pytest.mark.parametrize("launch", STEPS, ids=lambda launch: launch.name)
def test_slurm_meets_on_the_node_of_rank_0_or_asks(launch: Launch) -> None:
    """KNOWN-FAILURES 20: neither the job's first node nor the step's, nor where srun runs."""
    if "MASTER_ADDR" in launch.processes[0].variables:
        assert {each.master_addr for each in topologies(launch)} == {"node1.example"}
        return
    rank_0 = launch.processes[0].host
    told = {each.master_addr for each in topologies(launch)}
    three_in_any_order = launch.name in (
        "SLURM_HOSTFILE with node4 node2 node2 node4 node1, srun -n5",
        "the same in salloc -N4",
    )
    if launch.name == "srun -w node2 -n1 : -w node1 -n2 : -w node3 -n1 in salloc -N3":
        assert topologies(launch)[0].master_addr is None, "rank 0 knows that the order of the nodes is not the usual"
        return
    assert told == ({None} if three_in_any_order else {rank_0})


def test_the_tokens_of_different_jobs_steps_and_attempts_differ() -> None:
    """KNOWN-FAILURES 20: jobs that share a host, and steps of one job side by side, must not be cross-wired."""
    tokens = [topologies(launch)[0].job_token for launch in STEPS]
    assert None not in tokens
    assert len(set(tokens)) == len(tokens)


def test_torchrun_agents_agree_on_the_token_though_their_restart_counts_differ() -> None:
    """Each agent counts the failures of its own workers only: here 0 on rank 0 and 1 on rank 1."""
    launch = corpus.launch(
        "torchrun --nnodes 2 --max-restarts 2 --rdzv-backend c10d, after the worker of one agent died"
    )
    assert [each.variables["TORCHELASTIC_RESTART_COUNT"] for each in launch.processes] == ["0", "1"]
    assert {each.job_token for each in topologies(launch)} == {"torchelastic-job7"}


def test_a_restart_on_one_node_changes_the_token() -> None:
    variables = dict(corpus.launch("torchrun --nproc-per-node 2").processes[0].variables)
    first = detect(variables).topology.job_token
    assert detect(variables | {"TORCHELASTIC_RESTART_COUNT": "1"}).topology.job_token != first


@pytest.mark.parametrize(("value", "served"), [("True", True), ("False", False), ("", False)])
def test_torchrun_says_whether_its_agent_serves_the_store(value: str, served: bool) -> None:
    variables = dict(corpus.launch("torchrun --nproc-per-node 2").processes[0].variables)
    assert detect(variables | {"TORCHELASTIC_USE_AGENT_STORE": value}).topology.store_served is served


def test_torchrun_wins_inside_srun() -> None:
    """KNOWN-FAILURES 9: SLURM_LOCALID is the agent's there."""
    launch = corpus.launch("srun torchrun --nnodes 2 --rdzv-backend c10d --nproc-per-node 2, in sbatch -N2")
    assert {each.variables["SLURM_LOCALID"] for each in launch.processes} == {"0"}
    assert [each.local_rank for each in topologies(launch)] == [0, 1, 0, 1]


def test_open_mpi_local_ranks_do_not_follow_the_ranks() -> None:
    assert [each.local_rank for each in topologies(corpus.launch("mpirun -np 4 (Open MPI 5.0.11)"))] == [0, 2, 1, 3]


@pytest.mark.parametrize("name", ["srun -N2 -n4, filled node by node", "mpiexec -n 3 (MPICH 5.0.2)"])
def test_the_address_that_the_user_exports_wins(name: str) -> None:
    variables = {**corpus.launch(name).processes[1].variables, "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29501"}
    found = detect(variables).topology
    assert (found.master_addr, found.master_port) == ("10.1.2.3", 29501)


def test_slurm_without_the_variables_that_some_programs_need_unset() -> None:
    """SLURM_GTIDS upsets some programs, so users unset it; srun's documentation says so."""
    for process in corpus.launch("srun -N2 -n3 --distribution=cyclic").processes:
        variables = {key: value for key, value in process.variables.items() if key != "SLURM_GTIDS"}
        found = detect(variables).topology
        assert (nodes(found), found.master_addr) == (process.nodes, "node1")


def test_slurm_meets_in_the_first_of_the_parts_that_the_step_has() -> None:
    """Parts 2 to 4 of five, where the first of them sorts last."""
    shared = {
        **corpus.launch("srun -N4 -n5").processes[0].variables,
        "SLURM_HET_SIZE": "5",
        "SLURM_JOB_NODELIST": "node[1-4]",
        **{f"SLURM_JOB_NODELIST_HET_GROUP_{i}": f"other{i}" for i in range(2)},
        "SLURM_JOB_NODELIST_HET_GROUP_2": "node4",
        "SLURM_JOB_NODELIST_HET_GROUP_3": "node[2-3]",
        "SLURM_JOB_NODELIST_HET_GROUP_4": "node1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    }
    for rank, host in enumerate(["node4", "node2", "node3", "node1"]):
        own = {name: str(rank) for name in ("SLURM_PROCID", "SLURM_NODEID", "SLURM_GTIDS")}
        found = detect({**shared, **own, "SLURM_LOCALID": "0", "SLURMD_NODENAME": host}).topology
        assert (found.master_addr, nodes(found)) == ("node4", (0, 1, rank, 4))


def test_evidence_names_what_was_believed() -> None:
    process = corpus.launch("srun -r2 -N2 in salloc -N4").processes[1]
    evidence = detect(process.variables).topology.evidence
    assert "SLURM_PROCID=1" in evidence
    assert "SLURM_STEP_NODELIST=node[3-4]" in evidence
    assert all(process.variables[name] == value for name, value in (each.split("=", 1) for each in evidence))


def test_what_was_rejected_is_told_in_order() -> None:
    detection = detect({"RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "2"})
    names = [environment.name for environment in DETECTION_ORDER]
    assert names == ["torchelastic", "horovod", "mpi", "slurm", "kubeflow", "envvars", "serial"]
    assert [name for name, _ in detection.rejected] == names[:5]
    assert all(rejected.reason for _, rejected in detection.rejected)


def test_no_hint_where_another_launcher_explains_the_variables() -> None:
    job = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"}
    assert detect(job).hints
    detection: Detection = detect({**job, "RANK": "0", "WORLD_SIZE": "1"})
    assert detection.topology.environment == "envvars"
    assert not detection.hints
