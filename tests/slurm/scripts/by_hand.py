"""A process group made by hand first, as in scripts that know nothing of idist, and one of idist's after it."""

from __future__ import annotations

import torch.distributed as dist
from telling import place, tell

import idist

dist.init_process_group("gloo")
by_hand = place()
dist.destroy_process_group()
with idist.Parallel(backend="gloo", timeout=60):
    tell(by_hand=by_hand, **place())
