"""``import idist`` is free of side effects and cheap beside ``import torch``."""

import json
import subprocess
import sys
from typing import Any

import pytest

# At most 30 ms over `import torch` is promised. A machine's speed is no test, so the modules are counted: a module of
# ours takes about 0.25 ms, one of others can take anything.
MOST_OF_OURS = 68
MOST_OF_OTHERS = 5

SCRIPT = """
import json, os, sys
import torch

before, environ, events = set(sys.modules), dict(os.environ), []
SOURCES = (".py", ".pyc", ".so", ".pth", ".pyi")
WATCHED = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.mkdir", "os.remove", "os.rename",
           "os.putenv", "os.unsetenv", "shutil.", "tempfile.", "signal.", "urllib.", "ctypes.dlopen")

def watch(event, args):
    if event == "open":
        path, mode, flags = args
        if flags & (os.O_WRONLY | os.O_RDWR) or not str(path).endswith(SOURCES):
            events.append(f"open {path} {mode}")
    elif event.startswith(WATCHED):
        events.append(f"{event} {args}")

sys.addaudithook(watch)
import idist
print(json.dumps({"modules": sorted(set(sys.modules) - before), "events": list(events),
                  "environ": dict(os.environ) == environ}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    # -B: Python itself would write the compiled modules of a fresh clone.
    done = subprocess.run([sys.executable, "-B", "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_opens_and_writes_nothing(imported: dict[str, Any]) -> None:
    assert imported["events"] == []
    assert imported["environ"]


def test_imports_no_optional_package(imported: dict[str, Any]) -> None:
    roots = {module.split(".")[0] for module in imported["modules"]}
    assert not roots & {"torch_xla", "horovod", "mpi4py", "apex"}


def test_costs_little_over_torch(imported: dict[str, Any]) -> None:
    ours = [module for module in imported["modules"] if module.split(".")[0] == "idist"]
    others = sorted(set(imported["modules"]) - set(ours))
    assert len(ours) <= MOST_OF_OURS, ours
    assert len(others) <= MOST_OF_OTHERS, others
