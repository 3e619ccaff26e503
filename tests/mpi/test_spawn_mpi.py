"""Processes that idist starts with mpiexec: what they get, what comes back, how they fail and end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import Script, all_end

import idist
from idist.launchers import mpi

pytestmark = pytest.mark.mpi

TIMEOUT_S = 60.0
FAILURE_S = 5.0


@pytest.fixture(autouse=True)
def nothing_stays_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Neither a socket of ours nor a session of Open MPI. Its name is short, as those of sockets have to be."""
    tmp_path_factory.getbasetemp()  # which is elsewhere
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert [path for path in Path(folder).rglob("*") if not path.is_dir()] == []
        assert list(Path(folder).glob("idist-*")) == []


def run(fn: Callable[..., Any], *args: Any, nproc_per_node: int = 2, **options: Any) -> list[Any]:
    return idist.spawn("mpi", fn, args, nproc_per_node=nproc_per_node, timeout=TIMEOUT_S, **options)


# What goes well


def place(local_rank: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    assert idist.get_local_rank() == local_rank
    ours = idist.get_rank(), idist.get_world_size(), idist.get_nproc_per_node(), idist.get_node_rank()
    return idist.backend(), *ours, idist.all_reduce(1), args, kwargs


def test_results_come_by_local_rank() -> None:
    """As often as one likes."""
    with idist.Parallel("mpi", nproc_per_node=3, timeout=TIMEOUT_S) as parallel:
        for number in range(2):
            results = parallel.run(place, number, key="é")
            assert results == [("mpi", rank, 3, 3, 0, 3, (number,), {"key": "é"}) for rank in range(3)]


def test_one_process() -> None:
    assert run(place, nproc_per_node=1) == [("mpi", 0, 1, 1, 0, 1, (), {})]


def add_rank(local_rank: int, tensor: torch.Tensor, data: bytes) -> tuple[torch.Tensor, bytes]:
    tensor += local_rank
    return idist.all_reduce(tensor), data


def test_tensors_travel_by_value() -> None:
    tensor, data = torch.zeros(3), os.urandom(10_000_000)  # more than a pipe holds
    for total, same in run(add_rank, tensor, data):
        assert total.tolist() == [1, 1, 1]
        assert same == data
    assert tensor.tolist() == [0, 0, 0]


def add_one(local_rank: int, tensor: torch.Tensor) -> None:
    tensor += 1


def test_a_tensor_in_shared_memory_stays_shared() -> None:
    tensor = torch.zeros(3).share_memory_()
    run(add_one, tensor, nproc_per_node=1)
    assert tensor.tolist() == [1, 1, 1]


def surroundings(local_rank: int) -> tuple[dict[str, str], set[int], int]:
    return dict(os.environ), os.sched_getaffinity(0), torch.get_num_threads()


def test_variables_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with processes of any other start; ours are never written, not even for a moment."""
    monkeypatch.setenv("IDIST_TEST", "set")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = os.sched_getaffinity(0)
    with monkeypatch.context() as patch:
        for name in ("putenv", "unsetenv"):
            patch.setattr(os, name, lambda *args: pytest.fail(f"os.environ was written: {args}"))
        results = run(surroundings)
    for rank, (env, bound_to, threads) in enumerate(results):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["IDIST_TEST"] == "set"
        assert (bound_to, threads) == (cores, max(1, len(cores) // 2))


def prints(local_rank: int, fail: bool) -> None:
    print("said by the worker")
    print("said by the worker too", file=sys.stderr)
    if fail:
        raise ValueError("boom")


@pytest.mark.parametrize("fail", [False, True])
def test_output_is_that_of_the_ranks_alone(capfd: pytest.CaptureFixture[str], fail: bool) -> None:
    """What mpiexec has to say of a failure does not bury it."""
    with pytest.raises(idist.WorkerFailed, match="ValueError: boom") if fail else contextlib.nullcontext():
        run(prints, fail, nproc_per_node=1)
    assert capfd.readouterr() == ("said by the worker\n", "said by the worker too\n")


def leaves(local_rank: int, code: int | None) -> int:
    if local_rank == 0:
        sys.exit(code)
    return 1


def test_a_clean_exit_is_a_return_of_nothing() -> None:
    assert run(leaves, 0) == [None, 1]


def nothing(local_rank: int, *args: object) -> None:
    return None


def test_runs_leave_nothing() -> None:
    """No descriptor, no thread."""
    run(nothing, nproc_per_node=1)  # what is made once
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()
    run(nothing, nproc_per_node=1)
    with pytest.raises(idist.WorkerFailed):
        run(failing, "raise", "/dev/null")
    after = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


# What fails in a worker


def failing(local_rank: int, how: str, clock: str, peers: str = "collective") -> None:
    """Rank 1 fails, and notes when; what the others do meanwhile."""
    idist.barrier()
    if local_rank == 1:
        Path(clock).write_text(str(time.monotonic()))
        HOW[how]()
    if peers == "collective":
        idist.all_reduce(torch.ones(3))
    elif peers == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)


def raises() -> None:
    raise ValueError("boom of rank 1")


def aborts() -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(6)


HOW: dict[str, Callable[[], object]] = {
    "raise": raises,
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(4)": lambda: os._exit(4),
    "os._exit(0)": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "abort": aborts,
}


def fail(how: str, folder: Path, peers: str = "collective") -> idist.WorkerFailed:
    """The error of a run in which rank 1 of 3 failed, within seconds of that."""
    clock = folder / "failed"
    with pytest.raises(idist.WorkerFailed) as caught:
        run(failing, how, str(clock), peers, nproc_per_node=3)
    assert time.monotonic() - float(clock.read_text()) < FAILURE_S
    return caught.value


@pytest.mark.parametrize(
    ("how", "exitcode", "details"),
    [
        ("raise", None, "ValueError: boom of rank 1"),
        ("sys.exit(3)", 3, "SystemExit: 3"),
        ("os._exit(4)", 4, "exit code 4"),
        ("os._exit(0)", 0, "exit code 0"),
        ("SIGKILL", -9, "signal 9 (SIGKILL)"),
        ("SIGTERM", -15, "signal 15 (SIGTERM)"),
        ("SIGSEGV", -11, "signal 11 (SIGSEGV)"),
        ("SIGINT", None, "KeyboardInterrupt"),
    ],
)
def test_the_first_failure_is_told(tmp_path: Path, how: str, exitcode: int | None, details: str) -> None:
    error = fail(how, tmp_path)
    assert (error.rank, error.exitcode) == (1, exitcode)
    assert details in error.details
    assert "mpiexec" not in error.details


@pytest.mark.parametrize("peers", ["busy", "stopped"])
@pytest.mark.parametrize("how", ["raise", "SIGKILL"])
def test_peers_that_do_not_notice_are_ended(tmp_path: Path, how: str, peers: str) -> None:
    assert fail(how, tmp_path, peers).rank == 1


def test_a_rank_that_aborts(tmp_path: Path) -> None:
    """MPICH then kills all at once, and only what the rank has printed tells which it was."""
    error = fail("abort", tmp_path)
    assert (error.rank, error.exitcode) == (1, 6) or "what they printed above may" in error.details


def one_after_the_other(local_rank: int) -> None:
    idist.barrier()
    time.sleep(0.1 * (3 - local_rank))
    raise ValueError(f"rank {local_rank}")


def test_of_several_failures_the_first_counts() -> None:
    with pytest.raises(idist.WorkerFailed) as caught:
        run(one_after_the_other, nproc_per_node=3)
    assert caught.value.rank == 2


def killing(local_rank: int, clock: str, launching: int, generation: int) -> None:
    """Kill an ancestor of rank 1: mpiexec is of the first generation after the process that started it."""
    idist.barrier()
    if local_rank == 1:
        line = [os.getpid()]
        while line[-1] != launching:
            line.append(int(Path(f"/proc/{line[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
        Path(clock).write_text(str(time.monotonic()))
        os.kill(line[::-1][generation] if generation >= 0 else line[-generation - 1], signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    ("generation", "says"),
    [(1, "mpiexec itself had ended: killed by signal 9"), (-2, "ended without a report")],
    ids=["mpiexec", "the process that mpiexec knows"],
)
def test_what_starts_the_ranks_is_killed(tmp_path: Path, generation: int, says: str) -> None:
    clock = tmp_path / "killed"
    with pytest.raises(idist.WorkerFailed, match=says):
        run(killing, str(clock), os.getpid(), generation)
    assert time.monotonic() - float(clock.read_text()) < FAILURE_S
    for session in Path(tempfile.gettempdir()).glob("ompi.*"):  # it could not do that itself
        shutil.rmtree(session)


# What cannot start


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo no slots; exit 3", "ended with exit code 3 before rank 0, 1 came. It said:\n\nno slots"),
        ("exec sleep 60", "did not bring rank 0, 1 within 0.5 s. It said nothing."),
        (f"{sys.executable} {mpi.mpi_worker.__file__} x $0; exec sleep 60", "not one of 2 ranks: "),
    ],
)
def test_an_mpiexec_that_does_not_do_its_work(monkeypatch: pytest.MonkeyPatch, command: str, says: str) -> None:
    """The last one starts a process as it should, but tells it no rank."""
    monkeypatch.setattr(mpi, "_command", lambda *args: ("sh", "-c", command))
    with pytest.raises(idist.LaunchError) as caught:
        idist.spawn("mpi", nothing, nproc_per_node=2, timeout=0.5 if command == "exec sleep 60" else 20)
    assert says in str(caught.value)


def test_no_mpiexec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with idist.Parallel("mpi", nproc_per_node=2) as parallel:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(idist.LaunchError, match="mpiexec is neither beside this Python nor on PATH"):
            parallel.run(nothing)


@pytest.mark.parametrize(
    ("fn", "args", "named"),
    [
        (lambda local_rank: None, (), "function <lambda>"),
        (nothing, (1, (i for i in range(3))), "argument 1, a generator,"),
    ],
)
def test_what_cannot_be_sent_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, fn: Callable[..., Any], args: tuple[Any, ...], named: str
) -> None:
    monkeypatch.setattr(mpi._Launcher, "start", lambda *args: pytest.fail("mpiexec was started"))
    with pytest.raises(idist.ConfigError, match="cannot be sent to another process") as caught:
        run(fn, *args)
    assert named in str(caught.value)
    assert "start_method" not in str(caught.value)


# What only a process of its own can show

HEAD = """
import os, signal, sys, time
import idist

def here(local_rank):
    '''Tell who we are.'''
    idist.barrier()
    open(f"{FOLDER}/{local_rank}", "w").write(str(os.getpid()))

"""
MAIN = """
if __name__ == "__main__":
    with idist.Parallel("mpi", nproc_per_node=2, timeout=60) as parallel:
        print(parallel.run(fn))
"""
SLEEPS = HEAD + "def fn(local_rank):\n    here(local_rank)\n    time.sleep(60)\n" + MAIN
COLLECTIVE = (
    HEAD
    + "def fn(local_rank):\n    here(local_rank)\n    if local_rank == 0:\n        time.sleep(60)\n"
    + "    idist.barrier()\n"
    + MAIN
)
CLEANS_UP = (
    HEAD
    + "def fn(local_rank):\n    here(local_rank)\n    try:\n        time.sleep(60)\n    finally:\n"
    + "        open(f'{FOLDER}/cleaned{local_rank}', 'w').write('yes')\n"
    + MAIN
)
LISTENS = (
    HEAD
    + "def fn(local_rank):\n    idist.should_stop()\n    here(local_rank)\n"
    + "    while not idist.should_stop():\n        time.sleep(0.05)\n    return local_rank\n"
    + MAIN
)
PLAIN = HEAD + "def fn(local_rank):\n    return local_rank, idist.all_reduce(1)\n"

Start = Callable[..., Script]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Start]:
    started: list[Script] = []

    def start(source: str, *command: str) -> Script:
        started.append(Script(tmp_path, source, *command))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.mark.parametrize("to", ["group", "parent"])
@pytest.mark.parametrize("source", [SLEEPS, COLLECTIVE], ids=["sleep", "collective"])
def test_ctrl_c(script: Start, source: str, to: str) -> None:
    """Ends all, and shows one traceback: that of the caller."""
    running = script(source)
    workers = running.workers(2)
    pressed = time.monotonic()
    (os.killpg if to == "group" else os.kill)(running.process.pid, signal.SIGINT)
    code, out, err = running.finish(10)
    assert time.monotonic() - pressed < FAILURE_S
    assert code == -signal.SIGINT
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert all_end(workers, 1)
    assert out == ""


def test_ctrl_c_lets_workers_clean_up(script: Start, tmp_path: Path) -> None:
    running = script(CLEANS_UP)
    running.workers(2)
    os.kill(running.process.pid, signal.SIGINT)
    running.finish(10)
    assert len(list(tmp_path.glob("cleaned*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("source", [SLEEPS, COLLECTIVE], ids=["sleep", "collective"])
def test_the_parent_is_killed(script: Start, source: str, number: signal.Signals) -> None:
    """No orphan stays."""
    running = script(source)
    processes = [*running.workers(2), *descendants(running.process.pid)]
    assert len(processes) >= 5  # mpiexec, and for each rank the process that it knows and the rank itself
    os.kill(running.process.pid, number)
    assert all_end(processes, FAILURE_S)
    assert running.finish()[0] == -number


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.5])
def test_the_parent_is_killed_while_ranks_start(script: Start, after_s: float) -> None:
    running = script(SLEEPS)
    deadline = time.monotonic() + 30
    while not (found := descendants(running.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after_s)
    found = [*found, *descendants(running.process.pid)]
    os.kill(running.process.pid, signal.SIGKILL)
    assert all_end(found, FAILURE_S)


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_is_passed_on(script: Start, number: signal.Signals) -> None:
    running = script(LISTENS)
    running.workers(2)
    os.kill(running.process.pid, number)
    assert running.finish(20) == (0, "[0, 1]\n", "")


def test_a_missing_guard(script: Start) -> None:
    """One error that says what to do, and no storm of processes."""
    running = script(
        """
import os
os.write(1, b"imported\\n")
import idist

def fn(local_rank, data):
    return local_rank

with idist.Parallel("mpi", nproc_per_node=2) as parallel:
    parallel.run(fn, bytes(1_000_000))
"""
    )
    code, out, err = running.finish()
    assert code == 1
    assert 2 <= out.count("imported") <= 3
    assert err.count("Traceback") == 1, err
    assert "ConfigError: the main module starts processes when it is imported" in err


def test_a_module_that_only_the_main_process_can_import(script: Start) -> None:
    """The failure of the import is shown by the worker, and the caller is told where to look."""
    code, _, err = script(PLAIN + "if __name__ != '__main__':\n    raise RuntimeError('only here')\n" + MAIN).finish()
    assert code == 1
    assert "only here" in err
    assert "had not got as far as calling the function" in err.splitlines()[-1]


@pytest.mark.parametrize("command", [("-",), ("-c", PLAIN + MAIN)], ids=["stdin", "-c"])
def test_functions_that_no_other_process_can_import(script: Start, command: tuple[str, ...]) -> None:
    """An interactive session; a notebook is alike."""
    code, _, err = script(PLAIN + MAIN, *command).finish()
    assert code == 1
    assert "ConfigError: the function fn was typed where no other process can import it" in err


def test_a_script_finds_what_it_has_found_itself(script: Start, tmp_path: Path) -> None:
    """By a path that it has added, though not idist, which comes by PYTHONPATH or is installed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs.py").write_text("answer = 42\n")
    source = "import sys\nsys.path.insert(0, FOLDER + '/elsewhere')\nimport theirs\n"
    code, out, err = script(source + PLAIN.replace("local_rank, idist", "theirs.answer, idist") + MAIN).finish()
    assert (code, out, err) == (0, "[(42, 2), (42, 2)]\n", "")
