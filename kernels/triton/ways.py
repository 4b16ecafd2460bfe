"""Which way an operation goes on a GPU, from the checked-in table: by a kernel of ours or by torch's library.

A whole block goes `fused` (block.py) or in `parts`, each of which then goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor

from ..formats import Precision
from . import convolution, library
from .configurations import way_of
from .entry import architecture
from .planes import Planes
from .products import effective_precision, shape_classes

MODULES: dict[str, ModuleType] = {"triton": convolution, "cudnn": library}


def chosen(operation: str) -> Callable[..., Any]:
    """Return the convolution named `operation` as a function that goes the way the table says for its arguments."""

    @wraps(getattr(library, operation))
    def run(*arguments: Any, **named: Precision) -> Any:
        every: list[Any] = [*arguments, *named.values()]
        operands, precision = every[:-1], every[-1]  # which comes last, by name or without
        way = _way(operation, operands[0], _result(operation, *operands), precision)
        return getattr(MODULES[way], operation)(*operands, precision)

    return run


def fuses(operation: str, x: Tensor, weight: Tensor, padding: int, precision: Precision) -> bool:
    """Return whether the table has `operation`, of a block that convolves `x` with `weight`, done in one."""
    return _way(operation, x, _result("conv3x3", x, weight, padding), precision) == "fused"


def _way(operation: str, x: Tensor, result: Planes, precision: Precision) -> str:
    closely, loosely = shape_classes(Planes.of(x), result, effective_precision(x.dtype, precision))
    return way_of(operation, closely, architecture(x.device), loosely)


def _result(operation: str, *arguments: Any) -> Planes:
    """What is convolved to, or, where the result is of the weights, correlated with."""
    planes, (factor, padding) = Planes.of(arguments[0]), arguments[-2:]
    if operation.endswith("weight_gradient"):
        return Planes.of(factor)
    back = "input_gradient" in operation
    grown = (2 - 2 * padding) if back else (2 * padding - 2)
    channels = factor.shape[1] if back else len(factor)
    return Planes(planes.samples, channels, planes.height + grown, planes.width + grown, planes.memory_format)
