"""Meet the others, for which TIMEOUT seconds are given."""

from __future__ import annotations

import os

from telling import place, tell

import idist

with idist.Parallel(backend="gloo", timeout=float(os.environ.get("TIMEOUT", "60"))):
    tell(**place())
