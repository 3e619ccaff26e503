"""Ranks that wait for each other in vain: one report says where all are, and the error of the timeout carries it."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import LOOPBACK, Ended, end_ranks, free_port, run_ranks

import idist
from idist import runtime
from idist.errors import ConfigError
from idist.testing import run_threads
from idist.watch.report import Statement, render
from idist.watch.stacks import footprint, place_of

WARN_S = 1.0
TIMEOUT_S = 6.0
LATE_S = TIMEOUT_S + 3
"""This rank does not come in time."""


LAST = "; its last one in the group was number 6"
SINCE = "since 12:00:00 (31 s)"


# The report alone


def said(rank: int, waits: bool = True, **changes: Any) -> Statement:
    usual = Statement(
        rank=rank,
        process=f"process {100 + rank} on here",
        waits=waits,
        operation="all_reduce of float32 2x3" if waits else "",
        number=7 if waits else 0,
        group="0" if waits else "",
        ranks=None,
        begun={"0": 7 if waits else 6},
        where="train.py:31 in step" if waits else "train.py:12 in save",
        seconds=31.4,
        since="12:00:00",
        stack=("train.py:50 in main: save()", "train.py:12 in save: time.sleep(60)"),
    )
    return dataclasses.replace(usual, **changes)


def test_those_that_wait_together_are_told_together() -> None:
    report = render([said(3), said(0), said(1), said(2, waits=False)], 4, {})
    assert report.splitlines() == [
        "idist: 3 of 4 ranks wait, for 31 s now; rank 2 has not come.",
        "  Waiting:",
        f"    ranks 0-1, 3: all_reduce of float32 2x3 (number 7 of its group), at train.py:31 in step, {SINCE}",
        "  Not come:",
        f"    rank 2 (process 102 on here): at train.py:12 in save, has begun no operation {SINCE}{LAST}",
        "      train.py:50 in main: save()",
        "      train.py:12 in save: time.sleep(60)",
    ]


def test_whoever_says_nothing() -> None:
    report = render([said(0)], 3, {2: "process 7 on there"})
    assert "idist: 1 of 3 ranks wait, for 31 s now; ranks 1-2 do not answer." in report
    assert re.search(r"rank 1, 2 \(process 7 on there\): does not answer since \d\d:\d\d:\d\d\. It is stopped", report)


def test_only_the_ranks_of_the_group_are_missed() -> None:
    report = render([said(0, ranks=(0, 2)), said(1, waits=False), said(2, waits=False)], 4, {})
    assert "idist: 1 of 4 ranks wait, for 31 s now; rank 2 has not come." in report
    assert "in the group of ranks 0, 2," in report
    assert "rank 1" not in report
    assert "No answer" not in report


def test_different_operations() -> None:
    report = render([said(0), said(1, operation="barrier")], 2, {})
    assert "rank 1: barrier" in report
    assert "different operations" in report
    assert "IDIST_VERIFY=1" in report


def test_all_are_there() -> None:
    assert "Nobody is missing: all ranks are in it" in render([said(0), said(1)], 2, {})


def test_a_thousand_ranks_in_a_few_lines() -> None:
    others = [said(rank, waits=False, stack=(f"a.py:{rank} in f",)) for rank in range(1, 1000)]
    report = render([said(0), *others], 1000, {})
    assert len(report.splitlines()) < 30
    assert "ranks 9-999: elsewhere again" in report


def test_a_statement_travels_as_text() -> None:
    for statement in (said(0), said(1, waits=False), said(2, ranks=(0, 2))):
        assert Statement.from_json(statement.to_json()) == statement


# Where a thread is


def test_the_place_of_a_thread() -> None:
    here = threading.Event()
    release = threading.Event()

    def work() -> None:
        here.set()
        release.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert here.wait(10)
    assert thread.ident is not None
    place, before = place_of(thread.ident), footprint(thread.ident)
    assert place.operation is None
    assert place.where.startswith("tests/test_hangs.py:") or Path(__file__).name in place.where
    assert "in work" in place.where
    assert any("release.wait()" in line for line in place.stack)
    assert footprint(thread.ident) == before
    release.set()
    thread.join()


# Real ranks


def job(rank: int, case: str) -> Any:
    """Three ranks; how rank 1 does not come is the case."""
    with idist.Parallel("gloo", timeout=TIMEOUT_S, warn_after=WARN_S) as parallel:
        [result] = parallel.run(lambda local_rank: CASES[case](rank))
    return result


def sleeps(rank: int) -> Any:
    if rank == 1:
        time.sleep(LATE_S)
    return idist.all_reduce(torch.ones(2, 3), "MAX")


def is_elsewhere(rank: int) -> Any:
    if rank == 1:
        return idist.barrier()
    return idist.all_gather("a string")


def is_stopped(rank: int, which: int = 1) -> Any:
    if rank == which:
        time.sleep(0.5)  # until it has asked the store, and told the number of its process
        stopped = os.getpid()
        waker = subprocess.Popen([sys.executable, "-c", WAKE, str(stopped), str(LATE_S)])
        os.kill(stopped, signal.SIGSTOP)
        waker.wait()
    return idist.all_reduce(torch.ones(2, 3))


def server_is_stopped(rank: int) -> Any:
    return is_stopped(rank, 0)


def server_is_gone(rank: int) -> Any:
    group = idist.new_group([1, 2])
    idist.barrier()
    if rank == 0:
        return None
    if rank == 1:
        time.sleep(LATE_S)
    return idist.all_reduce(torch.ones(2, 3), group=group)


WAKE = "import os, signal, sys, time; time.sleep(float(sys.argv[2])); os.kill(int(sys.argv[1]), signal.SIGCONT)"


def goes_back(rank: int) -> Any:
    model = idist.auto_model(torch.nn.Linear(3, 4))
    for _ in range(2):  # before its second pass torch exchanges something else
        model(torch.ones(1, 3)).sum().backward()
    if rank == 1:
        time.sleep(LATE_S)
    return model(torch.ones(1, 3)).sum().backward()


def talks_to_torch(rank: int) -> Any:
    if rank == 1:
        time.sleep(LATE_S)
    return dist.all_reduce(torch.ones(5, dtype=torch.int64))


CASES: dict[str, Callable[[int], Any]] = {
    "sleeps": sleeps,
    "elsewhere": is_elsewhere,
    "stopped": is_stopped,
    "server stopped": server_is_stopped,
    "server gone": server_is_gone,
    "backward": goes_back,
    "torch": talks_to_torch,
}


def reports(ended: Ended) -> list[str]:
    """What a rank has printed by itself, without what its error says again."""
    printed, _, _ = ended.output.partition("Traceback")
    return re.findall(r"^idist: .*?$(?:\n  .*?$)*", printed, re.MULTILINE)


def end(case: str) -> list[Ended]:
    """Rank 0 serves the store."""
    port = free_port()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return end_ranks(
        job, 3, case, env=lambda rank: dict(zip(names, (rank, rank, 3, 3, LOOPBACK, port), strict=True)), timeout=30
    )


def hang(case: str) -> tuple[str, list[Ended]]:
    """The report, and how all ranks ended; rank 0 prints it, once, and whoever waited has it in its error."""
    ended = end(case)
    (report,) = reports(ended[0])
    assert [reports(each) for each in ended[1:]] == [[], []]
    return report, ended


def in_error(report: str, ended: Ended) -> None:
    assert ended.error is not None
    assert report in ended.error
    assert ended.seconds < TIMEOUT_S + 5


@pytest.mark.parametrize(
    ("case", "operation"),
    [
        ("sleeps", "all_reduce of float32 2x3 with MAX (number 1 of its group), at "),
        ("backward", "backward: all_reduce of float32 16 (number "),
        ("torch", "torch's all_reduce: all_reduce of int64 5 (number 1 of its group), at "),
    ],
)
def test_a_rank_does_not_come(case: str, operation: str) -> None:
    report, ended = hang(case)
    function = CASES[case].__name__
    assert report.startswith("idist: 2 of 3 ranks wait, for ")
    assert f"    ranks 0, 2: {operation}" in report
    assert f" in {function}, since " in report
    assert re.search(rf"rank 1 \(process \d+ on .*\): at .*test_hangs.py:\d+ in {function}, has begun no op", report)
    assert f" in {function}: time.sleep(LATE_S)" in report
    in_error(report, ended[0])
    in_error(report, ended[2])


def test_a_rank_is_in_another_operation() -> None:
    report, ended = hang("elsewhere")
    assert "ranks 0, 2: all_gather of str (number 1 of its group), at " in report
    assert "rank 1: barrier (number 1 of its group), at " in report
    assert "the ranks are in different operations" in report
    assert any(report in (each.error or "") for each in ended)


def test_a_rank_is_stopped() -> None:
    report, ended = hang("stopped")
    assert "ranks 0, 2: all_reduce of float32 2x3" in report
    assert re.search(r"No answer:\n    rank 1 \(process \d+ on .*\): does not answer since \d\d:\d\d:\d\d", report)
    in_error(report, ended[0])


@pytest.mark.parametrize(
    ("case", "ranks", "why"),
    [
        ("server stopped", (1, 2), "the store of the job does not answer; "),
        ("server gone", (2,), "there is no store to ask them by, "),
    ],
)
def test_who_serves_the_store_cannot_be_asked(case: str, ranks: tuple[int, ...], why: str) -> None:
    """Each that waits then tells what it knows of itself."""
    for _ in range(3):  # who has just asked when the server is stopped waits for the answer, and says nothing
        ended = end(case)
        if all(reports(ended[rank]) for rank in ranks):
            break
    for rank in ranks:
        (report,) = reports(ended[rank])
        assert re.match(rf"idist: rank {rank} of 3 waits, for \d s now; the others cannot be asked: {why}", report)
        assert f"    rank {rank}: all_reduce of float32 2x3" in report
        in_error(report, ended[rank])


# Ranks that are threads


def hang_in_threads(body: Callable[[int], Any], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The report, and the error that carries it."""

    def rank() -> Any:
        if idist.get_rank() == 1:
            release.wait(LATE_S)
        return body(idist.get_rank())

    release = threading.Event()
    before = threading.active_count()
    with pytest.raises(idist.PeerFailed) as caught:
        run_threads(rank, 3, timeout=3, warn_after=0.5)
    release.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    return capsys.readouterr().err.rstrip("\n"), str(caught.value)


