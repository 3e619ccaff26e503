"""Imported by the fork server, and by nothing else: a warning to all processes of a job must not end the server.

It would leave its workers without anybody to say how they end. It ends when the process that started it does.
"""

import signal

for _number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(_number, signal.SIG_IGN)
