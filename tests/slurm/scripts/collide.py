"""Meet after a random delay, one for each job and rank; with TOGETHER=N stay until N processes of all jobs have met."""

from __future__ import annotations

import os
import random
import time

from telling import FOLDER, place, tell

import idist

name = "{ROUND}: {SLURM_JOB_ID}, {SLURM_PROCID}".format(**os.environ)
time.sleep(random.Random(name).uniform(0, 1))
with idist.Parallel(backend="gloo", timeout=60):
    tell(**place())
    deadline = time.monotonic() + 60
    while len(list(FOLDER.glob("*.json"))) < int(os.environ["TOGETHER"]):
        assert time.monotonic() < deadline, "the other job did not meet"
        time.sleep(0.05)
    idist.barrier()
