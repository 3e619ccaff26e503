"""Which launcher and backend were really run together: out of the reports of the suites into the README.

    .venv/bin/python tools/tried.py REPORT.xml ...

A report is what `make test ARGS=--junitxml=test.xml` leaves, or any other suite; its name is the suite's. What it says
goes into docs/tried.json, where suites of which there is no new report stay as they were, and from there into the
table of README.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RECORD, README = ROOT / "docs" / "tried.json", ROOT / "README.md"
BEGIN, END = "<!-- tried: made by tools/tried.py -->\n", "<!-- end of tried -->\n"

BACKENDS = ("gloo", "mpi", "horovod", "xla", "nccl")

# Launcher, backend: the tests in which these two train or talk, by suite, file and name.
TESTS = {
    "python": {
        "gloo": r"test tests\.conformance\..*\[.*gloo-",
        "mpi": r"test-\w+ tests\.mpi\.test_spawn_mpi ",
        "horovod": r"test-horovod tests\.hvd\.test_spawn_horovod ",
        "xla": r"test-xla tests\.(xla|test_documents)\b(?!.*torchrun)",
    },
    "notebook": {"gloo": r"test tests\.examples\.test_notebook "},
    "torchrun": {
        "gloo": r"test (tests\.launchers\.test_torchrun |tests\.(test_documents|examples\.\w+) .*torchrun)",
        "horovod": r"test-horovod .*(\[torchrun\]|torchrun.*--backend horovod)",
        "xla": r"test-xla .*torchrun",
    },
    "Slurm": {"gloo": r"test-slurm tests\.slurm\."},
    "mpiexec": {
        "gloo": r"test-\w+ (tests\.mpi\.test_mpiexec |tests\.test_documents .*where\.py gloo)",
        "mpi": r"test-\w+ (tests\.mpi\.test_(on_ranks|document|ends|errors|large) |.*where\.py mpi)",
    },
    "horovodrun": {
        "gloo": r"test-horovod .*(\[.*gloo.*\]|where\.py gloo)",
        "horovod": r"test-horovod tests\.hvd\.test_(on_ranks|document|horovodrun) (?!.*(gloo|torchrun|spawn))",
    },
    "Kubernetes": {},
}
NOT_RUN = {"Kubernetes": "variables only"}


def read(report: Path) -> tuple[dict[str, Any], list[str]]:
    """When and with which versions a suite ran, and the tests that passed, as ``suite file name``."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, f"{report} is no report of pytest"
    # Hypothesis leaves statistics beside the versions.
    versions = {
        item.get("name"): item.get("value")
        for item in suite.iter("property")
        if not str(item.get("name")).startswith("hypothesis-")
    }
    passed = [
        f"{report.stem} {case.get('classname')} {case.get('name')}"
        for case in suite.iter("testcase")
        if not {child.tag for child in case} & {"failure", "error", "skipped"}
    ]
    return {"date": (suite.get("timestamp") or "")[:10], "versions": versions}, passed


def counted(passed: list[str]) -> dict[str, dict[str, int]]:
    """How many of these tests ran each launcher with each backend."""

    def matching(tests: str) -> int:
        return sum(re.match(tests, test) is not None for test in passed)

    return {
        launcher: {backend: matching(tests) for backend, tests in columns.items() if matching(tests)}
        for launcher, columns in TESTS.items()
    }


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: launchers by backends, and what the suites ran with."""
    rows = [f"| | {' | '.join(BACKENDS)} |", f"|---|{'--:|' * len(BACKENDS)}"]
    for launcher in TESTS:
        counts = [sum(suite["counts"].get(launcher, {}).get(b, 0) for suite in record.values()) for b in BACKENDS]
        cells = [str(n) if n else "" for n in counts]
        if launcher in NOT_RUN:
            cells[0] = NOT_RUN[launcher]
        rows.append(f"| {launcher} | {' | '.join(cells)} |")
    ran = [
        f"- `make {name}` on {suite['date']}: "
        + ", ".join(f"{package} {version}" for package, version in suite["versions"].items())
        for name, suite in record.items()
    ]
    return "\n".join([*rows, "", *ran]) + "\n"


def placed(text: str, made: str) -> str:
    """The text with what was made between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(reports: list[str]) -> None:
    """Record the reports, and write the table."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for path in map(Path, reports):
        facts, passed = read(path)
        record[path.stem] = {**facts, "counts": counted(passed)}
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n")
    README.write_text(placed(README.read_text(), table(json.loads(RECORD.read_text()))))


if __name__ == "__main__":
    main(sys.argv[1:])
