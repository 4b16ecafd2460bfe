"""Convolve 3×3 with the matrix products of implicit_gemm.py, or with those of tma_convolve.py and tma_correlate.py.

Forward and input gradient use one product, since the input gradient is the convolution of ȳ with the weights rotated by 180°.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..types import Convolved, Precision, Weight, weight_of
from . import implicit_gemm, tma_convolve, tma_correlate
from .planes import Planes, stacked
from .weights import rotated, straight


class Convolutions(NamedTuple):
    """The operations by two products: `convolve` and `correlate` of implicit_gemm.py, or functions of the same arguments."""

    convolve: Callable[..., tuple[Any, Convolved]]
    correlate: Callable[..., Tensor]

    def conv3x3(self, x: Tensor, weight: Weight, padding: int, precision: Precision) -> Convolved:
        """See `mtt_fast.kernels.conv3x3`."""
        y, (packed,) = _empty_output(x, weight, padding), straight((weight,), x, precision)
        operands = (x, None, packed, packed, None, y)  # y = W∗x is computed as ẏ in the direction of W
        return self.convolve("conv3x3", *operands, padding, precision)[1]

    def conv3x3_input_gradient(self, y_bar: Tensor, weight: Weight, padding: int, precision: Precision) -> Convolved:
        """See `mtt_fast.kernels.conv3x3_input_gradient`."""
        x_bar, (packed,) = _empty_input(y_bar, weight, padding), rotated((weight,), y_bar, precision)
        operands = (y_bar, None, packed, packed, None, x_bar)
        return self.convolve("conv3x3_input_gradient", *operands, 2 - padding, precision)[1]

    def conv3x3_weight_gradient(self, x: Tensor, y_bar: Tensor, padding: int, precision: Precision) -> Tensor:
        """See `mtt_fast.kernels.conv3x3_weight_gradient`."""
        return self.correlate("conv3x3_weight_gradient", x, None, y_bar, y_bar, padding, precision)

    def conv3x3_dual(
        self, x: Tensor, x_dot: Tensor | None, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
    ) -> tuple[Convolved, Convolved]:
        """See `mtt_fast.kernels.conv3x3_dual`."""
        y, y_dot = _empty_dual(x, x_dot, weight, padding)
        weights = straight((weight, weight_dot), x, precision)
        return self.convolve("conv3x3_dual", x, x_dot, *weights, y, y_dot, padding, precision)

    def conv3x3_tangent(
        self, x: Tensor, x_dot: Tensor | None, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
    ) -> Convolved:
        """See `mtt_fast.kernels.conv3x3_tangent`."""
        y_dot = _empty_output(x, weight, padding)
        weights = straight((weight, weight_dot), x, precision)
        return self.convolve("conv3x3_tangent", x, x_dot, *weights, None, y_dot, padding, precision)[1]

    def conv3x3_dual_input_gradient(
        self, y_bar: Tensor, y_bar_dot: Tensor, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
    ) -> tuple[Convolved, Convolved]:
        """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
        x_bar, x_bar_dot = (_empty_input(y_bar, weight, padding) for _ in range(2))
        weights = rotated((weight, weight_dot), y_bar, precision)
        operands = (y_bar, y_bar_dot, *weights, x_bar, x_bar_dot)
        return self.convolve("conv3x3_dual_input_gradient", *operands, 2 - padding, precision)

    def conv3x3_input_gradient_tangent(
        self, y_bar: Tensor, y_bar_dot: Tensor, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
    ) -> Convolved:
        """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
        x_bar_dot = _empty_input(y_bar, weight, padding)
        weights = rotated((weight, weight_dot), y_bar, precision)
        operands = (y_bar, y_bar_dot, *weights, None, x_bar_dot)
        return self.convolve("conv3x3_input_gradient_tangent", *operands, 2 - padding, precision)[1]

    def conv3x3_dual_weight_gradient(
        self, x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, precision: Precision
    ) -> Tensor:
        """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`."""
        return self.correlate("conv3x3_dual_weight_gradient", x, x_dot, y_bar, y_bar_dot, padding, precision)


POINTERS = Convolutions(implicit_gemm.convolve, implicit_gemm.correlate)
"""Operations whose kernels load by pointers, any planes on any GPU."""
TMA = Convolutions(tma_convolve.convolve, tma_correlate.correlate)
"""Operations whose kernels load by TMA: for sm_90 and later, and for planes that `tma_descriptors.fits` accepts."""


def _empty_output(x: Tensor, weight: Weight, padding: int) -> Tensor:
    """Allocate y (B, K, H + 2·padding − 2, W + 2·padding − 2), the result of a convolution of `x`, in the format of `x`."""
    planes, (filters, *_) = Planes.from_tensors(x), weight_of(weight).shape
    return planes.empty(x, filters, planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)


def _empty_dual(x: Tensor, x_dot: Tensor | None, weight: Weight, padding: int) -> tuple[Tensor, Tensor]:
    """Allocate y and ẏ. Where x and ẋ are adjacent in memory, put ẏ directly before y.

    The gradients are later written over y and ẏ. In this order, the two products of the dual weight gradient, ȳ̇ ⋆ x + ȳ ⋆ ẋ,
    become one. Both are freed only together, which costs no memory: where ẋ lives as long as x, ẏ lives as long as y.
    """
    if x_dot is None or stacked(x, x_dot) is None:
        return _empty_output(x, weight, padding), _empty_output(x, weight, padding)
    planes, filters = Planes.from_tensors(x), len(weight_of(weight))
    sides = (planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)
    y_dot, y = planes.empty_pair(x, filters, *sides)
    return y, y_dot


def _empty_input(y_bar: Tensor, weight: Weight, padding: int) -> Tensor:
    """Allocate x̄, the gradient of a convolution's input, in the format of `y_bar`, the gradient of its result."""
    planes, (_, channels, *_) = Planes.from_tensors(y_bar), weight_of(weight).shape
    return planes.empty(y_bar, channels, planes.height + 2 - 2 * padding, planes.width + 2 - 2 * padding)
