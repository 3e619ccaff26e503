"""What only a process of its own can show: signals, a missing guard, a notebook, the end of the parent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripts import Script, all_end

HEAD = """
import os, signal, sys, time
import torch
import idist

def here(local_rank):
    '''Tell who we are.'''
    idist.barrier()
    open(f"{FOLDER}/{idist.get_rank()}", "w").write(str(os.getpid()))

"""
MAIN = """
if __name__ == "__main__":
    with idist.Parallel("gloo", nproc_per_node=3, timeout=60) as parallel:
        print(parallel.run(fn))
"""


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
PATIENT = "from idist.launchers import crew\ncrew.INTERRUPT_S = 60\n"
STUBBORN = (
    HEAD
    + "def fn(local_rank):\n    here(local_rank)\n    while True:\n        try:\n            time.sleep(60)\n"
    + "        except KeyboardInterrupt:\n            pass\n"
    + MAIN
)


@pytest.mark.parametrize("to", ["group", "parent"])
@pytest.mark.parametrize("source", [SLEEPS, COLLECTIVE], ids=["sleep", "collective"])
def test_ctrl_c(script: Start, source: str, to: str) -> None:
    """Ends all, and shows one traceback: that of the caller."""
    running = script(source)
    workers = running.workers()
    pressed = time.monotonic()
    (os.killpg if to == "group" else os.kill)(running.process.pid, signal.SIGINT)
    code, out, err = running.finish(10)
    assert time.monotonic() - pressed < 10
    assert code == -signal.SIGINT
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert all_end(workers, 1)
    assert out == ""


def test_ctrl_c_lets_workers_clean_up(script: Start, tmp_path: Path) -> None:
    running = script(CLEANS_UP)
    running.workers()
    os.kill(running.process.pid, signal.SIGINT)
    running.finish(10)
    assert len(list(tmp_path.glob("cleaned*"))) == 3


def test_ctrl_c_twice(script: Start) -> None:
    """The second one ends at once even what will not hear: after the first alone this would take a minute."""
    running = script(PATIENT + STUBBORN)
    workers = running.workers()
    os.killpg(running.process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(running.process.pid, signal.SIGINT)
    code, _, err = running.finish(10)
    assert code == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert all_end(workers, 1)


@pytest.mark.parametrize(
    ("source", "number"),
    [(SLEEPS, signal.SIGTERM), (COLLECTIVE, signal.SIGKILL), (STUBBORN, signal.SIGKILL)],
    ids=["sleep", "collective", "stubborn"],
)
def test_the_parent_is_killed(script: Start, source: str, number: signal.Signals) -> None:
    """No orphan stays."""
    running = script(source)
    workers = running.workers()
    os.kill(running.process.pid, number)
    assert all_end(workers, 5)
    assert running.finish()[0] == -number


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_missing_guard(script: Start, method: str) -> None:
    """One error that says what to do, and no storm of processes."""
    began = time.monotonic()
    running = script(
        f"""
import os
os.write(1, b"imported\\n")
import idist

def fn(local_rank, data):
    return local_rank

with idist.Parallel("gloo", nproc_per_node=2, start_method={method!r}) as parallel:
    parallel.run(fn, bytes(1_000_000))
"""
    )
    code, out, err = running.finish()
    assert code == 1
    assert out.count("imported") <= 3
    assert err.count("Traceback") == 1, err
    assert "ConfigError: the main module starts processes when it is imported" in err
    assert 'if __name__ == "__main__":' in err
    assert time.monotonic() - began < 20


def test_a_module_that_only_the_main_process_can_import(script: Start) -> None:
    """The failure of the import is shown by the worker, and the caller is told where to look."""
    running = script(
        HEAD
        + "def fn(local_rank):\n    return local_rank\n"
        + "if __name__ != '__main__':\n    raise RuntimeError('only here')\n"
        + MAIN
    )
    code, _, err = running.finish()
    assert code == 1
    assert "RuntimeError: only here" in err
    assert "had not got as far as calling the function" in err.splitlines()[-1]


PLAIN = HEAD + "def fn(local_rank):\n    return local_rank, idist.all_reduce(1)\n"
RESULT = "[(0, 3), (1, 3), (2, 3)]\n"


@pytest.mark.parametrize("command", [("-",), ("-c", PLAIN + MAIN)], ids=["stdin", "-c"])
def test_functions_that_no_other_process_can_import(script: Start, command: tuple[str, ...]) -> None:
    """An interactive session; a notebook is alike."""
    code, out, err = script(PLAIN + MAIN, "-W", "ignore::DeprecationWarning", *command).finish()
    assert (code, out, err) == (0, RESULT, "")


NOTEBOOK = (
    "import builtins\nbuiltins.__IPYTHON__ = True\n"
    + HEAD
    + """
def fn(local_rank):
    return local_rank, int(idist.all_reduce((big @ big).sum() * 0 + 1))

torch.set_num_threads(2)
big = torch.ones(500, 500)
torch.ones(10_000_000).exp()  # the threads of OpenMP are in use
"""
    + MAIN
)


def test_a_notebook_that_has_computed_before(script: Start) -> None:
    """A forked process that used the threads of its parent would hang."""
    code, out, err = script(NOTEBOOK, "-W", "ignore::DeprecationWarning", "-").finish()
    assert (code, out, err) == (0, RESULT, "")


def test_a_package_that_is_run(script: Start, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(PLAIN + MAIN)
    code, out, err = script("", "-W", "ignore::DeprecationWarning", "-m", "package").finish()
    assert (code, out, err) == (0, RESULT, "")


def test_a_fork_server_that_runs_already(script: Start) -> None:
    """It has not imported torch: slower, and right."""
    running = script(
        PLAIN
        + """
if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("forkserver").Process(target=print)
    process.start()
    process.join()
"""
        + MAIN
    )
    assert running.finish() == (0, "\n" + RESULT, "")


def test_a_module_that_the_user_preloads_stays(script: Start, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import os\nos.write(1, b'loaded\\n')\n")
    running = script(
        PLAIN
        + """
if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_forkserver_preload(["heavy"])
    os.environ["PYTHONPATH"] = FOLDER + os.pathsep + os.environ.get("PYTHONPATH", "")
"""
        + MAIN
    )
    assert running.finish() == (0, "loaded\n" + RESULT, "")


def test_the_failure_is_the_last_thing_printed(script: Start) -> None:
    """KNOWN-FAILURES 25."""
    code, out, err = script(
        HEAD
        + "def fn(local_rank):\n    if local_rank == 1:\n        raise ValueError('the cause')\n    idist.barrier()\n"
        + MAIN
    ).finish()
    assert code == 1
    assert out == ""
    assert "idist.errors.WorkerFailed: rank 1 failed first" in err
    assert err.rstrip().endswith("ValueError: the cause")
    assert err.count("Traceback (most recent call last)") == 2  # of the caller, of the worker
