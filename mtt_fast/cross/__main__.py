"""Test distilled sets on several networks: `python -m mtt_fast.cross`."""

import sys

from mtt_fast.commands import cli
from mtt_fast.cross.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
