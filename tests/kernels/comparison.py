"""Compare results with expected ones, and run the cases of triton_comparison.py: what all families share."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine, PartialPlanes, PlaneStats, add_planes
from mtt_fast.testing import added_up, relative_error
from tests.kernels.sanitizer import watched

UNINTERPRETED = {"tf32": "it does not round, so this would be fp32 once more"}
"""Precisions that the interpreter does not have, and why."""

TOLERANCES = {"fp32": 3e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}
"""Largest relative errors in the Euclidean norm."""

Operation = Callable[..., Any]
Case = Callable[[], None]
"""A comparison. It prints what passed, and raises for what did not."""


def poison() -> None:
    """Fill memory that is allocated without a value with NaN, which an element that no kernel writes then shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def allocate_and_poison(*args: Any, allocate: Operation = allocate, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        setattr(owner, name, allocate_and_poison)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Return the tensors of `results`, also those of nested tuples. Planes in parts are checked and added up."""
    if isinstance(results, Tensor):
        return (results,)
    if isinstance(results, PartialPlanes):
        return tuple(add_planes(results))
    return tuple(tensor for each in results for tensor in as_tuple(each))


def summed_results(back_end: Any, operation: str, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """Return the results of a back end's operation, with summands added up."""
    return added_up(operation, as_tuple(getattr(back_end, operation)(*arguments, **named)))


def check(case: object, run: Callable[[], Any], expected: Any, tolerance: float) -> None:
    """Check that the results of `run` have the shapes, the dtypes and, within a relative `tolerance`, the values of `expected`.

    Planes are contiguous or channels_last. On a GPU a second run must give the same bits; interpreted it could not differ.
    """
    results = as_tuple(run())
    repeated = as_tuple(run()) if results[0].is_cuda else results
    for place, (actual, again, wanted) in enumerate(zip(results, repeated, as_tuple(expected), strict=True)):
        where = f"{case}, result {place}"
        assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype), where
        if actual.dim() == 4:
            assert actual.is_contiguous(memory_format=torch.channels_last) or actual.is_contiguous(), where
            assert not wanted.is_contiguous() or actual.is_contiguous(), where
        assert torch.equal(actual, again), f"{where} differs from one run to the next"
        error = relative_error(actual, wanted.to(actual.device))
        assert error <= tolerance, f"{where}: error {error}"
    print("passed:", case)


def with_sizes(module: str, case: Case, **sizes: int) -> None:
    """Run a comparison with these sizes in the rows that one of Triton's modules reads off the table.

    The table's tiles hold all of a small tensor, so without this a loop over tiles would take one turn.
    """
    from mtt_fast.kernels.triton.configurations import configuration

    def row(*arguments: Any) -> dict[str, int]:
        constants: dict[str, int] = configuration(*arguments)
        return constants | {name: size for name, size in sizes.items() if name in constants}

    with patch.object(importlib.import_module(f"mtt_fast.kernels.triton.{module}"), "configuration", row):
        case()
    print("passed: by tiles of", sizes)


def in_float64(argument: Any) -> Any:
    """Return a tensor, or each tensor of an `Affine` or `PlaneStats`, in float64, and anything else as it is."""
    if isinstance(argument, Affine | PlaneStats):
        return type(argument)(*map(in_float64, argument))
    return argument.double() if isinstance(argument, Tensor) else argument


def run(cases: list[Case], part: int, parts: int) -> None:
    """Run part number `part` of `parts` of the cases: neighbours, since they share kernels.

    Where kernels are interpreted, what they load and store is watched (sanitizer.py).
    The seed is the number of a case, so that each draws the same numbers whatever the others are. A failure is raised as
    `AssertionError` after the last case: time on a GPU is scarce, so one run shows all that is wrong.
    """
    from mtt_fast.kernels.triton.launch import INTERPRETED

    failures, numbers = [], range(len(cases) * part // parts, len(cases) * (part + 1) // parts)
    assert numbers, f"part {part} of {parts} has none of {len(cases)} cases"
    for number in numbers:
        torch.manual_seed(number)
        try:
            with watched() if INTERPRETED else nullcontext():
                cases[number]()
        except Exception:
            failures.append(traceback.format_exc())
    assert not failures, "\n".join(failures)
