"""Run any command by one name: `mtt_fast COMMAND …`, or `python -m mtt_fast COMMAND …`, is `python -m mtt_fast.COMMAND …`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from mtt_fast import __version__
from mtt_fast.commands import cli
from mtt_fast.errors import InputError, did_you_mean

_COMMANDS = {
    "experts": "train experts on real images and save their trajectories",
    "buffer": "the same, by the public code's name",
    "distill": "distil a data set into a few synthetic images per class",
    "compress": "compress experts to a few waypoints each",
    "evaluate": "train fresh networks on a distilled set and test them",
    "baselines": "make sets by other methods, for comparison",
    "cross": "test a distilled set on other architectures",
    "analysis": "make the paper's figures and tables",
    "report": "write an HTML page about runs",
    "convert": "convert distilled sets and experts to and from the files of other software",
    "recipes": "list the recipes (named settings)",
    "env": "show versions, devices and kernels",
}


def main() -> int:
    """Run the command that the command line names, and return the exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return cli.run(lambda _: print(_usage()))
    if sys.argv[1] == "--version":
        print(__version__)
        return 0
    name, *arguments = sys.argv[1:]
    return _run(name, arguments) if name in _COMMANDS else cli.run(lambda _: _refuse(name))


def _refuse(name: str) -> None:
    raise InputError(f"{name}: expected one of {', '.join(_COMMANDS)}{did_you_mean(name, list(_COMMANDS))}")


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run the module of a command as `python -m` does."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"mtt_fast.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _usage() -> str:
    commands = [f"  {name:10} {text}" for name, text in _COMMANDS.items()]
    return "\n".join(["usage: mtt_fast COMMAND …        (mtt_fast COMMAND --help says more)", "", *commands])


if __name__ == "__main__":
    sys.exit(main())
