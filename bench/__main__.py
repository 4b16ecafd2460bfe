"""Run a benchmark: `python -m bench COMMAND …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mtt_fast.commands import cli, parsing
from mtt_fast.errors import InputError, did_you_mean

COMMANDS = {
    "meta_step": "one iteration of the method by every engine: time, memory, error",
    "modules": "any nn.Module beside whole-graph autograd: CPU seconds, time, memory",
    "memory_scaling": "peak memory against steps, batch and resolution, beside the plan's prediction",
    "kernels": "bandwidth and arithmetic of each operation, beside the device's own",
    "first_block": "the first block in parts, without its planes, and a lower bound: its matrix products",
    "precision": "errors of the gradients in each precision of the products, against float64",
    "distillation": "accuracy of whole distillations in each precision of the products",
    "tune": "a new table of launch configurations, for this machine's GPU",
    "experts": "training on real images, beside an ordinary module and optimizer",
    "evaluate": "training on distilled images, beside an ordinary module and optimizer",
    "methods": "every method and the successors' options under one protocol: accuracy, time, memory",
    "trajectories": "time to the first sample and memory of the store, beside the public format",
    "profile": "a trace of one iteration for Perfetto or chrome://tracing",
    "gpu": "everything that needs a GPU, in stages",
    "render": "tables and plots from the records, into docs/",
}
"""Each is a module of this package, with `Options` and `main(options, command)`."""


def main(argv: Sequence[str]) -> None:
    """Run the command line `argv`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m bench COMMAND [--help]\n")
        for name, about in COMMANDS.items():
            print(f"  {name:16}{about}")
        return
    name = argv[0].replace("-", "_")
    if name not in COMMANDS:
        raise InputError(f"{argv[0]}: no such benchmark{did_you_mean(name, list(COMMANDS))}; see python -m bench")
    benchmark = importlib.import_module(f"bench.{name}")
    prog = f"python -m bench {name}"
    benchmark.main(parsing.parse(benchmark.Options, argv[1:], prog), " ".join([prog, *argv[1:]]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
