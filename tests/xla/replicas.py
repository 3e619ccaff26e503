"""A world of the conformance suite: ranks of torch_xla on the CPU, all of them threads of one process."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from conformance.worlds import Processes, answer

from xla import cpu_client

START_S = 180


class Replicas(Processes):
    """They call back at a socket: through torch_xla.launch come plain values alone."""

    deadline_s = 2 * START_S
    body_s = 120.0  # each rank compiles its programs
    stop_s = 60.0

    def __init__(self, size: int) -> None:
        super().__init__("xla-tpu", size)

    def start(self) -> None:
        self._ended_with = ""
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(folder, "calls"))
            listener.bind(address)
            listener.listen(self.size)
            listener.settimeout(START_S)
            self._launcher = threading.Thread(target=self._launch, args=(call_back, address), daemon=True)
            self._launcher.start()
            called = [Connection(listener.accept()[0].detach()) for _ in range(self.size)]
        by_rank = {channel.recv(): channel for channel in called}
        self._channels = [by_rank[rank] for rank in range(self.size)]
        self._pids = [pid for _, pid in self._answers(START_S)]


def call_back(local_rank: int, address: str) -> None:
    cpu_client.let_replicas_talk()
    with socket.socket(socket.AF_UNIX) as calling:
        calling.connect(address)
        channel = Connection(os.dup(calling.fileno()))
    channel.send(local_rank)
    answer(channel)
