"""`idist check`: what a person reads, what a program reads, what is found wrong."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import idist
from idist import backends
from idist.cli import check, main, sections
from idist.cli.trial import Seat, Trial
from idist.topology import Topology

# A process starts without these, whatever is set where the tests run.
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "SLURM_JOB_ID")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*arguments: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "idist", "check", *arguments],
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def serial() -> subprocess.CompletedProcess[str]:
    return run()


@pytest.fixture(scope="module")
def as_json() -> dict[str, Any]:
    done = run("--json", "--backend", "gloo")
    assert (done.returncode, done.stderr) == (0, "")
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_shows_every_section(serial) -> None:
    assert (serial.returncode, serial.stderr) == (0, "")
    titles = [line for line in serial.stdout.splitlines() if line and not line.startswith(" ")]
    expected = ["software", "devices", "backends", "environment", "topology", "network", "No problem found."]
    assert [title for title in titles if title != "variables"] == expected


def test_shows_what_a_bug_report_needs(serial) -> None:
    for fact in (idist.__version__, torch.__version__, sys.executable, "not slurm", "SLURM_JOB_ID is not set"):
        assert fact in serial.stdout


def test_json_has_the_same_and_the_trial(as_json) -> None:
    assert as_json["software"]["torch"] == torch.__version__
    assert as_json["backends"]["gloo"] == {"usable": True}
    assert as_json["environment"]["name"] == "serial"
    assert as_json["environment"]["rejected"]["slurm"] == "SLURM_JOB_ID is not set"
    assert as_json["topology"]["world_size"] == 1
    assert {interface["name"] for interface in as_json["network"]["interfaces"]} >= {"lo"}
    assert [(seat["rank"], seat["right"]) for seat in as_json["all_reduce"]["seats"]] == [(0, True)]
    assert as_json["problems"] == []


def test_a_backend_is_unusable_for_the_reason_that_its_user_would_hear(as_json) -> None:
    """Two classes may have one name: mpi is ours where torch was built without it."""
    for name, told in as_json["backends"].items():
        if not told["usable"]:
            with pytest.raises(idist.BackendUnavailable) as heard:
                backends.create(name)
            assert (told["why"], told["fix"]) == (heard.value.reason, heard.value.fix)


def test_unusable_backends_say_why_and_what_to_do(as_json) -> None:
    unusable = [backend for backend in as_json["backends"].values() if not backend["usable"]]
    assert unusable
    assert all(backend["why"] and backend["fix"] for backend in unusable)


def test_under_torchrun_every_rank_has_a_line() -> None:
    done = run(launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("topology") == 1
    table = done.stdout.partition("all-reduce: gloo over 2 ranks, which met in ")[2].splitlines()
    rows = [line.split() for line in table[2:4]]
    assert [(row[0], row[1], row[3], row[4]) for row in rows] == [
        (str(rank), idist.hostname(), "cpu", "right") for rank in range(2)
    ]
    assert rows[0][2] != rows[1][2]
    assert "No problem found." in done.stdout


def test_a_half_set_environment_is_a_finding(capsys) -> None:
    done = run(RANK="0")
    assert (done.returncode, done.stderr) == (1, "")
    assert "1 problem found:\n  1. envvars: WORLD_SIZE is not set, though found: RANK=0." in done.stdout


def test_ranks_that_do_not_come_are_named() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = run("--timeout", "2", **place)
    assert done.returncode == 1
    assert "1 of 2 ranks met in time; never came: rank 1." in done.stdout


def test_a_master_that_is_not_there(serial) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "9"}
    done = run("--timeout", "1", **place)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the name nowhere.invalid cannot be resolved" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="nccl is there")
def test_a_backend_that_was_asked_for_has_to_be_usable() -> None:
    done = run("--backend", "nccl")
    assert done.returncode == 1
    assert "1 problem found:\n  1. backend 'nccl' cannot be used here: this torch" in done.stdout


def test_an_unknown_backend_is_wrong_usage(capsys) -> None:
    assert main(["check", "--backend", "glo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Did you mean 'gloo'?" in printed.err


@pytest.mark.parametrize("arguments", [["check", "--timeout", "0"], ["check", "more"], ["chekc"], []])
def test_wrong_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("usage: idist")


def test_an_interface_that_is_not_there_is_a_problem() -> None:
    def problems(**env: str) -> tuple[str, ...]:
        return sections.interfaces(env, nnodes=1).problems

    assert problems(GLOO_SOCKET_IFNAME="lo") == problems(NCCL_SOCKET_IFNAME="^docker") == ()
    (problem,) = problems(GLOO_SOCKET_IFNAME="ib7")
    assert problem.startswith("GLOO_SOCKET_IFNAME=ib7 names no interface")


def test_variables_are_shown_once() -> None:
    section = sections.variables({"MASTER_ADDR": "a", "OMP_NUM_THREADS": "1", "HOME": "/"}, ("MASTER_ADDR=a",))
    assert section is not None
    assert section.data == {"MASTER_ADDR": "a", "OMP_NUM_THREADS": "1"}
    assert section.rows == [("OMP_NUM_THREADS", "1")]


def test_slurm_is_shown_where_it_is() -> None:
    assert sections.slurm({"PATH": "/bin"}, ()) is None
    section = sections.slurm({"SLURM_JOB_ID": "7", "SLURM_TOPOLOGY_ADDR": "node1"}, ())
    assert section is not None
    assert section.rows == [("SLURM_JOB_ID", "7")]
    assert set(section.data) == {"SLURM_JOB_ID", "SLURM_TOPOLOGY_ADDR"}


def test_unknown_places_are_not_made_up() -> None:
    section = sections.place(Topology("envvars", rank=0, world_size=2))
    assert section.data["nnodes"] is None
    assert ("master", "not known, port agreed by the ranks") in section.rows


def test_the_problems_of_all_ranks_come_together() -> None:
    def seat(rank: int, right: bool = True, torch: str = "torch 2", problems: tuple[str, ...] = ()) -> Seat:
        return Seat(rank, f"node{rank}", 100 + rank, "cpu", torch, right, 0.1, problems)

    seats = [
        seat(0),
        seat(1, right=False),
        seat(2, problems=("no disk",)),
        seat(3, torch="torch 3", problems=("no disk",)),
    ]
    assert check._found_by_all(Trial("gloo", 0.1, seats)) == [
        "rank 1: the result of the all-reduce is wrong",
        "rank 2, 3: no disk",
        "the ranks run different versions: rank 0 on node0 has torch 2; rank 3 on node3 has torch 3",
    ]


@pytest.mark.gpu
def test_names_the_gpu() -> None:
    done = run("--json", "--backend", "nccl")
    data = json.loads(done.stdout)
    assert done.returncode == 0, data["problems"]
    assert data["devices"]["cuda:0"]["name"] == torch.cuda.get_device_name(0)
    assert data["all_reduce"]["seats"][0]["device"] == "cuda:0"
