"""Convolve 3×3, with the derivatives that a step needs."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_convolution, check_correlation, check_parts, check_tensors
from ..types import Convolved, PartialPlanes, Precision, Weight, planes_of


def add_planes(*planes: Convolved) -> tuple[Tensor, ...]:
    """Return planes as tensors (B, C, H, W), with partial sums added up and stored in their `planes`.

    All have one shape, dtype and memory format. Operations that take `Convolved` add up partial sums themselves; other code calls
    this. Raises `ValueError` for parts that are not float32, or do not fit their planes.
    """
    if not any(isinstance(each, PartialPlanes) for each in planes):
        return tuple(map(planes_of, planes))
    first = planes_of(planes[0])
    for number, each in enumerate(planes, 1):
        check_tensors("add_planes", first, {f"planes {number}": planes_of(each)}, first.shape, like_format=first)
        check_parts("add_planes", f"planes {number}", each)
    whole: tuple[Tensor, ...] = dispatch.implementation_of("add_planes", first)(*planes)
    return whole


def conv3x3(x: Tensor, weight: Weight, padding: int, precision: Precision = "fp32") -> Convolved:
    """Return y = W∗x (B, K, H + 2·padding − 2, W + 2·padding − 2), in the memory format of `x`, or its partial sums.

    `x` (B, C, H, W), contiguous or channels_last; `weight` (K, C, 3, 3), contiguous, or packed by `pack_parameters`. Stride 1,
    and no bias: before an instance norm it has no effect, and elsewhere `bias_relu_pool` adds it. One floating dtype and device;
    if planes are float16 or bfloat16, weights and their gradients are float32, in this and the following operations. `precision`
    is the format to which float32 factors are rounded before they are multiplied; sums are float32, and float64 stays float64.

    On a GPU, this and the following operations may return partial sums over the taps (`PartialPlanes`) if there are few samples.
    Operations that take the result of a convolution accept these, and `add_planes` adds them up. Raises `ValueError` for anything
    else.
    """
    check_convolution("conv3x3", padding, {"x": x}, {"weight": weight}, 1)
    y: Convolved = dispatch.implementation_of("conv3x3", x, precision)(x, weight, padding)
    return y


def conv3x3_input_gradient(y_bar: Tensor, weight: Weight, padding: int, precision: Precision = "fp32") -> Convolved:
    """Return x̄ = Wᵀ∗ȳ (B, C, H, W) from `y_bar`, the gradient of the result of `conv3x3`, in its memory format."""
    check_convolution("conv3x3_input_gradient", padding, {"y_bar": y_bar}, {"weight": weight}, 0)
    x_bar: Convolved = dispatch.implementation_of("conv3x3_input_gradient", y_bar, precision)(y_bar, weight, padding)
    return x_bar


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return summands (S, K, C, 3, 3) of W̄ = ȳ ⋆ x from `y_bar`, the gradient of the result of `conv3x3`.

    `add_up` sums them over S, together with the summands of all other parameters' gradients.
    """
    check_correlation("conv3x3_weight_gradient", padding, {"x": x}, {"y_bar": y_bar})
    weight_bar: Tensor = dispatch.implementation_of("conv3x3_weight_gradient", x, precision)(x, y_bar, padding)
    return weight_bar


def conv3x3_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Weight,
    weight_dot: Weight,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Convolved, Convolved]:
    """Return y = W∗x and its derivative ẏ = Ẇ∗x + W∗ẋ. `x_dot` None stands for zero (images).

    Shapes, formats and errors are those of `conv3x3`.
    """
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution("conv3x3_dual", padding, inputs, {"weight": weight, "weight_dot": weight_dot}, 1)
    y, y_dot = dispatch.implementation_of("conv3x3_dual", x, precision)(x, x_dot, weight, weight_dot, padding)
    return y, y_dot


def conv3x3_tangent(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Weight,
    weight_dot: Weight,
    padding: int,
    precision: Precision = "fp32",
) -> Convolved:
    """Return the derivative ẏ of `conv3x3_dual` without y, for callers that have y already."""
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution("conv3x3_tangent", padding, inputs, {"weight": weight, "weight_dot": weight_dot}, 1)
    y_dot: Convolved = dispatch.implementation_of("conv3x3_tangent", x, precision)(
        x, x_dot, weight, weight_dot, padding
    )
    return y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Weight,
    weight_dot: Weight,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Convolved, Convolved]:
    """Return x̄ = Wᵀ∗ȳ and its derivative x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇, each (B, C, H, W) in the memory format of `y_bar`."""
    weights = {"weight": weight, "weight_dot": weight_dot}
    check_convolution("conv3x3_dual_input_gradient", padding, {"y_bar": y_bar, "y_bar_dot": y_bar_dot}, weights, 0)
    implementation = dispatch.implementation_of("conv3x3_dual_input_gradient", y_bar, precision)
    x_bar, x_bar_dot = implementation(y_bar, y_bar_dot, weight, weight_dot, padding)
    return x_bar, x_bar_dot


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Weight,
    weight_dot: Weight,
    padding: int,
    precision: Precision = "fp32",
) -> Convolved:
    """Return the derivative x̄̇ of `conv3x3_dual_input_gradient` without x̄.

    It is for callers that have x̄ already, or, as in the first layer, do not need it.
    """
    weights = {"weight": weight, "weight_dot": weight_dot}
    check_convolution("conv3x3_input_gradient_tangent", padding, {"y_bar": y_bar, "y_bar_dot": y_bar_dot}, weights, 0)
    implementation = dispatch.implementation_of("conv3x3_input_gradient_tangent", y_bar, precision)
    x_bar_dot: Convolved = implementation(y_bar, y_bar_dot, weight, weight_dot, padding)
    return x_bar_dot


def conv3x3_dual_weight_gradient(
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return summands (S, K, C, 3, 3) of W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ. `x_dot` None stands for zero."""
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_correlation("conv3x3_dual_weight_gradient", padding, inputs, {"y_bar": y_bar, "y_bar_dot": y_bar_dot})
    implementation = dispatch.implementation_of("conv3x3_dual_weight_gradient", x, precision)
    weight_bar_dot: Tensor = implementation(x, x_dot, y_bar, y_bar_dot, padding)
    return weight_bar_dot
