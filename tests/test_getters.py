"""What a process and a thread that is a rank know of their place."""

import socket

import pytest

import idist
from idist.errors import ConfigError
from idist.testing import run_threads


def test_alone() -> None:
    assert (idist.get_rank(), idist.get_world_size()) == (0, 1)
    assert (idist.get_local_rank(), idist.get_nproc_per_node()) == (0, 1)
    assert (idist.get_node_rank(), idist.get_nnodes()) == (0, 1)
    assert (idist.backend(), idist.model_name()) == (None, "serial")
    assert idist.hostname() == socket.gethostname()


def test_in_threads() -> None:
    def seen() -> tuple[int, ...]:
        nodes = (idist.get_nproc_per_node(), idist.get_nnodes(), idist.get_node_rank())
        return (idist.get_rank(), idist.get_local_rank(), idist.get_world_size(), *nodes)

    assert run_threads(seen, 3) == [(rank, rank, 3, 3, 1, 0) for rank in range(3)]
    assert idist.get_world_size() == 1


def test_available_backends_can_be_used_here() -> None:
    available = idist.available_backends()
    assert "gloo" in available
    assert not {"serial", "undefined", "fake", "xyzzy"} & set(available)
    for name in available:
        with pytest.raises(ConfigError, match="timeuot"):  # not BackendUnavailable
            idist.initialize(name, rank=0, world_size=1, timeuot=1)


def test_what_the_installation_has() -> None:
    assert idist.has_native_dist_support is True
    assert all(isinstance(has, bool) for has in (idist.has_xla_support, idist.has_hvd_support))
    assert {kind.model_name for kind in idist.registered_computation_models} >= {"serial", "native-dist"}
