"""tools/slurm-cluster.sh ends all that it started, whatever happens to it, and says what it cannot do without."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import run, until

pytestmark = pytest.mark.slurm

TOOL = Path(__file__).parents[2] / "tools" / "slurm-cluster.sh"
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
WITHOUT_NAMESPACES = ["setpriv", "--bounding-set=-sys_admin"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_the_cluster_ends_with_its_command(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """A second cluster, inside of the one that we are on, while a job runs. The fixtures see what is left of it."""
    job = "srun -N4 sleep 1000 & until [ $(squeue -h -t R | wc -l) = 1 ]; do sleep 0.1; done; touch up; wait"
    with subprocess.Popen(
        [TOOL, "with", "bash", "-c", job],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as cluster:
        try:
            until((tmp_path / "up").exists, "a job on the second cluster")
            (directory,) = tmp_path.glob("slurm-cluster-*")
            if number == signal.SIGINT:  # a terminal sends it to all
                os.killpg(cluster.pid, number)
            else:
                cluster.send_signal(number)
            assert cluster.wait(40) == code
        finally:
            cluster.kill()
    # Killed outright, it cannot remove its files.
    assert directory.exists() == (number == signal.SIGKILL)


def test_the_exit_code_is_that_of_the_command(tmp_path: Path) -> None:
    ended = run(TOOL, "with", "sh", "-c", "srun -N4 hostname; exit 7", env={"TMPDIR": str(tmp_path)})
    assert sorted(ended.out.split()) == ["node1", "node2", "node3", "node4"]
    assert ended.code == 7
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """The script, where nobody may read it."""
    with tempfile.TemporaryDirectory(prefix="slurm-tool-") as folder:
        Path(folder).chmod(0o755)
        yield Path(shutil.copy(TOOL, folder))


@pytest.mark.parametrize(
    ("prefix", "says"),
    [(AS_NOBODY, "needs root"), (WITHOUT_NAMESPACES, "--cap-add SYS_ADMIN --cap-add NET_ADMIN")],
    ids=["without root", "without namespaces"],
)
def test_what_is_missing_is_said(public: Path, prefix: list[str], says: str) -> None:
    ended = run(*prefix, public, "with", "true")
    assert ended.code == 1
    assert says in ended.err


def test_missing_packages_are_named(tmp_path: Path) -> None:
    for program in ("bash", "id", "readlink"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    ended = run(tmp_path / "bash", TOOL, "with", "true", env={"PATH": str(tmp_path)})
    assert ended.code == 1
    assert "apt-get install --no-install-recommends slurm-wlm munge iproute2" in ended.err
