"""What this machine's network looks like, from the standard library alone."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONNECT_S = 3.0
_UP = 0x1  # IFF_UP
_GET_FLAGS, _GET_ADDRESS = 0x8913, 0x8915  # SIOCGIFFLAGS, SIOCGIFADDR of Linux
_IPV6 = Path("/proc/net/if_inet6")


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """A network interface; whether it is up is only known on Linux, and so are its addresses."""

    name: str
    up: bool | None
    addresses: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Reach:
    """Whether a host can be reached.

    Attributes:
        addresses: what its name resolves to.
        listens: whether somebody answers at the port.
        problem: why it cannot be reached; None if it can.
    """

    addresses: tuple[str, ...]
    listens: bool = False
    problem: str | None = None


def interfaces() -> list[Interface]:
    """Those of this machine, or of this network namespace."""
    names = [name for _, name in socket.if_nameindex()]
    if sys.platform != "linux":
        return [Interface(name, None, ()) for name in names]
    ipv6 = _ipv6_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return [_interface(any_socket, name, ipv6.get(name, [])) for name in names]


def missing_interfaces(env: Mapping[str, str], present: Sequence[Interface]) -> list[str]:
    """``NAME=value`` of the variables that choose an interface which is not there.

    A value is a list of names or beginnings of names; after ``^`` they are those not to use.
    """
    missing = []
    for name, value in sorted(env.items()):
        if not name.endswith("_SOCKET_IFNAME") or not value or value.startswith("^"):
            continue
        wanted = tuple(re.split("[,:]", value.lstrip("=")))
        if not any(interface.name.startswith(wanted) for interface in present):
            missing.append(f"{name}={value}")
    return missing


def resolve(host: str) -> tuple[str, ...]:
    """Its addresses, each once; none if the name is unknown here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def reach(host: str, port: int) -> Reach:
    """Try to connect. A refused connection is an answer too: the host is there, and nobody listens yet."""
    addresses = resolve(host)
    if not addresses:
        return Reach((), problem=f"the name {host} cannot be resolved on {socket.gethostname()}")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except ConnectionRefusedError:
        return Reach(addresses)
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        return Reach(addresses, problem=f"{host}:{port} cannot be reached from {socket.gethostname()}: {why}")
    return Reach(addresses, listens=True)


def _interface(any_socket: socket.socket, name: str, ipv6: list[str]) -> Interface:
    flags = _ask(any_socket, _GET_FLAGS, name)
    address = _ask(any_socket, _GET_ADDRESS, name)
    up = None if flags is None else bool(struct.unpack("H", flags[16:18])[0] & _UP)
    ipv4 = [] if address is None else [socket.inet_ntoa(address[20:24])]
    return Interface(name, up, (*ipv4, *ipv6))


def _ask(any_socket: socket.socket, question: int, name: str) -> bytes | None:
    """An ``ifreq`` filled in by the kernel, see netdevice(7); None where there is no answer, such as no address."""
    import fcntl  # there is none on Windows

    try:
        return fcntl.ioctl(any_socket, question, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None


def _ipv6_addresses() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in _IPV6.read_text().splitlines() if _IPV6.exists() else ():
        address, *_, name = line.split()
        found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(address))))
    return found
