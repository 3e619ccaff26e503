"""``python -m idist``: the command line, where the console script is not on PATH."""

import sys

from idist.cli import main

if __name__ == "__main__":
    sys.exit(main())
