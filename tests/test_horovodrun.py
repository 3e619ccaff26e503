"""Where ranks meet that horovodrun started on several hosts, with a server that says nothing of rank 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from processes import LOOPBACK

import idist
from idist import horovodrun
from idist.topology import Topology


class KnowsNothing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    serving = HTTPServer((LOOPBACK, 0), KnowsNothing)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_the_meetings_deadline_counts(server: HTTPServer, seconds: float) -> None:
    variables = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
    }
    topology = Topology("horovod", 1, 2, local_rank=0, nproc_per_node=1, node_rank=1, nnodes=2)
    begun = time.monotonic()
    with pytest.raises(idist.LaunchError, match="rank 0 did not say where it is"):
        horovodrun.locate(variables, topology, begun + seconds)
    assert seconds <= time.monotonic() - begun < seconds + 5
