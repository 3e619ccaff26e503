"""What this machine's network looks like, and whether a host can be reached."""

import socket

import pytest

from idist.cli import network


def test_the_loopback_interface_is_there() -> None:
    (loopback,) = [interface for interface in network.interfaces() if interface.name == "lo"]
    assert loopback.up
    assert "127.0.0.1" in loopback.addresses


@pytest.mark.parametrize("listens", [True, False])
def test_an_answer_is_an_answer_though_nobody_listens(listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not listens:
            listener.close()
        assert network.reach("127.0.0.1", port) == network.Reach(("127.0.0.1",), listens)


def test_a_name_that_nobody_knows() -> None:
    reach = network.reach("nowhere.invalid", 1)
    assert reach.addresses == ()
    assert reach.problem is not None
    assert reach.problem.startswith("the name nowhere.invalid cannot be resolved")


@pytest.mark.parametrize(
    ("value", "there"),
    [("eth0", True), ("eth", True), ("=eth0", True), ("ib0,eth1", True), ("^eth", True), ("", True), ("ib", False)],
)
def test_interfaces_are_chosen_by_the_beginnings_of_names(value: str, there: bool) -> None:
    present = [network.Interface(name, True, ()) for name in ("lo", "eth0", "eth1")]
    missing = network.missing_interfaces({"NCCL_SOCKET_IFNAME": value, "PATH": "ib"}, present)
    assert missing == ([] if there else [f"NCCL_SOCKET_IFNAME={value}"])
