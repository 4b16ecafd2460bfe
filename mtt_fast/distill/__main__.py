"""Distil a data set: `python -m mtt_fast.distill`."""

import sys

from mtt_fast.commands import cli
from mtt_fast.distill.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
