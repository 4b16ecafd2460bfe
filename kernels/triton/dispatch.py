"""Choose, from the checked-in table, the back end of an operation on a GPU: a kernel of ours or torch's library."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor

from ..types import Precision
from . import conv, cudnn
from .configurations import backend_of
from .implicit_gemm import effective_precision, shape_classes
from .launch import architecture
from .planes import Planes

BACKENDS: dict[str, ModuleType] = {"triton": conv, "cudnn": cudnn}


def dispatched(operation: str) -> Callable[..., Any]:
    """Return the convolution named `operation` as a function that takes the table's back end for its arguments."""

    @wraps(getattr(cudnn, operation))
    def run(*arguments: Any, **named: Precision) -> Any:
        every: list[Any] = [*arguments, *named.values()]
        operands, precision = every[:-1], every[-1]  # which comes last, by name or without
        backend = _backend(operation, operands[0], _result(operation, *operands), precision)
        return getattr(BACKENDS[backend], operation)(*operands, precision)

    return run


def _backend(operation: str, x: Tensor, result: Planes, precision: Precision) -> str:
    closely, loosely = shape_classes(Planes.of(x), result, effective_precision(x.dtype, precision))
    return backend_of(operation, closely, architecture(x.device), loosely)


def _result(operation: str, *arguments: Any) -> Planes:
    """Return the planes that are convolved to, or, where the result is of the weights, correlated with."""
    planes, (factor, padding) = Planes.of(arguments[0]), arguments[-2:]
    if operation.endswith("weight_gradient"):
        return Planes.of(factor)
    back = "input_gradient" in operation
    grown = (2 - 2 * padding) if back else (2 * padding - 2)
    channels = factor.shape[1] if back else len(factor)
    return Planes(planes.samples, channels, planes.height + grown, planes.width + grown, planes.memory_format)
