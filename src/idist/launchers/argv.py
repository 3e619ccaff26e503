"""The argument that ``python -m torch.distributed.launch`` adds to every script, unless it gets --use_env."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

logger = logging.getLogger("idist")


def drop_local_rank() -> None:
    """Take ``--local-rank=N`` out of ``sys.argv``, if torch has put it there and the script does not know it.

    The launcher puts it right after the script, whose own parser would refuse it; that runs before
    any call of ours, so ``import idist`` calls this. Nobody needs it: the same number is in
    LOCAL_RANK. It goes only if all of this holds:

    - torchelastic has started this process (TORCHELASTIC_RUN_ID), with LOCAL_RANK=N;
    - the first argument is literally ``--local-rank=N``, as the launcher writes it;
    - the file of the script, which can be read, nowhere names ``--local-rank`` or ``--local_rank``.
      One that does reads the argument itself, and gets it.

    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/run.py#L965
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if not os.environ.get("TORCHELASTIC_RUN_ID") or sys.argv[1:2] != [f"--local-rank={local_rank}"]:
        return
    try:
        script = Path(sys.argv[0]).read_text(errors="replace")
    except OSError:
        return
    if not re.search(r"--local[-_]rank", script):
        del sys.argv[1]
        logger.info("--local-rank=%s, added by torch.distributed.launch, is kept from the script", local_rank)
