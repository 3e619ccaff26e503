"""What a rank does must not grow with the number of ranks: counted, since no machine here has a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import idist
from idist import wire
from idist.testing import run_processes

BENCH = Path(__file__).parents[1] / "bench" / "scale.py"
MANY = (1024, 16384)
CONSTANT = ("all_reduce of a 0-d tensor", "all_reduce(3)", "all_reduce(0.5, 'MAX')", "broadcast('abc')")
COUNT_MEETING = f"""
import json, sys
sys.path.insert(0, {str(BENCH.parent)!r})
import scale
print(json.dumps(scale.meet(int(sys.argv[1]))))
"""


def run(*command: str) -> Any:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def collectives_of_a_rank(ranks: int) -> dict[str, str]:
    return {what: told for what, (_, told) in run(str(BENCH), "--ranks", str(ranks)).items()}


@pytest.mark.parametrize("what", CONSTANT)
def test_what_a_rank_sends_is_the_same_for_a_thousand_and_for_16_thousand(what: str) -> None:
    one, other = (collectives_of_a_rank(ranks)[what] for ranks in MANY)
    assert one == other
    assert "all_gather" not in one


def test_a_meeting_takes_a_rank_as_many_operations_on_the_store() -> None:
    few, many = (run("-c", COUNT_MEETING, str(ranks)) for ranks in (4, 24))
    # Eleven, and one more for each of the three stages to which it comes last. One for each rank would be twenty more.
    assert max(many["operations"], few["operations"]) <= 14
    assert many["operations of rank 0"] <= few["operations of rank 0"] + 12, "rank 0 waits for the others to leave"


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except idist.IdistError as error:
        return f"{type(error).__name__}: {error}"


def _as_one_of_many() -> list[object]:
    wire.GATHERED = 1
    rank = idist.get_rank()
    return [
        idist.all_reduce(2**62 + rank),
        idist.all_reduce(-rank - 0.5, "MIN"),
        idist.all_reduce(rank, "AVERAGE"),
        idist.all_reduce(1 << rank, "OR"),
        idist.broadcast("é" * 200 if rank == 1 else None, src=1),
        idist.all_gather(rank, group=[0, 2]),
        _outcome(lambda: idist.all_reduce(1 if rank else 1.5)),
        _outcome(lambda: idist.all_reduce(1) if rank == 2 else idist.all_gather("a")),
        _outcome(lambda: idist.all_reduce(2**64 if rank == 0 else 1)) if rank else _overflows(),
        idist.all_reduce(1),
    ]


def _overflows() -> str:
    with pytest.raises(OverflowError):
        idist.all_reduce(2**64)
    return "refused"


def test_ranks_of_a_large_job_get_exact_values_and_hear_who_does_not_fit() -> None:
    """The threads of the conformance suite have no all_reduce of their own; these have."""
    for rank, seen in enumerate(run_processes(_as_one_of_many, 3, backend="gloo")):
        assert seen[:5] == [3 * 2**62 + 3, -2.5, 1.0, 7, "é" * 200]
        assert seen[5] == ([0, 2] if rank != 1 else 1)
        assert "rank 0: all_reduce of float" in str(seen[6])
        assert "rank 1, 2: all_reduce of int" in str(seen[6])
        assert "rank 2: all_reduce of int" in str(seen[7])
        assert seen[8] == "refused" if rank == 0 else "PeerFailed" in str(seen[8])
        assert seen[9] == 3
