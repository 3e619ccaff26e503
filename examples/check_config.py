"""What idist finds here, and whether the processes of a launcher can talk: ``idist check`` as a script.

For launchers that take a file only. --backend, --timeout and --json as there.
"""

import sys

from idist.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
