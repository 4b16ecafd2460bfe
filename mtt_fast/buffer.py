"""The old name of `python -m mtt_fast.experts`."""

import sys

from mtt_fast.commands import cli
from mtt_fast.experts import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
