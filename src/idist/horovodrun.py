"""Where the ranks meet that horovodrun started on several hosts: it does not tell them which is rank 0's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from idist.errors import LaunchError
from idist.topology import Topology

_PATH = "/idist/rank0"
_PAUSE_S = 0.2
_ANSWER_S = 5.0


def locate(env: Mapping[str, str], topology: Topology, deadline: float) -> Topology:
    """The topology with the address of rank 0: the one from which it reaches horovodrun's server, where it says so.

    Args:
        deadline: of the meeting, by :func:`time.monotonic`.

    Raises:
        LaunchError: the server cannot be reached, or rank 0 has not spoken until then.

    Cost: nothing on one node; else a few requests to the server, whose values the ranks share.

    Source: https://github.com/horovod/horovod/blob/v0.28.1/horovod/runner/http/http_server.py
    """
    server = env.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"), env.get("HOROVOD_GLOO_RENDEZVOUS_PORT", "")
    if topology.nnodes == 1:
        return dataclasses.replace(topology, master_addr="127.0.0.1")
    if server[0] is None or not server[1].isdecimal():
        return topology
    host = _told_by_rank_0(server[0], int(server[1]), topology, deadline)
    return dataclasses.replace(topology, master_addr=host)


def _told_by_rank_0(host: str, port: int, topology: Topology, deadline: float) -> str:
    from http.client import HTTPConnection, HTTPException

    problem = "rank 0 did not say where it is"
    while (left := deadline - time.monotonic()) > 0:
        connection = HTTPConnection(host, port, timeout=min(_ANSWER_S, left))
        try:
            connection.connect()
            if topology.rank == 0:
                own = str(connection.sock.getsockname()[0])
                connection.request("PUT", _PATH, own.encode())
                if connection.getresponse().status == 200:
                    return own
            connection.request("GET", _PATH)
            answer = connection.getresponse()
            if answer.status == 200:
                return answer.read().decode()
        except (OSError, HTTPException) as error:
            problem = f"its server did not answer: {error}"
        finally:
            connection.close()
        time.sleep(_PAUSE_S)
    raise LaunchError(
        f"rank {topology.rank} of {topology.world_size} asked horovodrun's server at {host}, port {port}, where to "
        f"meet, but {problem}. Set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there."
    )
