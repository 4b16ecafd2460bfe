"""Oracles that share no code with the engine: the meta-gradient by whole-graph autograd, as in the public code.

Also TESLA's truncated gradient, by its formula.

The oracles are for tests, benchmarks, and users who check their own code. Memory grows with N: use small cases.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

_SUMMANDS = {"weight_gradient": 1, "conv_norm_relu_pool": 3, "norm_relu_pool": 2, "bias_relu_pool": 1}
"""How many of the last results are summands, by a part of the name of a gradient's operation."""


class MetaGradient(NamedTuple):
    """Result of one meta-gradient: the student's end (P,), the loss, and its gradients (None where not floating)."""

    end: Tensor
    loss: Tensor
    images: Tensor
    labels: Tensor | None
    lr: Tensor
    start: Tensor


def reference_convnet(
    in_channels: int, num_classes: int, image_size: int, width: int, depth: int, norm: str = "instance"
) -> nn.Module:
    """Return ConvNet as an ordinary `nn.Module`, as the public code builds it; random parameters.

    `norm` is "instance" or "none". The parameters have the public code's names. Raises `ValueError` for another norm.
    """
    if norm not in ("instance", "none"):
        raise ValueError(f"reference_convnet norm: expected instance or none, found {norm}")
    layers: list[nn.Module] = []
    side = image_size
    for block in range(depth):
        wide = block == 0 and in_channels == 1
        layers.append(nn.Conv2d(width if block else in_channels, width, 3, padding=3 if wide else 1))
        if norm == "instance":
            layers.append(nn.GroupNorm(width, width))
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
        side = (side + (4 if wide else 0)) // 2
    classifier = nn.Linear(width * side * side, num_classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=classifier))


