"""All commands under one name: `mtt_fast JOB …`, or `python -m mtt_fast JOB …`, is `python -m mtt_fast.JOB …`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from mtt_fast import __version__
from mtt_fast.commands import cli
from mtt_fast.errors import did_you_mean

_JOBS = {
    "experts": "train experts on real images and record their trajectories",
    "distill": "distil a data set into a few synthetic images a class",
    "compress": "experts as a few waypoints each",
    "evaluate": "train fresh networks on a distilled set and test them",
    "baselines": "other methods, for comparison",
    "cross": "test a distilled set on other architectures",
    "analysis": "the paper's analyses of a run",
    "report": "one page about runs",
    "convert": "distilled sets and experts to and from the files of other software",
    "recipes": "settings by name",
    "env": "what this installation can do here",
}


def main() -> int:
    """Run the job that the command line names, and return the exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return cli.run(lambda _: print(_usage()))
    if sys.argv[1] == "--version":
        print(__version__)
        return 0
    name, *arguments = sys.argv[1:]
    if name not in _JOBS:
        print(f"error: {name}: expected one of {', '.join(_JOBS)}{did_you_mean(name, list(_JOBS))}", file=sys.stderr)
        return 2
    return _run(name, arguments)


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run the module of a job as `python -m` does."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"mtt_fast.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _usage() -> str:
    jobs = [f"  {name:10} {text}" for name, text in _JOBS.items()]
    return "\n".join(["usage: mtt_fast JOB …        (mtt_fast JOB --help says more)", "", *jobs])


if __name__ == "__main__":
    sys.exit(main())
