"""What an import costs after that of torch, beside pytorch-ignite and Accelerate: `python bench/imports.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from alternate import Comparison, alternate, arguments, report, with_bytecode

MODULES = {"idist": "idist", "pytorch-ignite": "ignite.distributed", "Accelerate": "accelerate"}
TARGET_S = 0.030
SCRIPT = """
import time, torch
begun = time.process_time()
import {}
print(time.process_time() - begun)
"""


def seconds(module: str) -> float:
    """Of the processor, which a busy machine does not stretch, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT.format(module)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=with_bytecode(os.environ))
    return float(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure all."""
    options = arguments(__doc__, turns=9)
    for module in MODULES.values():  # compile them
        seconds(module)
    times = alternate({name: partial(seconds, module) for name, module in MODULES.items()}, options.turns)
    what = "import, after import torch"
    found = [Comparison(what, name, times["idist"], times[name], 1.0) for name in MODULES if name != "idist"]
    found.append(Comparison(what, "30 ms", times["idist"], [TARGET_S] * options.turns, 1.0))
    report(found, as_json=options.json)


if __name__ == "__main__":
    main()
