"""What the engine asks of a model: its gradient, and the directional derivative of that gradient (design: one step).

The generic student below answers for any network and any loss through `torch.func`. A hand-written student for one
architecture answers the same two questions; wrapped students (`InMicrobatches`) answer them by asking another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.errors import InputError

# Peak of the generic step's jvp of grad, in units of what one forward pass allocates: 4.6 to 6.6 measured on ConvNet,
# depth 3 to 5 at 32 to 128 pixels; the rest is what glibc's allocator keeps between them.
_STEP_OVER_FORWARD = 9

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch from logits (b, classes) and labels (b,) or (b, classes)."""


class Network(Protocol):
    """A pure function of flat parameters: ConvNet, FlatModule, or anything of the same shape."""

    @property
    def num_parameters(self) -> int:
        """P."""
        ...

    @property
    def mixes_samples(self) -> bool:
        """True where a sample's output depends on the others (batch statistics)."""
        ...

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits (b, classes) of `images` (b, C, H, W) under the parameters `theta` (P,)."""
        ...


Kept = list[Any]
"""Activations of one step that its student can use again; what they are is known to that student alone."""


class StepGradient(NamedTuple):
    """The loss and its gradient at θ, and what was kept on the way."""

    loss: Tensor  # ()
    theta: Tensor  # (P,)
    kept: Kept | None


class StepBytes(NamedTuple):
    """Peak memory of one step beyond its arguments and what lies kept already, in bytes."""

    gradient: int
    gradient_keeping: int  # what is kept included
    gradient_jvp: int
    gradient_jvp_kept: int  # with what was kept
    kept: int  # by one step; 0 if the student keeps nothing
    work: int  # stays between calls


class GradientTangent(NamedTuple):
    """Derivative at θ in direction v of the loss and its gradient (g is the gradient to θ, H the Hessian)."""

    v_dot_g: Tensor  # ()
    hessian_v: Tensor  # (P,)
    images: Tensor  # (b, C, H, W): ∂(v·g)/∂x
    labels: Tensor | None  # (b, classes): ∂(v·g)/∂y; None for class indices


class Student(Protocol):
    """One step's gradient and its derivative; the loss is a mean over the samples of the batch."""

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False) -> StepGradient:
        """Return the loss () and ∇θ loss (P,) at `theta`; with `keep` also activations, if the student keeps any."""
        ...

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, kept: Kept | None = None
    ) -> GradientTangent:
        """Return the derivative of the loss's gradients (to θ, images, labels) at `theta` in the direction `v` (P,).

        `kept` is what `gradient` kept of the same step, if it did: it saves computing that again, and is used up.
        """
        ...

    @property
    def passes(self) -> tuple[int, int]:
        """Cost of one step in both sweeps, in units of the convolutions of one forward pass: as it is, with all kept."""
        ...

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """Return what a step on `batch` samples (C, H, W) of `dtype` takes."""
        ...


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; `labels` are class indices (b,) or probabilities (b, classes)."""
    return F.cross_entropy(logits, labels)


def cross_entropy_from_logits(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Mean cross-entropy against softmax(`label_logits`) (b, classes): learned soft labels, as DATM keeps them."""
    return F.cross_entropy(logits, label_logits.softmax(dim=1))


@dataclass(frozen=True)
class GenericStudent:
    """Any network and loss, by `torch.func.jvp` of `torch.func.grad`: forward over reverse, no double backward."""

    network: Network
    loss: Loss = cross_entropy

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False) -> StepGradient:
        """See `Student.gradient`. Keeps nothing: `torch.func` has no way to take it up."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            loss = self.loss(self.network(leaf, images), labels)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return StepGradient(loss.detach(), gradient, None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, kept: Kept | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        soft = labels.is_floating_point()

        def loss_of(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.network(theta, images), labels)

        gradient_and_loss = torch.func.grad_and_value(loss_of, argnums=(0, 1, 2) if soft else (0, 1))
        # a copy: the tangent of a view is as large as what it is a view of, here all N + 1 rows of a path
        at = theta.clone()
        derivative = torch.func.jvp(lambda theta: gradient_and_loss(theta, images, labels), (at,), (v,))[1]
        gradients, v_dot_g = derivative
        return GradientTangent(v_dot_g, gradients[0], gradients[1], gradients[2] if soft else None)

    def sample_bytes(self, image_shape: torch.Size, dtype: torch.dtype) -> int:
        """See `Student.sample_bytes`."""
        return _STEP_OVER_FORWARD * forward_bytes(self.network, image_shape, dtype)


@dataclass(frozen=True)
class InMicrobatches:
    """A student that cuts each batch into pieces of at most `size` samples and asks `student` for each: exact.

    The loss is a mean over samples, so the loss and its gradients are the weighted sums of the pieces'.
    """

    student: Student
    size: int

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        total_loss, total, kept = theta.new_zeros(()), torch.zeros_like(theta), []
        for piece, weight in self._pieces(len(images)):
            part = self.student.gradient(theta, images[piece], labels[piece], keep)
            total_loss.add_(part.loss, alpha=weight)
            total.add_(part.theta, alpha=weight)
            kept.append(part.kept)
        return StepGradient(total_loss, total, kept if keep else None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, kept: Kept | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        v_dot_g, hessian_v = theta.new_zeros(()), torch.zeros_like(theta)
        to_images = torch.empty_like(images)
        to_labels = torch.empty_like(labels) if labels.is_floating_point() else None
        for piece, weight in self._pieces(len(images)):
            of_piece = kept.pop(0) if kept else None
            part = self.student.gradient_jvp(theta, images[piece], labels[piece], v, of_piece)
            v_dot_g.add_(part.v_dot_g, alpha=weight)
            hessian_v.add_(part.hessian_v, alpha=weight)
            torch.mul(part.images, weight, out=to_images[piece])
            if to_labels is not None and part.labels is not None:
                torch.mul(part.labels, weight, out=to_labels[piece])
        return GradientTangent(v_dot_g, hessian_v, to_images, to_labels)

    def sample_bytes(self, image_shape: torch.Size, dtype: torch.dtype) -> int:
        """See `Student.sample_bytes`."""
        return self.student.sample_bytes(image_shape, dtype)

    def _pieces(self, batch: int) -> Iterator[tuple[slice, float]]:
        for begin in range(0, batch, self.size):
            end = min(begin + self.size, batch)
            yield slice(begin, end), (end - begin) / batch


def in_microbatches(student: Student, network: Network, size: int) -> Student:
    """Return `student` cutting its batches into pieces of at most `size` samples.

    Raises `InputError` if `network` makes its samples depend on each other (batch norm).
    """
    if size < 1:
        raise InputError(f"microbatch: expected at least 1, found {size}")
    if network.mixes_samples:
        raise InputError(
            "microbatch: the network's batch norm uses batch statistics, so cutting the batch would change the result; "
            "use instance norm, evaluation mode, or no micro-batches"
        )
    return InMicrobatches(student, size)


def forward_bytes(network: Network, image_shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the bytes that the operations of one sample's forward pass put out (views excluded), without computing them."""
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    image = torch.empty((1, *image_shape), dtype=dtype, device="meta")
    with _CountOutputs() as counted, torch.no_grad():
        network(theta, image)
    return int(counted.bytes)


class _CountOutputs(TorchDispatchMode):
    """Add up the bytes of every tensor that an operation newly allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return result
