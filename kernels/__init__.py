"""The operations that the engine is made of: functions of tensors that know nothing of distillation.

Each is defined in plain torch in `reference.py` (any device) and may have a faster twin. The functions here check their
arguments and ask for the twin (`twins.py`). They are not differentiable: the engine wraps them in an `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

if __name__ != "mtt_fast.kernels":  # it can be found as `kernels` too, which would be a second set of modules
    raise ImportError("import mtt_fast.kernels, not kernels")

from . import native
from .checks import (
    check_classifier,
    check_convolution,
    check_correlation,
    check_planes,
    check_tensors,
    check_vectors,
    check_warp,
)
from .formats import WARP_PARAMETERS, Activations, ConvLayer, LabelKind, Precision, accumulator
from .twins import fused_twin_of, has_twins, native_available, release_memory, twin_of

__all__ = [
    "WARP_PARAMETERS",
    "Activations",
    "ConvLayer",
    "LabelKind",
    "Precision",
    "adjoint_step",
    "bias_relu_pool",
    "bias_relu_pool_backward",
    "bias_relu_pool_dual",
    "bias_relu_pool_dual_backward",
    "colour_warp_mask",
    "colour_warp_mask_transpose",
    "conv3x3",
    "conv3x3_dual",
    "conv3x3_dual_input_gradient",
    "conv3x3_dual_weight_gradient",
    "conv3x3_input_gradient",
    "conv3x3_input_gradient_tangent",
    "conv3x3_tangent",
    "conv3x3_weight_gradient",
    "conv_norm_relu_pool_dual",
    "conv_norm_relu_pool_dual_backward",
    "has_twins",
    "linear_cross_entropy",
    "linear_cross_entropy_dual",
    "native_available",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_backward",
    "release_memory",
    "sgd_step",
    "squared_distance",
    "work_bytes",
]


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a − b|², accumulated in float64, as a float64 scalar on the device of `a`.

    `a`, `b`: (P,), contiguous, of one device and one of float32, float64, bfloat16. For vectors on the CPU the native
    twin's result does not depend on the number of threads. Raises `ValueError` for anything
    else, and for a tensor that requires grad.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(
            f"squared_distance: expected two vectors of one size, found {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"squared_distance: expected one of float32, float64, bfloat16, found {a.dtype}, {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"squared_distance: expected one device, found {a.device} and {b.device}")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"squared_distance: expected contiguous vectors, found strides {a.stride()}, {b.stride()}")
    if a.requires_grad or b.requires_grad:
        raise ValueError("squared_distance: is not differentiable, found a vector that requires grad; detach it")
    distance: Tensor = twin_of("squared_distance", a)(a, b)
    return distance


def sgd_step(
    theta: Tensor,
    gradient: Tensor,
    rate: Tensor,
    out: Tensor,
    velocity: Tensor | None = None,
    velocity_out: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """Write θ − `rate` · u to `out` and return it, with u = `momentum` · `velocity` + `gradient` + `weight_decay` · θ.

    That is a step of torch.optim.SGD; u is the new velocity, and goes to `velocity_out` if given. No `velocity` stands
    for zero. `theta` and the other vectors (P,), contiguous, `rate` (), all of one floating dtype and device. `out` may
    be `theta` itself, and `velocity_out` `velocity`. Raises `ValueError` for anything else.
    """
    vectors = {"theta": theta, "gradient": gradient, "out": out, "velocity": velocity, "velocity_out": velocity_out}
    check_vectors("sgd_step", vectors, {"rate": rate})
    arguments = (theta, gradient, rate, out, velocity, velocity_out, momentum, weight_decay)
    return twin_of("sgd_step", theta)(*arguments)  # type: ignore[no-any-return]


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None = None,
    weight_decay: float = 0.0,
) -> Tensor:
    """Write λ + `scale` · (H v + `weight_decay` · v) + `incoming` to `out` and return it: `sgd_step` walked back.

    λ is `adjoint`, that of the parameters after the step, v the `direction`. No `incoming` stands for zero. `adjoint`
    and the other vectors (P,), contiguous, `scale` (), all of one floating dtype and device. `out` may be any of the
    arguments. Raises `ValueError` for anything else.
    """
    vectors = {"adjoint": adjoint, "hessian_v": hessian_v, "direction": direction, "out": out, "incoming": incoming}
    check_vectors("adjoint_step", vectors, {"scale": scale})
    arguments = (adjoint, hessian_v, direction, scale, out, incoming, weight_decay)
    return twin_of("adjoint_step", adjoint)(*arguments)  # type: ignore[no-any-return]


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return 2×2 averages of relu(γ h + β), with h = `y` normalised over each plane, and the planes' mean and rstd.

    `y` (B, C, H, W), contiguous or channels_last, as is p (B, C, H//2, W//2); `gamma`, `beta` (C,); mean, rstd (B, C).
    rstd is 1/√(variance + eps). An odd last row or column counts in the statistics and is not pooled.
    All of one floating dtype and device; only if planes are bfloat16, numbers of planes and of channels are float32.
    Raises `ValueError` for anything else.
    """
    check_planes("norm_relu_pool", y, planes={"y": y}, channels={"gamma": gamma, "beta": beta})
    p, mean, rstd = twin_of("norm_relu_pool", y)(y, gamma, beta, eps)
    return p, mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor, *, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ȳ (B, C, H, W), γ̄ (C,), β̄ (C,) that follow from `p_bar` (B, C, H//2, W//2).

    The other arguments are those and the results of `norm_relu_pool`. ReLU's derivative at 0 is 0. With `reuse`, `y`
    is needed no more, and ȳ may take its memory. Raises `ValueError` as `norm_relu_pool` does.
    """
    numbers = {"mean": mean, "rstd": rstd}
    check_planes("norm_relu_pool_backward", y, {"y": y}, {"gamma": gamma, "beta": beta}, numbers, {"p_bar": p_bar})
    y_bar, gamma_bar, beta_bar = twin_of("norm_relu_pool_backward", y)(y, mean, rstd, gamma, beta, p_bar, reuse)
    return y_bar, gamma_bar, beta_bar


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, gamma: Tensor, beta: Tensor, gamma_dot: Tensor, beta_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return p and its derivative ṗ in the direction (`y_dot`, `gamma_dot`, `beta_dot`), and numbers of the planes.

    Those are mean, rstd, k1 = E[ẏ] and k2 = E[h ẏ], each (B, C), for `norm_relu_pool_dual_backward`.
    Shapes, formats, errors: `norm_relu_pool`.
    """
    channels = {"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
    check_planes("norm_relu_pool_dual", y, {"y": y, "y_dot": y_dot}, channels)
    p, p_dot, *numbers = twin_of("norm_relu_pool_dual", y)(y, y_dot, gamma, beta, gamma_dot, beta_dot, eps)
    mean, rstd, k1, k2 = numbers
    return p, p_dot, mean, rstd, k1, k2


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    k1: Tensor,
    k2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    *,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W), γ̄̇, β̄̇ (C,): the gradient to y, and the directional derivatives of the gradients.

    The arguments are those and the results of `norm_relu_pool_dual`, the gradient `p_bar` (B, C, H//2, W//2) and its
    derivative `p_bar_dot`. With `reuse`, `y` and `y_dot` are needed no more, and the results may take their memory.
    Shapes, formats, errors: `norm_relu_pool`.
    """
    check_planes(
        "norm_relu_pool_dual_backward",
        y,
        planes={"y": y, "y_dot": y_dot},
        channels={"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot},
        numbers={"mean": mean, "rstd": rstd, "k1": k1, "k2": k2},
        pooled={"p_bar": p_bar, "p_bar_dot": p_bar_dot},
    )
    arguments = (y, y_dot, mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot, p_bar, p_bar_dot)
    y_bar, y_bar_dot, *sums = twin_of("norm_relu_pool_dual_backward", y)(*arguments, reuse)
    gamma_bar_dot, beta_bar_dot = sums
    return y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot


def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """Return 2×2 averages of relu(y + β) (B, C, H//2, W//2): `norm_relu_pool` without the norm.

    `y` (B, C, H, W), contiguous or channels_last, as is the result; `beta` (C,). An odd last row or column is not pooled.
    All of one floating dtype and device. Raises `ValueError` for anything else.
    """
    check_planes("bias_relu_pool", y, planes={"y": y}, channels={"beta": beta})
    p: Tensor = twin_of("bias_relu_pool", y)(y, beta)
    return p


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, *, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradients ȳ (B, C, H, W), β̄ (C,) that follow from `p_bar` (B, C, H//2, W//2).

    `y`, `beta` are those of `bias_relu_pool`. ReLU's derivative at 0 is 0. With `reuse`, `y` is needed no more, and ȳ may
    take its memory. Raises `ValueError` as `bias_relu_pool` does.
    """
    check_planes("bias_relu_pool_backward", y, {"y": y}, {"beta": beta}, pooled={"p_bar": p_bar})
    y_bar, beta_bar = twin_of("bias_relu_pool_backward", y)(y, beta, p_bar, reuse)
    return y_bar, beta_bar


def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and its derivative ṗ in the direction (`y_dot`, `beta_dot`). Shapes, formats, errors: `bias_relu_pool`."""
    check_planes("bias_relu_pool_dual", y, {"y": y, "y_dot": y_dot}, {"beta": beta, "beta_dot": beta_dot})
    p, p_dot = twin_of("bias_relu_pool_dual", y)(y, y_dot, beta, beta_dot)
    return p, p_dot


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, *, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W), β̄̇ (C,): the gradient to y, and the directional derivatives of the gradients.

    `p_bar` (B, C, H//2, W//2) is the gradient and `p_bar_dot` its derivative; ẏ and β̇ do not matter, since the block is
    linear between the kinks. With `reuse`, `y` is needed no more, and ȳ may take its memory.
    Shapes, formats, errors: `bias_relu_pool`.
    """
    pooled = {"p_bar": p_bar, "p_bar_dot": p_bar_dot}
    check_planes("bias_relu_pool_dual_backward", y, {"y": y}, {"beta": beta}, pooled=pooled)
    y_bar, y_bar_dot, beta_bar_dot = twin_of("bias_relu_pool_dual_backward", y)(y, beta, p_bar, p_bar_dot, reuse)
    return y_bar, y_bar_dot, beta_bar_dot


def conv3x3(x: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W∗x (B, K, H + 2·padding − 2, W + 2·padding − 2), in the memory format of `x`.

    `x` (B, C, H, W), contiguous or channels_last; `weight` (K, C, 3, 3), contiguous. Stride 1, and no bias: in front of
    an instance norm it has no effect, and else `bias_relu_pool` adds it. One floating dtype and device; only if planes
    are bfloat16, weights and their gradients are float32, here and below.
    `precision`: what float32 factors are rounded to before they are multiplied; sums are float32, and float64 stays so.
    Raises `ValueError` for anything else.
    """
    check_convolution("conv3x3", padding, {"x": x}, {"weight": weight}, 1)
    y: Tensor = twin_of("conv3x3", x, precision)(x, weight, padding)
    return y


def conv3x3_input_gradient(y_bar: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return x̄ = Wᵀ∗ȳ (B, C, H, W) from `y_bar`, the gradient to the result of `conv3x3`, in its memory format."""
    check_convolution("conv3x3_input_gradient", padding, {"y_bar": y_bar}, {"weight": weight}, 0)
    x_bar: Tensor = twin_of("conv3x3_input_gradient", y_bar, precision)(y_bar, weight, padding)
    return x_bar


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W̄ = ȳ ⋆ x (K, C, 3, 3), contiguous, from `y_bar`, the gradient to the result of `conv3x3`."""
    check_correlation("conv3x3_weight_gradient", padding, {"x": x}, {"y_bar": y_bar})
    weight_bar: Tensor = twin_of("conv3x3_weight_gradient", x, precision)(x, y_bar, padding)
    return weight_bar


def conv3x3_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return y = W∗x and its derivative ẏ = Ẇ∗x + W∗ẋ. `x_dot` None stands for zero (images).

    Shapes, formats, errors: `conv3x3`.
    """
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution("conv3x3_dual", padding, inputs, {"weight": weight, "weight_dot": weight_dot}, 1)
    y, y_dot = twin_of("conv3x3_dual", x, precision)(x, x_dot, weight, weight_dot, padding)
    return y, y_dot


def conv3x3_tangent(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return ẏ of `conv3x3_dual` alone, where y is known."""
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution("conv3x3_tangent", padding, inputs, {"weight": weight, "weight_dot": weight_dot}, 1)
    y_dot: Tensor = twin_of("conv3x3_tangent", x, precision)(x, x_dot, weight, weight_dot, padding)
    return y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return x̄ = Wᵀ∗ȳ and its derivative x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇, each (B, C, H, W) in the memory format of `y_bar`."""
    weights = {"weight": weight, "weight_dot": weight_dot}
    check_convolution("conv3x3_dual_input_gradient", padding, {"y_bar": y_bar, "y_bar_dot": y_bar_dot}, weights, 0)
    twin = twin_of("conv3x3_dual_input_gradient", y_bar, precision)
    x_bar, x_bar_dot = twin(y_bar, y_bar_dot, weight, weight_dot, padding)
    return x_bar, x_bar_dot


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return x̄̇ of `conv3x3_dual_input_gradient` alone, where x̄ is known or, below the first layer, asked by nobody."""
    weights = {"weight": weight, "weight_dot": weight_dot}
    check_convolution("conv3x3_input_gradient_tangent", padding, {"y_bar": y_bar, "y_bar_dot": y_bar_dot}, weights, 0)
    twin = twin_of("conv3x3_input_gradient_tangent", y_bar, precision)
    x_bar_dot: Tensor = twin(y_bar, y_bar_dot, weight, weight_dot, padding)
    return x_bar_dot


def conv3x3_dual_weight_gradient(
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ (K, C, 3, 3), contiguous. `x_dot` None stands for zero. Errors: `conv3x3`."""
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_correlation("conv3x3_dual_weight_gradient", padding, inputs, {"y_bar": y_bar, "y_bar_dot": y_bar_dot})
    twin = twin_of("conv3x3_dual_weight_gradient", x, precision)
    weight_bar_dot: Tensor = twin(x, x_dot, y_bar, y_bar_dot, padding)
    return weight_bar_dot


def conv_norm_relu_pool_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    padding: int,
    eps: float,
    precision: Precision = "fp32",
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Activations]:
    """Return p, ṗ of a whole block, and what its way back needs: x, ẋ, y, ẏ and the planes' mean, rstd, k1, k2.

    That is `conv3x3_dual`, or `conv3x3_tangent` where `y` is known, and `norm_relu_pool_dual` of the results: in one
    where there is a twin that does so and is faster, else one after the other. Shapes, formats, errors: of those.
    """
    op, weights = "conv_norm_relu_pool_dual", {"weight": weight, "weight_dot": weight_dot}
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution(op, padding, inputs, weights, 1)
    arguments = (x, x_dot, weight, weight_dot)
    affine = (gamma, beta, gamma_dot, beta_dot)
    way = op if y is None else "conv_norm_relu_pool_tangent"
    fused = fused_twin_of(op, x, weight, padding, precision, way)
    if fused is not None:
        channels = {"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
        check_tensors(op, x, channels, (len(weight),), dtype=accumulator(x.dtype))
        if y is not None:
            check_correlation(op, padding, inputs, {"y": y})
        return fused(*arguments, *affine, padding, eps, y=y)  # type: ignore[no-any-return]
    if y is None:
        y, y_dot = conv3x3_dual(*arguments, padding, precision)
    else:
        y_dot = conv3x3_tangent(*arguments, padding, precision)
    p, p_dot, *numbers = norm_relu_pool_dual(y, y_dot, *affine, eps)
    return p, p_dot, [x, x_dot, y, y_dot, *numbers]


def conv_norm_relu_pool_dual_backward(
    activations: Activations,
    weight: Tensor,
    weight_dot: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
    wants_x_bar: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Return of a whole block x̄ (None unless wanted), x̄̇ (B, C, H, W), W̄̇ (K, C, 3, 3), γ̄̇ and β̄̇ (K,).

    `activations` are those that `conv_norm_relu_pool_dual` returned, and are used up: the list is emptied, so that what
    is needed no more is freed on the way. That is `norm_relu_pool_dual_backward`, then `conv3x3_dual_weight_gradient`
    and `conv3x3_dual_input_gradient`: in one, which never stores ȳ and ȳ̇, where there is a twin that does so and is
    faster, else one after the other. Shapes, formats, errors: of those.
    """
    op, affine = "conv_norm_relu_pool_dual_backward", (gamma, beta, gamma_dot, beta_dot)
    if len(activations) != 8:
        raise ValueError(
            f"{op}: expected the activations of one forward, found {len(activations)} tensors; used twice?"
        )
    x, weights = activations[0], {"weight": weight, "weight_dot": weight_dot}
    check_convolution(op, padding, {"x": x}, weights, 1)
    fused = fused_twin_of(op, x, weight, padding, precision)
    if fused is not None:
        channels = {"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
        check_planes(op, activations[2], {}, channels, None, {"p_bar": p_bar, "p_bar_dot": p_bar_dot})
        del x
        return fused(  # type: ignore[no-any-return]
            activations, weight, weight_dot, *affine, p_bar, p_bar_dot, padding, wants_x_bar=wants_x_bar
        )
    x, x_dot, y, y_dot, mean, rstd, k1, k2 = activations
    activations.clear()
    y_bar, y_bar_dot, *sums = norm_relu_pool_dual_backward(
        y, y_dot, mean, rstd, k1, k2, *affine, p_bar, p_bar_dot, reuse=True
    )
    del y, y_dot
    weight_bar_dot = conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, precision)
    del x, x_dot
    backwards = (y_bar, y_bar_dot, weight, weight_dot, padding, precision)
    x_bar = None
    if wants_x_bar:
        x_bar, x_bar_dot = conv3x3_dual_input_gradient(*backwards)
    else:
        x_bar_dot = conv3x3_input_gradient_tangent(*backwards)
    gamma_bar_dot, beta_bar_dot = sums
    return x_bar, x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot


def work_bytes(batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that a step's convolutions keep beside their results: all operations above, on all `layers`.

    On the CPU they are kept from one call to the next, some for each of torch's threads. Elsewhere, and for the
    definitions, only the library that convolves knows what it takes, and 0 is returned.
    """
    if device.type != "cpu" or not native.has("conv3x3", torch.empty(0, dtype=dtype)):
        return 0
    return native.work_bytes(batch, layers, dtype)


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean cross-entropy () of a linear classifier and its gradients: f̄ (B, D), Ā (K, D), c̄ (K,).

    `features` (B, D), `weight` (K, D), `bias` (K,), contiguous, of one floating dtype and device; `labels`: indices
    (B,) int64, or (B, K) of that dtype: probabilities, which need not sum to one, or logits, of which the softmax is
    taken. Raises `ValueError` for anything else, and for an index that is no class; on an accelerator, where nothing
    waits for the values, such an index makes the loss NaN or fails as torch's own look-ups do.
    """
    check_classifier("linear_cross_entropy", [features], [weight], [bias], labels, label_kind)
    twin = twin_of("linear_cross_entropy", features)
    loss, features_bar, weight_bar, bias_bar = twin(features, weight, bias, labels, label_kind)
    return loss, features_bar, weight_bar, bias_bar


def linear_cross_entropy_dual(
    features: Tensor,
    features_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the loss's derivative () in the direction of the dots, f̄, and the derivatives f̄̇, Ā̇, c̄̇ of the gradients.

    Last comes that of the gradient to the labels (B, K), None for indices. Shapes, errors: `linear_cross_entropy`.
    """
    check_classifier(
        "linear_cross_entropy_dual",
        [features, features_dot],
        [weight, weight_dot],
        [bias, bias_dot],
        labels,
        label_kind,
    )
    return twin_of("linear_cross_entropy_dual", features)(  # type: ignore[no-any-return]
        features, features_dot, weight, bias, weight_dot, bias_dot, labels, label_kind
    )


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """Return y = A x + b of each image x: its colours moved, then its pixels, then a rectangle of it set to zero.

    `images` (B, C, H, W), contiguous, of any floating dtype; `parameters` (B, 13), float64 for float64 images and else
    float32, with the columns `WARP_PARAMETERS`. All are distances from the identity: zeros leave an image as it is. In
    turn, for each image:

    - colour: x + brightness; x + saturation · (x − the mean of the pixel's channels); x + contrast · (x − the mean of x).
    - warp: pixel (i, j) is interpolated linearly at (i + row_by_row · i' + row_by_column · j' + row_shift,
      j + column_by_row · i' + column_by_column · j' + column_shift), where (i', j') is (i, j) from the centre of the
      image, ((H − 1)/2, (W − 1)/2), and all are pixels; outside the image are zeros. Whole displacements are exact.
    - mask: rows top … bottom − 1 of columns left … right − 1 are zero.

    The warp must have an inverse; its singular parameters are found out on a CPU alone, where it costs no wait.
    Raises `ValueError` for anything else, and for a tensor that requires grad.
    """
    check_warp("colour_warp_mask", "images", images, parameters)
    y: Tensor = twin_of("colour_warp_mask", images)(images, parameters)
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """Return x̄ = Aᵀ ȳ (B, C, H, W), the gradient to the images from `y_bar`, that to the result of `colour_warp_mask`.

    Shapes, dtypes, errors: `colour_warp_mask`. On a GPU each pixel looks among the targets of the inverse's reach: with
    r the largest sum of magnitudes in a row of the inverse, at most ⌈2r⌉² pixels, 3 × 3 for turns by at most 15 degrees
    of square images and for scales of at least 1/1.2.
    """
    check_warp("colour_warp_mask_transpose", "y_bar", y_bar, parameters)
    x_bar: Tensor = twin_of("colour_warp_mask_transpose", y_bar)(y_bar, parameters)
    return x_bar
