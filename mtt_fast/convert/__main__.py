"""Convert distilled sets and experts: `python -m mtt_fast.convert`."""

import sys

from mtt_fast.commands import cli
from mtt_fast.convert.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
