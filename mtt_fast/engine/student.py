"""What the engine asks of a model: its gradient, and the directional derivative of that gradient (design: one step).

The generic student below answers for any network and any loss through `torch.func`. A hand-written student for one
architecture answers the same two questions; wrapped students (`InMicrobatches`) answer them by asking another.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network

# What a generic step takes over what it holds: glibc's allocator keeps freed blocks between those in use. 1.34 to 2.0
# measured on ConvNet, depth 3 to 5 at 32 to 128 pixels.
_TAKEN_OVER_HELD = 2.1

CANNOT_CUT = (
    "microbatch: the network's batch norm uses batch statistics, so cutting the batch would change the result; "
    "use instance norm, evaluation mode, or no micro-batches"
)
"""What is said where batches of a network that mixes samples were to be cut."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch from logits (b, classes) and labels (b,) or (b, classes)."""


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


class _HeldByAll:
    """A setting of the whole process, in force from when the first thread enters until the last one has left."""

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting, self._lock, self._inside = setting, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._held = self._setting()
                self._held.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._held.__exit__(None, None, None)


# the only attention that can be differentiated twice, in whichever mode
_plain_attention = _HeldByAll(functools.partial(sdpa_kernel, SDPBackend.MATH))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; `labels` are class indices (b,) or probabilities (b, classes)."""
    return F.cross_entropy(logits, labels)


def cross_entropy_from_logits(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Mean cross-entropy against softmax(`label_logits`) (b, classes): learned soft labels, as DATM keeps them."""
    return F.cross_entropy(logits, label_logits.softmax(dim=1))


@dataclass(frozen=True)
class GenericStudent:
    """Any network and loss, by `torch.func.jvp` of `torch.func.grad`: forward over reverse, no double backward.

    Where an operation of theirs has no forward mode, the step is done by a double backward after all.
    """

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
        with _plain_attention:
            try:
                return self._forward_over_reverse(theta, images, labels, v)
            except RuntimeError as error:
                if not _lacks_forward_mode(error):
                    raise
            return self._reverse_over_reverse(theta, images, labels, v)

    def _forward_over_reverse(self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> GradientTangent:
        soft = labels.is_floating_point()

        def loss_of(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.network(theta, images), labels)

        gradient_and_loss = torch.func.grad_and_value(loss_of, argnums=(0, 1, 2) if soft else (0, 1))
        # a copy: the tangent of a view is as large as what it is a view of, here all N + 1 rows of a path
        at = theta.clone()
        derivative = torch.func.jvp(lambda theta: gradient_and_loss(theta, images, labels), (at,), (v,))[1]
        gradients, v_dot_g = derivative
        return GradientTangent(v_dot_g, gradients[0], gradients[1], gradients[2] if soft else None)

    def _reverse_over_reverse(self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> GradientTangent:
        """The same numbers by the gradient of v·g, in more memory."""
        soft = labels.is_floating_point()
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in (theta, images, *([labels] if soft else []))]
            loss = self.loss(self.network(leaves[0], leaves[1]), leaves[2] if soft else labels)
            (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
            v_dot_g = torch.dot(gradient, v)
            gradients = torch.autograd.grad(v_dot_g, leaves, materialize_grads=True)
        return GradientTangent(v_dot_g.detach(), gradients[0], gradients[1], gradients[2] if soft else None)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 F and, as autograd does not know which gradients of the primal are needed, 9 F."""
        return 12, 12

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`.

        What is held at once is found by a step on tensors without data, of one sample and of two (two and three where
        they are normalised together, which one alone cannot be). What the operations take inside, and what the
        allocator keeps between blocks in use, is an allowance.
        """
        few = 2 if self.network.mixes_samples else 1
        fewer, more = (held_bytes(self.network, count, image_shape, dtype) for count in (few, few + 1))
        held = [less + (batch - few) * (most - less) for less, most in zip(fewer, more, strict=True)]
        gradient, gradient_jvp = (int(_TAKEN_OVER_HELD * size) for size in held)
        return StepBytes(gradient, gradient, gradient_jvp, gradient_jvp, kept=0, work=0)


def _lacks_forward_mode(error: RuntimeError) -> bool:
    """An operation has none (huber_loss), or one that writes into what torch keeps for a zero (mse_loss)."""
    return isinstance(error, NotImplementedError) or "ZeroTensors are immutable" in str(error)


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

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`."""
        return self.student.passes

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`: of the largest piece, beside what all pieces keep."""
        piece = self.student.step_bytes(min(self.size, batch), image_shape, dtype, device)
        kept = self.student.step_bytes(batch, image_shape, dtype, device).kept
        return piece._replace(kept=kept, gradient_keeping=kept - piece.kept + piece.gradient_keeping)

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
        raise InputError(CANNOT_CUT)
    return InMicrobatches(student, size)


@functools.lru_cache(maxsize=32)  # an evaluation asks for each network of a pool again and again
def held_bytes(network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> tuple[int, int]:
    """Return the peak of bytes in tensors during a generic student's `gradient`, and its `gradient_jvp`.

    Nothing is computed: the step is one on the meta device, with a loss that stands for any other.
    """
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    images = torch.empty((batch, *image_shape), dtype=dtype, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    student = GenericStudent(network, lambda logits, _: logits.square().mean())
    with _CountHeld() as forward_sweep:
        student.gradient(theta, images, labels)
    with _CountHeld() as backward_sweep:
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta))
    return forward_sweep.peak, backward_sweep.peak


class _CountHeld(TorchDispatchMode):
    """Follow the bytes of the tensors that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self._held += storage.nbytes()
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self._held -= size
