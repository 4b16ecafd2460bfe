"""Convolve 3×3 by the two matrix products of implicit_gemm.py unless others are given, as tma.py does.

Forward and input gradient are one kernel, since the latter is the convolution of ȳ with the weights rotated by 180°.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..types import Precision
from .implicit_gemm import convolve, correlate
from .planes import Planes, stacked
from .weights import pack

Product = Callable[..., Any]
"""`convolve` or `correlate` of implicit_gemm.py, or one that takes the same arguments."""


def conv3x3(x: Tensor, weight: Tensor, padding: int, precision: Precision, convolve: Product = convolve) -> Tensor:
    """See `mtt_fast.kernels.conv3x3`."""
    y, (factors,) = empty_output(x, weight, padding), pack((weight,), x, precision)
    convolve("conv3x3", x, None, factors, factors, None, y, padding, precision)  # W∗x is ẏ in the direction of W
    return y


def conv3x3_input_gradient(
    y_bar: Tensor, weight: Tensor, padding: int, precision: Precision, convolve: Product = convolve
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient`."""
    x_bar, (factors,) = empty_input(y_bar, weight, padding), pack((weight,), y_bar, precision, rotated=True)
    convolve("conv3x3_input_gradient", y_bar, None, factors, factors, None, x_bar, 2 - padding, precision)
    return x_bar


def conv3x3_weight_gradient(
    x: Tensor, y_bar: Tensor, padding: int, precision: Precision, correlate: Product = correlate
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_weight_gradient`."""
    weight_bar: Tensor = correlate("conv3x3_weight_gradient", x, None, y_bar, y_bar, padding, precision)
    return weight_bar


def conv3x3_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision,
    convolve: Product = convolve,
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual`."""
    y, y_dot = _empty_dual(x, x_dot, weight, padding)
    weights = pack((weight, weight_dot), x, precision)
    convolve("conv3x3_dual", x, x_dot, *weights, y, y_dot, padding, precision)
    return y, y_dot


def conv3x3_tangent(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision,
    convolve: Product = convolve,
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_tangent`."""
    y_dot = empty_output(x, weight, padding)
    weights = pack((weight, weight_dot), x, precision)
    convolve("conv3x3_tangent", x, x_dot, *weights, None, y_dot, padding, precision)
    return y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision,
    convolve: Product = convolve,
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
    x_bar, x_bar_dot = (empty_input(y_bar, weight, padding) for _ in range(2))
    weights = pack((weight, weight_dot), y_bar, precision, rotated=True)
    convolve("conv3x3_dual_input_gradient", y_bar, y_bar_dot, *weights, x_bar, x_bar_dot, 2 - padding, precision)
    return x_bar, x_bar_dot


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision,
    convolve: Product = convolve,
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
    x_bar_dot = empty_input(y_bar, weight, padding)
    weights = pack((weight, weight_dot), y_bar, precision, rotated=True)
    convolve("conv3x3_input_gradient_tangent", y_bar, y_bar_dot, *weights, None, x_bar_dot, 2 - padding, precision)
    return x_bar_dot


def conv3x3_dual_weight_gradient(
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision,
    correlate: Product = correlate,
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`."""
    weight_bar: Tensor = correlate("conv3x3_dual_weight_gradient", x, x_dot, y_bar, y_bar_dot, padding, precision)
    return weight_bar


def empty_output(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Allocate the result of a convolution of `x`."""
    planes = Planes.of(x)
    return planes.empty(x, len(weight), planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)


def _empty_dual(x: Tensor, x_dot: Tensor | None, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Allocate y and ẏ: ẏ in front of y in one piece where x and ẋ are one.

    The gradients that are written over them then make one product of the dual weight gradient's two, ȳ̇ ⋆ x + ȳ ⋆ ẋ.
    Where ẋ is held as long as x, so is ẏ as long as y, and memory that is free only together is free no later.
    """
    if x_dot is None or stacked(x, x_dot) is None:
        return empty_output(x, weight, padding), empty_output(x, weight, padding)
    planes = Planes.of(x)
    sides = (planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)
    y_dot, y = planes.empty_pair(x, len(weight), *sides)
    return y, y_dot


def empty_input(y_bar: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Allocate the gradient to the input of the convolution whose result has the gradient `y_bar`."""
    planes = Planes.of(y_bar)
    return planes.empty(y_bar, weight.shape[1], planes.height + 2 - 2 * padding, planes.width + 2 - 2 * padding)
