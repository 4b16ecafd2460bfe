"""Make a set by another method, and evaluate it: `python -m mtt_fast.baselines METHOD`."""

import sys

from mtt_fast.baselines.command import main
from mtt_fast.commands import cli

if __name__ == "__main__":
    sys.exit(cli.run(main))
