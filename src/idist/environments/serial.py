"""One process on its own: what is left when no launcher left its variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected
from idist.topology import SERIAL, Topology


class Serial(Environment):
    """One process; it claims every mapping, so it comes last."""

    name: ClassVar[str] = "serial"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        return SERIAL
