"""should_stop: a signal on one rank is heard by all, in the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import idist
from idist.testing import run_processes


def stops_together(signals: dict[int, signal.Signals]) -> list[bool]:
    """What should_stop says in four steps, when ranks get their signals before the third."""
    said = []
    for step in range(4):
        if step == 2 and idist.get_rank() in signals:
            os.kill(os.getpid(), signals[idist.get_rank()])
        said.append(idist.should_stop())
    return said


@pytest.mark.parametrize(
    "signals", [{}, {1: signal.SIGUSR1}, {0: signal.SIGTERM}, {0: signal.SIGUSR1, 1: signal.SIGTERM}]
)
def test_all_ranks_stop_in_the_same_step(signals: dict[int, signal.Signals]) -> None:
    expected = [False, False, bool(signals), bool(signals)]
    assert run_processes(stops_together, 2, signals, backend="gloo") == [expected, expected]


def test_finalize_puts_the_handlers_back() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        assert not idist.should_stop()
        assert signal.getsignal(signal.SIGUSR1) is not ours
        os.kill(os.getpid(), signal.SIGUSR1)
        assert idist.should_stop()
        assert heard == [signal.SIGUSR1], "the handler of the user hears it too"
        idist.finalize()
        assert signal.getsignal(signal.SIGUSR1) is ours
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert not idist.should_stop(), "a new context begins anew"
        idist.finalize()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_first_call_belongs_in_the_main_thread() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            idist.should_stop()
        except idist.ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


SCRIPT = """
import sys, time
from pathlib import Path
import idist

def training(local_rank, folder, listens):
    for step in range(600):
        if listens and idist.should_stop():
            Path(folder, f"saved by {local_rank}").touch()
            return step
        Path(folder, f"begun by {local_rank}").touch()
        time.sleep(0.05)

if __name__ == "__main__":
    with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
        parallel.run(training, sys.argv[1], sys.argv[2] == "listens")
    print("left in time")
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["the process that started the ranks", "all of them"])
@pytest.mark.parametrize("listens", [True, False])
def test_a_process_that_started_the_ranks_passes_it_on(
    tmp_path: Path, number: signal.Signals, whom: str, listens: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), "listens" if listens else "does not"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("begun by *"))) < 2:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            (os.kill if whom.startswith("the process") else os.killpg)(process.pid, number)
            output, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    saved = sorted(path.name for path in tmp_path.glob("saved by *"))
    if listens:
        assert (process.returncode, output, saved) == (0, "left in time\n", ["saved by 0", "saved by 1"])
    else:
        assert (process.returncode, output, saved) == (-number, "", [])


WITH_WORKERS = """
import os, signal, sys, time, torch, idist

class Slow(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i):
        time.sleep(0.01)
        return i

def say(worker):
    time.sleep(worker)
    print(worker, flush=True)

loader = idist.auto_dataloader(Slow(), batch_size=4, num_workers=2, worker_init_fn=say)
had = []
for number, batch in enumerate(loader):
    had += batch.tolist()
    stops = idist.should_stop()
    if number == 1:
        os.killpg(0, getattr(signal, sys.argv[1]))  # as a scheduler and torchrun do
        time.sleep(0.3)
print(had == list(range(40)), stops)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_workers_of_a_loader_outlive_a_warning_to_all_processes(name: str) -> None:
    """Else the loader raises in the training process, while that saves."""
    ended = subprocess.run(
        [sys.executable, "-c", WITH_WORKERS, name], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert ended.stdout.splitlines() == ["0", "1", "True True"], ended.stderr


WITH_NEW_WORKERS = """
import os, signal, sys, torch, idist

class Dataset(torch.utils.data.Dataset):
    def __init__(self): self.itself = Sends() if sys.argv[1] == "spawn" else None
    def __len__(self): return 40
    def __getitem__(self, i): return i

def warn(): os.kill(os.getpid(), signal.SIGTERM)

class Sends:
    def __reduce__(self): return warn, ()

if __name__ == "__main__":
    if sys.argv[1] == "fork":
        os.register_at_fork(after_in_child=warn)
    loader = idist.auto_dataloader(Dataset(), batch_size=4, num_workers=2, multiprocessing_context=sys.argv[1])
    print(torch.cat(list(loader)).tolist() == list(range(40)), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_warning_that_comes_before_a_worker_is_ready(method: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(WITH_NEW_WORKERS)
    command = [sys.executable, str(script), method]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert ended.stdout == "True set()\n", ended.stderr


def test_a_worker_that_is_told_twice_ends() -> None:
    code = "import os, signal; from idist.preemption import end_is_near, let_one_pass; let_one_pass(end_is_near())\n"
    code += "os.kill(0, signal.SIGTERM); print('alive', flush=True); os.kill(0, signal.SIGTERM); print('still')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (ended.stdout, ended.returncode) == ("alive\n", -signal.SIGTERM), ended.stderr


ENDS_WITH_WORKERS = """
import multiprocessing, sys, time, torch, idist

stay = sys.argv[1] != "a pass"
loader = idist.auto_dataloader(torch.arange(40), batch_size=4, num_workers=2, persistent_workers=stay)

def begin():
    global passing
    if sys.argv[1] == "in a cycle":
        loader.itself = loader
    passing = iter(loader)
    next(passing), next(passing)  # one of each worker
    if sys.argv[1] == "told before":
        for worker in multiprocessing.active_children():
            worker.terminate()
        time.sleep(0.5)
        next(passing)

if sys.argv[1] == "of a child":
    child = multiprocessing.get_context("fork").Process(target=begin)
    child.start()
    child.join()
else:
    begin()
print("done")
"""


@pytest.mark.parametrize("which", ["persistent", "a pass", "in a cycle", "of a child", "told before"])
def test_a_process_ends_while_a_loader_has_workers(which: str) -> None:
    """They are told to end by one signal, and waited for: it must not be passed over."""
    ended = subprocess.run([sys.executable, "-c", ENDS_WITH_WORKERS, which], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
