"""Run one of the analyses: `python -m mtt_fast.analysis COMMAND …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mtt_fast.commands import cli
from mtt_fast.errors import InputError, did_you_mean

COMMANDS = {
    "grid": "accuracy over expert epochs M and student steps N: Figure 5, left",
    "distance": "distance between training on distilled sets and on real images: Figure 5, right",
    "tables": "Tables 1 to 4: your measured numbers beside the paper's",
    "score": "DD-Ranking's label-robust score from accuracies",
    "evolution": "the images over the iterations of a run: a GIF and a strip",
}
"""Each is a module of this package with `main(argv)`."""


def main(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m mtt_fast.analysis COMMAND [--help]\n")
        for name, about in COMMANDS.items():
            print(f"  {name:12}{about}")
        return
    name = argv[0]
    if name not in COMMANDS:
        raise InputError(
            f"{name}: no such analysis{did_you_mean(name, list(COMMANDS))}; see python -m mtt_fast.analysis"
        )
    importlib.import_module(f"mtt_fast.analysis.{name}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(cli.run(main))
