"""Whatever the variables are: a topology that fits together, or a LaunchError."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from corpus import LAUNCHES
from hypothesis import given, settings
from hypothesis import strategies as st

import idist.environments
from idist.environments import detect
from idist.errors import LaunchError
from idist.topology import UNKNOWN, Topology

SOURCES = sorted(Path(idist.environments.__file__).parent.glob("*.py"))
# Every name of a variable in the source, so that a new one is tested without being listed here.
NAMES = sorted(
    {name for path in SOURCES for name in re.findall(r'"([A-Z]{2,}_?[A-Z_]+)"', path.read_text())}
    | {"RANK", "SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_JOB_NODELIST_HET_GROUP_1"}
)
VALUES = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "3", "-1", "", " ", "True", "none", "auto", "1:4", "bash", "arbitrary", "4294967291"]
    ),
    st.sampled_from(
        ["node1", "node[1-2]", "node[2,1]", "node[1-3]", "1(x2)", "2,1", "0,1", "1", "[", "a[1-999999999]"]
    ),
    st.text(max_size=6),
    st.integers(-2, 10**20).map(str),
)


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """Nothing, or a recorded process, with some variables changed and some taken away."""
    process = draw(st.sampled_from([process for launch in LAUNCHES for process in launch.processes]))
    variables = dict(draw(st.sampled_from([process.variables, {}])))
    for name in draw(st.lists(st.sampled_from(sorted(variables)), max_size=3)) if variables else ():
        variables.pop(name, None)
    return variables | draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8))


def test_the_names_are_found() -> None:
    assert len(NAMES) > 45
    assert {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "HOROVOD_RANK", "PMI_RANK", "PET_NNODES", "NNODES"} <= set(NAMES)


@given(environments())
def test_detect_raises_nothing_but_launch_errors(variables: dict[str, str]) -> None:
    before = dict(variables)
    with contextlib.suppress(LaunchError):
        assert_fits_together(detect(variables).topology)
    assert variables == before


@st.composite
def remainders(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, str]]:
    """What a launcher has set for a process, and what is left of it."""
    processes = [process for launch in LAUNCHES if not launch.fails for process in launch.processes]
    variables = dict(draw(st.sampled_from(processes)).variables)
    lost = draw(st.lists(st.sampled_from(sorted(variables)), max_size=6)) if variables else []
    return variables, {name: value for name, value in variables.items() if name not in lost}


@settings(max_examples=500)
@given(remainders())
def test_what_is_left_of_a_launch_is_never_another_place(variables: tuple[dict[str, str], dict[str, str]]) -> None:
    """As long as the launcher is recognised: this rank of so many, on this node of so many, or an error."""
    whole, left = (None, None)
    with contextlib.suppress(LaunchError):
        whole, left = (detect(each).topology for each in variables)
    if whole is None or left is None or left.environment != whole.environment:
        return
    assert (left.rank, left.world_size) == (whole.rank, whole.world_size)
    if left.placed and whole.placed:
        assert left.nnodes == whole.nnodes
        assert left.node_rank == whole.node_rank
        assert left.local_rank == whole.local_rank


def assert_fits_together(found: Topology) -> None:
    assert 0 <= found.rank < found.world_size
    if found.placed:
        assert 0 <= found.local_rank < found.nproc_per_node <= found.world_size
        assert 0 <= found.node_rank < found.nnodes <= found.world_size
        assert (found.nnodes == 1) == (found.nproc_per_node == found.world_size)
        assert found.nproc_per_node + found.nnodes - 1 <= found.world_size
    else:
        assert (found.nproc_per_node, found.node_rank, found.nnodes) == (UNKNOWN,) * 3
    assert found.master_port is None or 0 <= found.master_port < 65536


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_process_environment_is_an_argument(path: Path) -> None:
    """Only the standard library, and never ``os.environ``: every environment is testable as data."""
    assert not re.search(r"^\s*(import|from) os\b|environ\b", path.read_text(), re.MULTILINE)
