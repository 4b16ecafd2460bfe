"""Train experts: `python -m mtt_fast.experts`."""

import sys

from mtt_fast.commands import cli
from mtt_fast.experts.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