def module_function(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return f(theta, images) that runs `module` with the flat parameters `theta`, split as the public code splits them.

    Slicing out each parameter would give the same result, but the gradient of a slice is a vector of all parameters, almost all
    zero.
    """
    parameters = list(module.parameters())
    # each place of a parameter in a layer, once: `functional_call` would leave its tensors in a layer that has two names
    places = [
        (name, value)
        for prefix, layer in module.named_modules()
        for name, value in layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
    ]

    def call(theta: Tensor, images: Tensor) -> Tensor:
        pieces = theta.split([value.numel() for value in parameters])
        values = {value: piece.view(value.shape) for value, piece in zip(parameters, pieces, strict=True)}
        tensors = {name: values[value] for name, value in places}
        return torch.func.functional_call(module, tensors, (images,), tie_weights=False)  # type: ignore[no-any-return]

    return call


def whole_graph(
    network: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    *,
    augment: Callable[[Tensor, int], Tensor] | None = None,
    label_logits: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> MetaGradient:
    """Differentiate `|θ_N − θ*|² / |θ_0 − θ*|²` through the autograd graph of N SGD steps (the denominator held constant).

    `augment(images, n)` is the augmentation of step n, with its random numbers fixed. Shapes are those of `mtt_fast.unroll`.
    """
    theta_0, pixels, lr = (value.detach().clone().requires_grad_() for value in (start, images, lr))
    soft = labels.is_floating_point()
    all_targets = labels.detach().clone().requires_grad_(soft)
    theta, velocity = theta_0, torch.zeros_like(start)
    lrs = lr.expand(len(batches), *lr.shape[1:])
    for n, index in enumerate(batches):
        inputs = pixels[index] if augment is None else augment(pixels[index], n)
        targets = all_targets[index]
        log_p = F.log_softmax(network(theta, inputs), dim=1)
        if not soft:
            loss = F.nll_loss(log_p, targets)
        else:
            loss = -((F.softmax(targets, dim=1) if label_logits else targets) * log_p).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        velocity = momentum * velocity + gradient + weight_decay * theta
        theta = theta - lrs[n] * velocity
    distance = F.mse_loss(theta, target, reduction="sum") / F.mse_loss(start, target, reduction="sum")
    leaves = [theta_0, pixels, lr] + ([all_targets] if soft else [])
    to_start, to_images, to_lr, *to_labels = torch.autograd.grad(distance, leaves)
    return MetaGradient(
        theta.detach(), distance.detach(), to_images, to_labels[0] if to_labels else None, to_lr, to_start
    )


def truncated(
    network: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
) -> MetaGradient:
    """Return TESLA's approximation of the meta-gradient (Cui et al., 2023), by its two loops. Not exact.

    Every step uses the last adjoint. The second loop builds the graph of one step at a time. The image gradient follows the
    formula: the public code returns half of it, since it doubles a tuple instead of the tensor in it. `labels` are class indices
    or probabilities; `lr` is a scalar, or has one rate for each step. The rest is as in `whole_graph`.
    """

    def loss_of(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(network(theta, images), dim=1)
        return -(labels * log_p).sum(1).mean() if labels.is_floating_point() else F.nll_loss(log_p, labels)

    start, target, images, labels, lr = (value.detach() for value in (start, target, images, labels, lr))
    lrs, path = lr.expand(len(batches)), [start]
    for step_lr, index in zip(lrs, batches, strict=True):
        theta = path[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(theta, images[index], labels[index]), theta)
        path.append(path[-1] - step_lr * gradient)
    initial_distance = (start - target).square().sum()
    adjoint = 2 * (path[-1] - target) / initial_distance
    soft = labels.is_floating_point()
    to_images, to_lrs = torch.zeros_like(images), torch.zeros_like(lrs)
    to_labels = torch.zeros_like(labels) if soft else None
    for n, index in enumerate(batches):
        theta, pixels, targets = path[n].detach().requires_grad_(), images[index].requires_grad_(), labels[index]
        targets.requires_grad_(soft)
        (gradient,) = torch.autograd.grad(loss_of(theta, pixels, targets), theta, create_graph=True)
        v_dot_g = gradient @ adjoint
        to_pixels, *to_targets = torch.autograd.grad(v_dot_g, (pixels, targets) if soft else (pixels,))
        to_images.index_add_(0, index, -lrs[n] * to_pixels)
        if to_labels is not None:
            to_labels.index_add_(0, index, -lrs[n] * to_targets[0])
        to_lrs[n] = -v_dot_g.detach()
    loss = (path[-1] - target).square().sum() / initial_distance
    return MetaGradient(
        path[-1], loss, to_images, to_labels, to_lrs if lr.numel() > 1 else to_lrs.sum().view(lr.shape), adjoint
    )


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return |found − expected| / max(|expected|, `floor`) in the Euclidean norm, computed in float64.

    Raises `ValueError` for tensors whose shapes differ by more than sides of 1: torch would compare them by broadcasting.
    """
    found, expected = (each.detach().squeeze() for each in (found, expected))
    if found.shape != expected.shape:
        raise ValueError(f"expected tensors of one shape, found {tuple(found.shape)} and {tuple(expected.shape)}")
    found, expected = (each.to(torch.promote_types(each.dtype, torch.float64)) for each in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp_min(max(floor, torch.finfo(torch.float64).tiny)))


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """Raise `AssertionError` naming `name` unless the relative error is at most `tolerance` (NaN fails).

    `floor` is the smallest magnitude that counts, for values that may be zero up to rounding.
    """
    error = relative_error(found, expected, floor)
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.3e}, allowed {tolerance:.1e}")


def added_up(operation: str, results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results of an operation of `mtt_fast.kernels`, with summands of the parameters' gradients added up.

    Their number depends on the back end, so only their sums can be compared.
    """
    every = (results,) if isinstance(results, Tensor) else tuple(results)
    if not operation.endswith(("_backward", "weight_gradient")):
        return every
    count = next(count for name, count in _SUMMANDS.items() if name in operation)
    return *every[: len(every) - count], *(summands.sum(0) for summands in every[len(every) - count :])
