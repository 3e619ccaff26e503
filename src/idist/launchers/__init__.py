"""How do processes start? A function in, the results by local rank out."""

from __future__ import annotations

from idist.launchers.job import Job, plan
from idist.launchers.spawn import launch

__all__ = ["Job", "launch", "plan"]
