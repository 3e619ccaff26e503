"""Imported by the fork server, and by nothing else: a warning to all processes of a job must not end the server.

It would leave its workers without anybody to say how they end. It ends when the process that started it does.
"""

import os
import signal

_SERVER = os.getpid()
_WARNINGS = (signal.SIGUSR1, signal.SIGTERM)


def _hear_again() -> None:
    """In a worker, from its first moment: it has the script to import, and might be told to end meanwhile."""
    if os.getppid() == _SERVER:  # not in a process that a worker forks
        for number in _WARNINGS:
            signal.signal(number, signal.SIG_DFL)


for _number in _WARNINGS:
    signal.signal(_number, signal.SIG_IGN)
os.register_at_fork(after_in_child=_hear_again)
