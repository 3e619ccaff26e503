"""Every test here runs on every rank, as those of the conformance suite do; tests/xla/test_on_ranks.py starts them."""

from __future__ import annotations

import os

from conformance import worlds
from conformance.conftest import (
    leaves_nothing_behind,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_pyfunc_call,
    pytest_runtest_setup,
    world,
)

__all__ = [
    "leaves_nothing_behind",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_pyfunc_call",
    "pytest_runtest_setup",
    "world",
]

collect_ignore_glob = [] if {worlds.ATTACH, worlds.REPLICAS} & set(os.environ) else ["test_*.py"]
