"""Every operation in plain torch: what it is, on any device and in any precision. Speed is the twins' business.

A dot is the derivative in one direction of the parameters, a bar the gradient of the loss, and a bar with a dot the
derivative of that gradient in the direction. The arguments were checked by `mtt_fast.kernels`. What is computed of
bfloat16 planes is computed in float32, and only planes are rounded again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .formats import WARP_PARAMETERS, Activations, LabelKind, Precision, accumulator, in_format_of


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ (a − b)² in float64. `a`, `b`: (P,)."""
    return (a.double() - b.double()).square().sum()


def sgd_step(
    theta: Tensor,
    gradient: Tensor,
    rate: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """Write u = μ velocity + g + ω θ to `velocity_out` and θ − `rate` u to `out`. All (P,), `rate` ()."""
    update = gradient + weight_decay * theta
    if velocity is not None:
        update = update + momentum * velocity
    if velocity_out is not None:
        velocity_out.copy_(update)
    return out.copy_(theta - rate * update)


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None,
    weight_decay: float,
) -> Tensor:
    """Write λ + `scale` (H v + ω v) + `incoming` to `out`. All (P,), `scale` ()."""
    stepped = adjoint + scale * (hessian_v + weight_decay * direction)
    return out.copy_(stepped if incoming is None else stepped + incoming)


