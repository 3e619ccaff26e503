"""Runs every test of this directory on every rank of every world."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import idist
from conformance.worlds import Attached, World, worlds


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(at_least, kind): runs in worlds of so many ranks or more, of this kind")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    wanted = marker.kwargs if marker else {}
    least, kind = wanted.get("at_least", 1), wanted.get("kind", World)
    chosen = [world for world in worlds() if world.size >= least and isinstance(world, kind)]
    metafunc.parametrize("world", chosen, indirect=True, ids=str, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """World by world, so that each is started once."""
    ours = [(index, world) for index, item in enumerate(items) if (world := _world_of(item)) is not None]
    for index, world in ours:
        items[index].add_marker(pytest.mark.timeout(world.deadline_s))
    by_world = sorted(ours, key=lambda place: worlds().index(place[1]))
    ordered = [items[index] for index, _ in by_world]
    for (index, _), item in zip(ours, ordered, strict=True):
        items[index] = item


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before any fixture, so that none of them takes the new ranks for something that the test has started.
    world = _world_of(item)
    if world is not None:
        world.repair()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    names = inspect.signature(pyfuncitem.obj).parameters
    if "world" in names:
        return None
    world: Any = pyfuncitem.funcargs["world"]
    try:
        world.run(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    finally:
        if isinstance(world, Attached) and world.failed and world.size > 1:
            pyfuncitem.session.shouldfail = "the ranks are no longer in step"
    return True


@pytest.fixture(scope="session", autouse=True)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    running: World = request.param
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(world: World) -> Iterator[None]:
    """In the place of the one for all tests: the ranks live on, and their world sees to it that they end."""
    before = _around()
    yield
    assert _around() == before
    assert isinstance(world, Attached) or idist.backend() is None


def _around() -> tuple[dict[str, str], set[threading.Thread]]:
    """The environment, and the threads that are no daemons: they would keep pytest from ending."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return variables, {thread for thread in threading.enumerate() if not thread.daemon}


def _world_of(item: pytest.Item) -> World | None:
    """The world that a test of this directory is to run in; None if there is none that it can run in."""
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("world") if callspec else None
    return found if isinstance(found, World) else None