def test_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> Any:
        return idist.all_gather(rank, group=[0, 1]) if rank < 2 else None

    report, error = hang_in_threads(body, capsys)
    assert report.startswith("idist: 1 of 3 ranks wait, for ")
    assert "rank 0: all_gather of int (number 1 of its group), in the group of ranks 0-1, at " in report
    assert "rank 1 (process " in report
    assert "rank 2" not in report
    assert report in error


def test_inside_another_call(capsys: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> None:
        with idist.one_rank_first(rank=1):
            pass

    report, error = hang_in_threads(body, capsys)
    assert "ranks 0, 2: one_rank_first (number 1 of its group), at " in report
    assert report in error


# What it must not do


def test_says_nothing_where_all_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    """Collectives that come at any time but in time, through some looks of the watch."""

    def body() -> list[int]:
        for step in range(8):
            time.sleep(0.1 * (1 + (idist.get_rank() + step) % 3))
            idist.barrier()
        return idist.all_gather(idist.get_rank())

    assert run_threads(body, 3, warn_after=1.0) == [[0, 1, 2]] * 3
    assert capfd.readouterr().err == ""


def leaves_nothing(rank: int, port: int) -> tuple[int, float, list[str]]:
    """How many connections each time leaves, how long finalize took, and which threads are left."""
    descriptors = []
    threads = set(threading.enumerate())
    for _ in range(3):
        idist.initialize(
            "gloo", rank=rank, world_size=2, init_method=f"tcp://{LOOPBACK}:{port}", timeout=20, warn_after=0.3
        )
        idist.barrier()
        time.sleep(0.2)  # until it has asked the store
        idist.barrier()
        begun = time.monotonic()
        idist.finalize()
        seconds = time.monotonic() - begun
        descriptors.append(len(os.listdir("/proc/self/fd")))
    left = [thread.name for thread in set(threading.enumerate()) - threads]
    return descriptors[-1] - descriptors[0], seconds, left


def test_leaves_no_thread_and_no_connection() -> None:
    for descriptors, seconds, threads in run_ranks(leaves_nothing, 2, free_port()):
        assert (descriptors, threads) == (0, [])
        assert seconds < 2


def forks(rank: int, port: int) -> list[int]:
    """A forked child ends the context as its parent would; the parent goes on with it."""
    idist.initialize(
        "gloo", rank=rank, world_size=2, init_method=f"tcp://{LOOPBACK}:{port}", timeout=20, warn_after=0.3
    )
    time.sleep(0.2)
    child = os.fork()
    if not child:
        watch = runtime.current().watch
        assert watch is not None
        watch.stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    ranks = idist.all_gather(rank)
    assert any(thread.name == "idist watch" for thread in threading.enumerate())
    idist.finalize()
    return ranks


def test_a_forked_process_has_no_watch() -> None:
    assert run_ranks(forks, 2, free_port()) == [[0, 1], [0, 1]]


def goes_on_alone(rank: int, port: int) -> None:
    """Rank 0, which serves the store, ends long before rank 1, which computes and needs nobody."""
    idist.initialize(
        "gloo", rank=rank, world_size=2, init_method=f"tcp://{LOOPBACK}:{port}", timeout=20, warn_after=0.3
    )
    idist.barrier()
    time.sleep(0.2)
    if rank == 0:
        idist.finalize()
    else:
        time.sleep(1.5)
        idist.finalize()


def test_a_rank_that_goes_on_alone_says_nothing() -> None:
    ended = end_ranks(goes_on_alone, 2, free_port())
    assert [(each.error, each.output) for each in ended] == [(None, ""), (None, "")]


def adopted(rank: int, port: int) -> tuple[bool, bool]:
    """Whether a group made by hand is watched, and whether that ends with it."""
    store = dist.TCPStore(LOOPBACK, port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    idist.get_rank()
    watched = runtime.current().watch is not None
    idist.barrier()
    dist.destroy_process_group()
    idist.get_rank()
    return watched, any(thread.name == "idist watch" for thread in threading.enumerate())


def test_a_group_made_by_hand_is_watched() -> None:
    assert run_ranks(adopted, 2, free_port(), env=lambda rank: {"IDIST_WARN_AFTER": 5}) == [(True, False)] * 2


def with_nobody(_: int) -> bool:
    """Whether the rank is watched still after some looks: torch's fake group counts nothing, and so does its store."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    idist.get_rank()
    time.sleep(1)
    alive = any(thread.name == "idist watch" for thread in threading.enumerate())
    dist.destroy_process_group()
    return alive


def test_what_cannot_be_asked_does_not_end_the_watch() -> None:
    assert run_ranks(with_nobody, 1, env=lambda rank: {"IDIST_WARN_AFTER": 2}) == [True]


def test_never() -> None:
    def body() -> bool:
        return runtime.current().watch is None

    assert run_threads(body, 2, warn_after=0) == [True, True]
    assert run_threads(body, 1) == [True]


@pytest.mark.parametrize("given", [-1, True, "30", float("inf"), float("nan")])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(ConfigError, match="warn_after must be a number of seconds, 0 for never, got"):
        idist.initialize("gloo", rank=0, world_size=1, warn_after=given)
    with pytest.raises(ConfigError, match="warn_after must be"):
        idist.Parallel("gloo", nproc_per_node=2, warn_after=given)


def test_a_variable_that_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDIST_WARN_AFTER", "soon")
    with pytest.raises(ConfigError, match="IDIST_WARN_AFTER must be a number of seconds, 0 for never, got 'soon'"):
        idist.initialize("gloo", rank=0, world_size=1)
