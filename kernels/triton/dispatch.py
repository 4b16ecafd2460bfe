"""Choose, from the checked-in table, the back end of an operation on a GPU: kernels of ours, by pointers or by boxes, or torch's library."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor

from ..types import Precision, weight_of
from . import conv, cudnn, tma
from .boxes import fits
from .configurations import backend_of
from .implicit_gemm import effective_precision, shape_classes
from .launch import architecture
from .planes import Planes

BACKENDS: dict[str, ModuleType] = {"triton": conv, "tma": tma, "cudnn": cudnn}


def dispatched(operation: str) -> Callable[..., Any]:
    """Return the convolution named `operation` as a function that takes the table's back end for its arguments."""

    @wraps(getattr(cudnn, operation))
    def run(*arguments: Any, **named: Precision) -> Any:
        every: list[Any] = [*arguments, *named.values()]
        operands, precision = every[:-1], every[-1]  # which comes last, by name or without
        result = _result(operation, *operands)
        backend = _backend(operation, operands[0], result, precision)
        if backend == "tma" and not _fits(operation, operands, result, precision):
            backend = "triton"
        return getattr(BACKENDS[backend], operation)(*operands, precision)

    return run


def _backend(operation: str, x: Tensor, result: Planes, precision: Precision) -> str:
    closely, *loosely = shape_classes(Planes.of(x), result, effective_precision(x.dtype, precision))
    return backend_of(operation, closely, architecture(x.device), *loosely)


def _fits(operation: str, operands: list[Any], result: Planes, precision: Precision) -> bool:
    tensors = operands[:-1]  # the last is the padding; of a convolution's, half are weights, of which copies are taken
    planes = tensors if operation.endswith("weight_gradient") else tensors[: len(tensors) // 2]
    return fits(Planes.of(operands[0]), result, precision, [each for each in planes if each is not None])


def _result(operation: str, *arguments: Any) -> Planes:
    """Return the planes that are convolved to, or, where the result is of the weights, correlated with."""
    planes, (factor, padding) = Planes.of(arguments[0]), arguments[-2:]
    if operation.endswith("weight_gradient"):
        return Planes.of(factor)
    back = "input_gradient" in operation
    grown = (2 - 2 * padding) if back else (2 * padding - 2)
    filters, of_images, *_ = weight_of(factor).shape
    channels = of_images if back else filters
    return Planes(planes.samples, channels, planes.height + grown, planes.width + grown, planes.memory_format)
