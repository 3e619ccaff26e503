"""Every test of this directory runs on every rank; tests/hvd/test_on_ranks.py starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import idist

ATTACH = "IDIST_ATTACH"
TIMEOUT_S = 20.0

collect_ignore_glob = [] if ATTACH in os.environ else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def world() -> Iterator[None]:
    idist.initialize(os.environ[ATTACH], timeout=TIMEOUT_S)
    yield
    idist.finalize()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """In the place of the one for all tests: Horovod lives on, and the ranks are to be in step."""
    before = dict(os.environ)
    yield
    here = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    assert idist.all_gather(here) == [here] * idist.get_world_size(), "the ranks are not in step"
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    assert changed <= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # the second is torch's own doing


@pytest.fixture
def rank() -> int:
    return idist.get_rank()


@pytest.fixture
def size() -> int:
    return idist.get_world_size()


@pytest.fixture
def hvd() -> Any:
    import horovod.torch

    return horovod.torch
