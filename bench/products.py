"""Compute the derivative of a step's gradient by autograd in three ways, and an iteration by each: docs/adjoint.md compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""The loss () of a step from its parameters (P,) and images (b, C, H, W)."""

Product = Callable[[Loss, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Loss, parameters, images and direction v (P,) -> v·g (), H v (P,), ∂(v·g)/∂images (b, C, H, W)"""


def reverse_over_reverse(loss: Loss, theta: Tensor, images: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate v·g in the graph of the gradient."""
    theta, images = (value.detach().clone().requires_grad_() for value in (theta, images))
    (gradient,) = torch.autograd.grad(loss(theta, images), theta, create_graph=True)
    v_dot_g = gradient @ v
    hessian_v, to_images = torch.autograd.grad(v_dot_g, (theta, images))
    return v_dot_g.detach(), hessian_v, to_images


def forward_over_reverse(loss: Loss, theta: Tensor, images: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take `torch.func.jvp` of the gradient."""
    gradients_and_loss = torch.func.grad_and_value(loss, argnums=(0, 1))
    derivatives: Any = torch.func.jvp(lambda at: gradients_and_loss(at, images), (theta,), (v,))[1]
    (hessian_v, to_images), v_dot_g = derivatives
    return v_dot_g, hessian_v, to_images


def reverse_over_forward(loss: Loss, theta: Tensor, images: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate v·g as `torch.func.jvp` of the loss."""

    def v_dot_g(theta: Tensor, images: Tensor) -> Tensor:
        return torch.func.jvp(lambda at: loss(at, images), (theta,), (v,))[1]  # type: ignore[no-any-return]

    (hessian_v, to_images), value = torch.func.grad_and_value(v_dot_g, argnums=(0, 1))(theta, images)
    return value, hessian_v, to_images


def gradients_by(
    product: Product, network: Callable[[Tensor, Tensor], Tensor], start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor,
    batches: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the matching loss's gradients to images and lr: N steps on `images[batches[n]]`, then `product` at each step in reverse.

    `network` gives logits from parameters and images.
    """

    def loss_on(index: Tensor) -> Loss:
        return lambda theta, images: F.cross_entropy(network(theta, images), labels[index])

    theta, path = start, []
    for index in batches:
        path.append(theta)
        leaf = theta.detach().requires_grad_()
        theta = theta - lr * torch.autograd.grad(loss_on(index)(leaf, images[index]), leaf)[0]
    adjoint = 2 * (theta - target) / (start - target).square().sum()
    to_images, to_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for at, index in zip(reversed(path), reversed(batches.unbind()), strict=True):
        v_dot_g, hessian_v, to_batch = product(loss_on(index), at, images[index], adjoint)
        to_images.index_add_(0, index, to_batch, alpha=-float(lr))
        to_lr -= v_dot_g
        adjoint = adjoint - lr * hessian_v
    return to_images, to_lr
