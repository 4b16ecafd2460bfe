"""Compute the derivative of a step's gradient by autograd in three ways, and an iteration by each: docs/adjoint.md compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Gradients, Iteration

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The loss () of a batch from parameters (P,), images (b, C, H, W) and labels (b,)."""

Derivatives = tuple[Tensor, Tensor, Tensor]
"""Of a gradient g, for a direction v (P,): v·g (), H v (P,), ∂(v·g)/∂images (b, C, H, W)."""

Product = Callable[[Loss, Tensor, Tensor, Tensor, Tensor], Derivatives]
"""A function of the loss, the parameters, images, labels and v."""


def cross_entropy_of(network: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Return the loss of `network`, which gives logits from parameters and images."""
    return lambda theta, images, labels: F.cross_entropy(network(theta, images), labels)


def reverse_over_reverse(loss: Loss, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> Derivatives:
    """Differentiate v·g in the graph of the gradient."""
    theta, images = (value.detach().requires_grad_() for value in (theta, images))
    (gradient,) = torch.autograd.grad(loss(theta, images, labels), theta, create_graph=True)
    v_dot_g = gradient @ v
    hessian_v, to_images = torch.autograd.grad(v_dot_g, (theta, images))
    return v_dot_g.detach(), hessian_v, to_images


def forward_over_reverse(loss: Loss, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> Derivatives:
    """Take `torch.func.jvp` of the gradient."""
    gradients_and_loss = torch.func.grad_and_value(loss, argnums=(0, 1))
    derivatives: Any = torch.func.jvp(lambda at: gradients_and_loss(at, images, labels), (theta,), (v,))[1]
    (hessian_v, to_images), v_dot_g = derivatives
    return v_dot_g, hessian_v, to_images


def reverse_over_forward(loss: Loss, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> Derivatives:
    """Differentiate v·g as `torch.func.jvp` of the loss."""

    def v_dot_g(theta: Tensor, images: Tensor) -> Tensor:
        return torch.func.jvp(lambda at: loss(at, images, labels), (theta,), (v,))[1]  # type: ignore[no-any-return]

    (hessian_v, to_images), value = torch.func.grad_and_value(v_dot_g, argnums=(0, 1))(theta, images)
    return value, hessian_v, to_images


def gradients_by(product: Product, loss: Loss, case: Iteration, microbatch: int | None = None) -> Gradients:
    """Take the N steps, then differentiate one step at a time in reverse, by `product`. Exact.

    With `microbatch` a batch goes in pieces of so many images.
    """
    images, labels, lr = case.images, case.labels, case.lr
    rate = float(lr)  # once, since this synchronises with a GPU
    theta, path = case.start, []
    for batch in case.batches:
        path.append(theta)
        gradient = torch.zeros_like(theta)
        for index in batch.split(microbatch or len(batch)):
            leaf = theta.detach().requires_grad_()
            (of_piece,) = torch.autograd.grad(loss(leaf, images[index], labels[index]), leaf)
            gradient += len(index) / len(batch) * of_piece
        theta = theta - lr * gradient
    adjoint = 2 * (theta - case.target) / (case.start - case.target).square().sum()
    to_images, to_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for theta, batch in zip(reversed(path), reversed(case.batches.unbind()), strict=True):
        hessian_v = torch.zeros_like(adjoint)
        for index in batch.split(microbatch or len(batch)):
            v = len(index) / len(batch) * adjoint  # the derivatives are linear in v
            v_dot_g, of_piece, to_piece = product(loss, theta, images[index], labels[index], v)
            hessian_v += of_piece
            to_images.index_add_(0, index, to_piece, alpha=-rate)
            to_lr -= v_dot_g
        adjoint = adjoint - lr * hessian_v
    return Gradients(to_images, to_lr)