# ------------------------------------------------------------------------------------- norm, ReLU, pool
# h = (y − mean) rstd, u = γ h + β, z = max(u, 0), p = 2×2 means of z. A bar or a dot of mean and rstd is never handed
# over: whoever differentiates again must see how they depend on y.


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return p (B, C, H//2, W//2), mean (B, C), rstd (B, C). `y`: (B, C, H, W); `gamma`, `beta`: (C,)."""
    mean, rstd = _statistics(y, eps)
    u = _normalised(y, mean, rstd) * _channel(gamma) + _channel(beta)
    return _pool(u * (u > 0), y), mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ȳ (B, C, H, W), γ̄ (C,), β̄ (C,). `p_bar`: (B, C, H//2, W//2). `reuse` is a permission not taken."""
    h = _normalised(y, mean, rstd)
    u_bar = _unpool(p_bar, y) * (h * _channel(gamma) + _channel(beta) > 0)
    h_bar = u_bar * _channel(gamma)
    y_bar = _plane(rstd) * (h_bar - _mean(h_bar) - h * _mean(h * h_bar))
    return _like(y, y_bar), (u_bar * h).sum((0, 2, 3)), u_bar.sum((0, 2, 3))


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, gamma: Tensor, beta: Tensor, gamma_dot: Tensor, beta_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return p, ṗ (B, C, H//2, W//2) and mean, rstd, k1 = E[ẏ], k2 = E[h ẏ] (B, C)."""
    mean, rstd = _statistics(y, eps)
    h = _normalised(y, mean, rstd)
    k1, k2 = _wide(y_dot).mean((2, 3)), (h * y_dot).mean((2, 3))
    h_dot = _normalised_dot(h, y_dot, rstd, k1, k2)
    u = h * _channel(gamma) + _channel(beta)
    u_dot = h * _channel(gamma_dot) + h_dot * _channel(gamma) + _channel(beta_dot)
    return _pool(u * (u > 0), y), _pool(u_dot * (u > 0), y), mean, rstd, k1, k2


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
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W) and γ̄̇, β̄̇ (C,), the derivatives of what `norm_relu_pool_backward` returns."""
    h = _normalised(y, mean, rstd)
    h_dot = _normalised_dot(h, y_dot, rstd, k1, k2)
    mask = h * _channel(gamma) + _channel(beta) > 0
    u_bar, u_bar_dot = _unpool(p_bar, y) * mask, _unpool(p_bar_dot, y) * mask
    h_bar = u_bar * _channel(gamma)
    h_bar_dot = u_bar * _channel(gamma_dot) + u_bar_dot * _channel(gamma)
    along = _mean(h * h_bar)
    q = h_bar - _mean(h_bar) - h * along
    q_dot = h_bar_dot - _mean(h_bar_dot) - h_dot * along - h * _mean(h_dot * h_bar + h * h_bar_dot)
    y_bar = _plane(rstd) * q
    y_bar_dot = _plane(rstd) * (q_dot - _plane(rstd * k2) * q)  # the derivative of rstd is −rstd² k2
    gamma_bar_dot = (u_bar_dot * h + u_bar * h_dot).sum((0, 2, 3))
    return _like(y, y_bar), _like(y, y_bar_dot), gamma_bar_dot, u_bar_dot.sum((0, 2, 3))


def _statistics(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = _wide(y)
    mean = y.mean((2, 3))
    return mean, ((y - _plane(mean)).square().mean((2, 3)) + eps).rsqrt()


def _normalised(y: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (y - _plane(mean)) * _plane(rstd)


def _normalised_dot(h: Tensor, y_dot: Tensor, rstd: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    return _plane(rstd) * (y_dot - _plane(k1) - h * _plane(k2))


# ------------------------------------------------------------------------------------- bias, ReLU, pool
# u = y + β, z = max(u, 0), p = 2×2 means of z: the same block without its norm. All is linear but for the ReLU's mask,
# so the derivatives need y and β for that alone.


def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """Return p (B, C, H//2, W//2). `y`: (B, C, H, W); `beta`: (C,)."""
    u = y + _channel(beta)
    return _pool(u * (u > 0), y)


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """Return ȳ (B, C, H, W), β̄ (C,). `p_bar`: (B, C, H//2, W//2). `reuse` is a permission not taken."""
    y_bar = _unpool(p_bar, y) * (y + _channel(beta) > 0)
    return in_format_of(y, y_bar), y_bar.sum((0, 2, 3))


def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, ṗ (B, C, H//2, W//2)."""
    u_dot = y_dot + _channel(beta_dot)
    return bias_relu_pool(y, beta), _pool(u_dot * (y + _channel(beta) > 0), y)


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W) and β̄̇ (C,), the last two the derivatives of what `bias_relu_pool_backward` returns."""
    y_bar, _ = bias_relu_pool_backward(y, beta, p_bar)
    y_bar_dot, beta_bar_dot = bias_relu_pool_backward(y, beta, p_bar_dot)
    return y_bar, y_bar_dot, beta_bar_dot


# ------------------------------------------------------------------------------------- planes and channels


def _pool(z: Tensor, y: Tensor) -> Tensor:
    return _like(y, F.avg_pool2d(z, 2))


def _unpool(p_bar: Tensor, y: Tensor) -> Tensor:
    """Spread each quarter of `p_bar` over its four pixels; an odd last row or column took no part in the pool."""
    height, width = p_bar.shape[2:]
    spread = torch.zeros_like(y, dtype=accumulator(y.dtype))
    spread[:, :, : 2 * height, : 2 * width] = _wide(p_bar).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    return spread


def _mean(planes: Tensor) -> Tensor:
    return planes.mean((2, 3), keepdim=True)


def _plane(number: Tensor) -> Tensor:
    return number[:, :, None, None]  # (B, C) -> (B, C, 1, 1)


def _channel(number: Tensor) -> Tensor:
    return number[:, None, None]  # (C,) -> (C, 1, 1)


def _wide(planes: Tensor) -> Tensor:
    return planes.to(accumulator(planes.dtype))


def _like(model: Tensor, planes: Tensor) -> Tensor:
    return in_format_of(model, planes.to(model.dtype))


# ------------------------------------------------------------------------------------- convolution 3×3
# Stride 1, no bias: in front of an instance norm a bias only shifts what the norm takes away again, so it has no effect
# and its gradients are exactly zero. Without a norm `bias_relu_pool` adds it.


def conv3x3(x: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W∗x (B, K, H + 2·padding − 2, W + 2·padding − 2). `x`: (B, C, H, W); `weight`: (K, C, 3, 3)."""
    return _like(x, _convolved(x, weight, padding, precision))


def conv3x3_input_gradient(y_bar: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return x̄ = Wᵀ∗ȳ (B, C, H, W)."""
    return _like(y_bar, _convolved_back(y_bar, weight, padding, precision))


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W̄ = ȳ ⋆ x (K, C, 3, 3)."""
    shape, factors = (y_bar.shape[1], x.shape[1], 3, 3), _factors(precision, x, y_bar)
    weight_bar: Tensor = conv2d_weight(factors[0], shape, factors[1], padding=padding)
    return weight_bar.contiguous()


def conv3x3_tangent(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> Tensor:
    """Return ẏ = Ẇ∗x + W∗ẋ. `x_dot` None is zero: images do not move with the parameters."""
    y_dot = _convolved(x, weight_dot, padding, precision)
    return _like(x, y_dot if x_dot is None else y_dot + _convolved(x_dot, weight, padding, precision))


def conv3x3_dual(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return y = W∗x and ẏ = Ẇ∗x + W∗ẋ."""
    y_dot = conv3x3_tangent(x, x_dot, weight, weight_dot, padding, precision)
    return conv3x3(x, weight, padding, precision), y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return x̄ = Wᵀ∗ȳ and x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇ (B, C, H, W)."""
    x_bar = conv3x3_input_gradient(y_bar, weight, padding, precision)
    return x_bar, conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding, precision)


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇ (B, C, H, W)."""
    along_weight = _convolved_back(y_bar, weight_dot, padding, precision)
    return _like(y_bar, along_weight + _convolved_back(y_bar_dot, weight, padding, precision))


def conv3x3_dual_weight_gradient(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> Tensor:
    """Return W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ (K, C, 3, 3). `x_dot` None is zero."""
    weight_bar_dot = conv3x3_weight_gradient(x, y_bar_dot, padding, precision)
    return (
        weight_bar_dot if x_dot is None else weight_bar_dot + conv3x3_weight_gradient(x_dot, y_bar, padding, precision)
    )


def rounded(factor: Tensor, precision: Precision) -> Tensor:
    """Return `factor` as a tensor core sees it: tf32 keeps 10 bits of a float32's mantissa, bf16 seven, ties to even."""
    if factor.dtype != torch.float32 or precision == "fp32":
        return factor
    if precision == "bf16":
        return factor.bfloat16().float()
    bits = factor.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & -0x2000).view(torch.float32)


def _convolved(x: Tensor, weight: Tensor, padding: int, precision: Precision) -> Tensor:
    return F.conv2d(*_factors(precision, x, weight), padding=padding)


def _convolved_back(y_bar: Tensor, weight: Tensor, padding: int, precision: Precision) -> Tensor:
    return F.conv_transpose2d(*_factors(precision, y_bar, weight), padding=padding)


def _factors(precision: Precision, planes: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if planes.dtype == torch.bfloat16:
        precision = "bf16"
    return rounded(_wide(planes), precision), rounded(_wide(other), precision)


# ------------------------------------------------------------------------------------- a whole block, dual
# Convolution, norm, ReLU and pool.


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
    """Return p, ṗ (B, K, H'//2, W'//2) and x, ẋ, y, ẏ (B, K, H', W'), mean, rstd, k1, k2 (B, K). `y` is W∗x if known."""
    arguments = (x, x_dot, weight, weight_dot, padding, precision)
    known, y_dot = conv3x3_dual(*arguments) if y is None else (y, conv3x3_tangent(*arguments))
    p, p_dot, *numbers = norm_relu_pool_dual(known, y_dot, gamma, beta, gamma_dot, beta_dot, eps)
    return p, p_dot, [x, x_dot, known, y_dot, *numbers]


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
    """Return x̄ (None unless wanted), x̄̇ (B, C, H, W), W̄̇ (K, C, 3, 3), γ̄̇, β̄̇ (K,)."""
    x, x_dot, y, y_dot, mean, rstd, k1, k2 = activations
    y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot = norm_relu_pool_dual_backward(
        y, y_dot, mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot, p_bar, p_bar_dot
    )
    weight_bar_dot = conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, precision)
    backwards = (y_bar, y_bar_dot, weight, weight_dot, padding, precision)
    x_bar, x_bar_dot = conv3x3_dual_input_gradient(*backwards)
    return x_bar if wants_x_bar else None, x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot


# ------------------------------------------------------------------------------------- linear, cross-entropy
# o = f Aᵀ + c, π = softmax(o), loss = −Σ t log π / B. Probabilities that are being learned need not sum to one.


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss () and f̄ (B, D), Ā (K, D), c̄ (K,). `features`: (B, D); `labels`: (B,) or (B, K)."""
    log_pi = F.linear(features, weight, bias).log_softmax(1)
    target = _target(labels, label_kind, log_pi)
    o_bar = (log_pi.exp() * target.sum(1, keepdim=True) - target) / len(features)
    loss = -(target * log_pi).sum() / len(features)
    return loss, o_bar @ weight, o_bar.T @ features, o_bar.sum(0)


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
    """Return the loss's derivative (), f̄, f̄̇ (B, D), Ā̇ (K, D), c̄̇ (K,), and the labels' (B, K), None for indices."""
    batch = len(features)
    pi = F.linear(features, weight, bias).softmax(1)
    target = _target(labels, label_kind, pi)
    mass = target.sum(1, keepdim=True)
    o_dot = F.linear(features, weight_dot, bias_dot) + F.linear(features_dot, weight)
    log_pi_dot = o_dot - (pi * o_dot).sum(1, keepdim=True)
    o_bar = (pi * mass - target) / batch
    o_bar_dot = pi * mass * log_pi_dot / batch
    labels_bar_dot = None
    if label_kind == "probabilities":
        labels_bar_dot = -log_pi_dot / batch
    elif label_kind == "logits":  # through t = softmax(labels)
        labels_bar_dot = target * ((target * log_pi_dot).sum(1, keepdim=True) - log_pi_dot) / batch
    return (
        -(target * log_pi_dot).sum() / batch,
        o_bar @ weight,
        o_bar_dot @ weight + o_bar @ weight_dot,
        o_bar_dot.T @ features + o_bar.T @ features_dot,
        o_bar_dot.sum(0),
        labels_bar_dot,
    )


def _target(labels: Tensor, label_kind: LabelKind, like: Tensor) -> Tensor:
    if label_kind == "indices":
        return torch.zeros_like(like).scatter_(1, labels[:, None], 1)
    return labels.softmax(1) if label_kind == "logits" else labels


# ------------------------------------------------------------------------------------- colour, warp, mask
# One affine function of the pixels of each image, y = A x + b. All its parameters are distances from the identity, so
# that nothing is lost where they are small, and zeros change nothing. The place that a target pixel is sampled at is kept
# as a whole pixel and the remainder: their sum would round the remainder, more so the larger the image.


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """Return A x + b (B, C, H, W). `images`: (B, C, H, W); `parameters`: (B, 13)."""
    number = _numbers(parameters)
    x = images.to(parameters.dtype)
    x = x + number["brightness"]
    x = x + number["saturation"] * (x - x.mean(1, keepdim=True))
    x = x + number["contrast"] * (x - x.mean((1, 2, 3), keepdim=True))
    pixels, y = x.flatten(2), torch.zeros_like(x).flatten(2)
    for place, weight in _corners(number, x):
        y += weight * pixels.gather(2, place)
    return (y.view(x.shape) * _visible(number, x)).to(images.dtype)


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """Return x̄ = Aᵀ ȳ (B, C, H, W). `y_bar`: (B, C, H, W); `parameters`: (B, 13)."""
    number = _numbers(parameters)
    y = y_bar.to(parameters.dtype) * _visible(number, y_bar)
    pixels, x = y.flatten(2), torch.zeros_like(y).flatten(2)
    for place, weight in _corners(number, y):
        x.scatter_add_(2, place, weight * pixels)
    x = x.view(y.shape)
    # each takes a multiple of a projection away, which is its own transpose
    x = x + number["contrast"] * (x - x.mean((1, 2, 3), keepdim=True))
    x = x + number["saturation"] * (x - x.mean(1, keepdim=True))
    return x.to(y_bar.dtype)


def _numbers(parameters: Tensor) -> dict[str, Tensor]:
    return dict(zip(WARP_PARAMETERS, parameters[:, :, None, None, None].unbind(1), strict=True))  # (B, 1, 1, 1) each


def _corners(number: dict[str, Tensor], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels around each target's source: (B, C, H·W) where they lie, (B, 1, H·W) their weights."""
    batch, channels, height, width = like.shape
    i, j = _grid(number, height, width)
    below, beside = i - (height - 1) / 2, j - (width - 1) / 2  # the centre of the image
    down = number["row_by_row"] * below + number["row_by_column"] * beside + number["row_shift"]
    right = number["column_by_row"] * below + number["column_by_column"] * beside + number["column_shift"]
    for row, row_weight in _neighbours(i, down, height):
        for column, column_weight in _neighbours(j, right, width):
            place = (row * width + column).view(batch, 1, -1).expand(-1, channels, -1)
            yield place, (row_weight * column_weight).view(batch, 1, -1)


def _neighbours(target: Tensor, displacement: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Along one axis: the pixel before and the pixel behind the source, with their weights, zero outside the image."""
    whole = displacement.floor()
    share = displacement - whole
    for pixel, weight in ((target + whole, 1 - share), (target + whole + 1, share)):
        yield pixel.clamp(0, size - 1).long(), weight * ((pixel >= 0) & (pixel < size))


def _visible(number: dict[str, Tensor], like: Tensor) -> Tensor:
    i, j = _grid(number, *like.shape[2:])
    rows = (i >= number["top"]) & (i < number["bottom"])
    return ~(rows & (j >= number["left"]) & (j < number["right"]))


def _grid(number: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows (H, 1) and the columns (W,) of the pixels."""
    like = number["top"]
    i, j = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (height, width))
    return i[:, None], j
