"""Run `python -m mtt_fast.experts` under the public code's name."""

import sys

from mtt_fast.commands import cli
from mtt_fast.experts.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
