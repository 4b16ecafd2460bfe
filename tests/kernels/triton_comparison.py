"""Hold Triton's operations of one family to the reference: `python -m tests.kernels.triton_comparison FAMILY DEVICE PART PARTS`.

A process either interprets Triton's kernels (TRITON_INTERPRET=1, DEVICE cpu) or compiles them (DEVICE cuda). So what is
interpreted is a program of its own, which `compare` runs; it prints a line for each case that passed. On a GPU, where compiling
takes nearly all the time, a family is cut into parts that are tests of their own: they run side by side, and each has its outcome.

The reference computes on the CPU, in float64, so that no fault of a GPU's libraries hides there. The cases of each family are
in the other files that end in `_comparison.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from mtt_fast.kernels import Precision
from tests.kernels.comparison import UNINTERPRETED, Case, poison, run

PARTS_ON_A_GPU = {"conv": 10, "block": 8, "norm": 14, "bias": 2, "classifier": 6, "flat": 2, "student": 12}
"""How many tests the cases of a family are, where they are not one."""

ROOT = Path(__file__).resolve().parents[2]


def each_part(family: str) -> pytest.MarkDecorator:
    """Parametrise a test over the parts of a family."""
    return pytest.mark.parametrize("part", range(PARTS_ON_A_GPU[family]))


def compare(family: str, device: str, part: int = 0) -> list[str]:
    """Compare a part of a family; return the lines that are printed.

    On `cpu`, where Triton is interpreted, all of the family is one part.
    """
    parts = 1 if device == "cpu" else PARTS_ON_A_GPU.get(family, 1)
    return run_part("tests.kernels.triton_comparison", family, device, part=part, parts=parts)


def run_part(module: str, *arguments: str, part: int = 0, parts: int = 1) -> list[str]:
    """Compare a part by `module`, with the arguments; return the lines that are printed.

    The last argument is the device: on `cpu` the module runs as a program that interprets Triton, else in this process. Fails
    the test if a comparison fails, or none is made.
    """
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    if arguments[-1] == "cpu":
        return _run_program(module, *arguments, str(part), str(parts))
    return run_here(importlib.import_module(module).compare_part, *arguments, part, parts)


def run_here(compare_part: Callable[..., None], *arguments: str | int) -> list[str]:
    """Run a part in this process; return the lines that it prints. Libraries' warnings are no errors here.

    Ends the process if the GPU's context is broken, as later tests would only say so again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many parts run at a time as there are processors
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(action="ignore"):
            compare_part(*arguments)
    except Exception:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        raise
    finally:
        torch.set_num_threads(threads)
    return printed.getvalue().splitlines()


def _run_program(module: str, *arguments: str) -> list[str]:
    """Run a part as a program that interprets Triton."""
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False
    )
    if finished.returncode:
        pytest.fail(finished.stderr, pytrace=False)
    return finished.stdout.splitlines()


def cases_of(family: str, device: str) -> list[Case]:
    """Return all comparisons of a family. Raises `ValueError` for a name that none has."""
    from tests.kernels import (
        block_comparison,
        classifier_comparison,
        conv_comparison,
        flat_comparison,
        partial_comparison,
        plane_comparison,
        warp_comparison,
    )

    match family:
        case "norm":
            return [
                *plane_comparison.norm_cases(device),
                *partial_comparison.norm_cases(device),
                *plane_comparison.norm_checks(device),
            ]
        case "bias":
            return plane_comparison.bias_cases(device)
        case "conv":
            return conv_comparison.conv_cases(device)
        case "block":
            return block_comparison.block_cases(device) + partial_comparison.block_cases(device)
        case "statistics":
            return [partial(block_comparison.statistics, device)]
        case "classifier":
            return classifier_comparison.classifier_cases(device)
        case "flat":
            return flat_comparison.flat_cases(device)
        case "warp":
            return warp_comparison.warp_cases(device)
        case _:
            raise ValueError(f"no family is called {family}")


def compare_part(family: str, device: str, part: int, parts: int) -> None:
    """Run part number `part` of the `parts` of a family on `device`, without TF32 in cuDNN."""
    assert set(UNINTERPRETED) <= set(get_args(Precision)), "the list of what the interpreter cannot do is out of date"
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        run(cases_of(family, device), part, parts)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


if __name__ == "__main__":
    poison()  # in a test, a fixture does so
    compare_part(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
