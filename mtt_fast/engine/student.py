"""The student: a network's gradient, and the directional derivative of that gradient, for one step.

`GenericStudent` computes both by autograd, for any network and loss. `FusedConvNetStudent` (fused.py) computes them by
hand-written formulas. `InMicrobatches` wraps another student, and calls it on pieces of the batch.
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

import mtt_fast.kernels as kernels
from mtt_fast.engine.batch import Inputs, gathered
from mtt_fast.engine.step_checks import check_labels
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, PartialSums
from mtt_fast.networks.protocol import Network

# The memory of a generic step as a multiple of its live bytes, and that of a saved graph as a multiple of its tensors'. It is
# more than one, since operations allocate inside, and glibc's allocator keeps freed blocks between those in use. Measured: 0.8 to
# 2.3, and up to 1.9, with ConvNet (32 to 128 pixels), ResNet18, VGG11, AlexNet and a ViT.
_STEP_OVERHEAD, _SAVED_OVERHEAD = 2.6, 2.0
_MANY = 128  # samples

CANNOT_CUT = (
    "`microbatch`: the network's batch norm uses batch statistics, so cutting the batch would change the result; "
    "use instance norm, evaluation mode, or no micro-batches"
)
"""The error for a plan that cuts the batches of a network that mixes samples."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch from logits (b, classes) and labels (b,) or (b, classes)."""


SavedActivations = list[Any]
"""Activations of one step, in the private format of the student that saved them."""


class StepGradient(NamedTuple):
    """The loss, its gradient with respect to θ, and the saved activations."""

    loss: Tensor  # ()
    sums: PartialSums  # of the gradient
    saved: SavedActivations | None

    @property
    def theta(self) -> Tensor:
        """Return the gradient (P,)."""
        gradient: Tensor = kernels.add_up(self.sums)
        return gradient


class StepBytes(NamedTuple):
    """Peak memory in bytes of one step, beyond its arguments and the saved activations of earlier steps."""

    gradient: int
    gradient_saving: int  # of `gradient` with save=True, the saved activations included
    gradient_jvp: int
    gradient_jvp_saved: int  # of `gradient_jvp` with saved activations, beyond these
    saved: int  # saved activations of one step; 0 if the student saves nothing
    work: int  # work space that stays allocated between calls


class GradientTangent(NamedTuple):
    """Derivatives, at θ in direction v, of the loss and of its gradients (g is the gradient with respect to θ, H the Hessian)."""

    v_dot_g: Tensor  # ()
    sums: PartialSums  # of H v
    images: Tensor  # (b, C, H, W): ∂(v·g)/∂x
    labels: Tensor | None  # (b, classes): ∂(v·g)/∂y; None for class indices
    loss: Tensor | None = None  # (): the loss itself, which the sweeps compare; None from the fused student

    @property
    def hessian_v(self) -> Tensor:
        """Return H v (P,)."""
        hessian_v: Tensor = kernels.add_up(self.sums)
        return hessian_v


def as_sums(vector: Tensor) -> PartialSums:
    """Return a vector (P,) as the only summand of its partial sums."""
    return PartialSums((vector.contiguous()[None],))


class Student(Protocol):
    """Compute one step's gradient, and its derivative in a direction. The loss is a mean over the samples of the batch.

    `images` (b, C, H, W) are a tensor, or a `Batch` that the student gathers and augments itself.
    """

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """Return the loss () and its gradient at `theta` (P,); with `save` also the activations for `gradient_jvp`."""
        ...

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """Return the derivatives of the gradients (with respect to θ, images, labels) at `theta` in the direction `v` (P,).

        `saved` are the activations that `gradient` saved for the same step. They are not computed again, and are consumed.
        """
        ...

    @property
    def passes(self) -> tuple[int, int]:
        """Return the cost of one step in both sweeps, without and with saved activations, in forward passes."""
        ...

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """Return the peak memory of a step on `batch` samples (C, H, W) of `dtype`."""
        ...


class _SharedSetting:
    """A process-wide setting, active from the first thread's entry to the last thread's exit."""

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting, self._lock, self._entries = setting, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._entries:
                self._active = self._setting()
                self._active.__enter__()
            self._entries += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entries -= 1
            if not self._entries:
                self._active.__exit__(None, None, None)


# attention in plain operations: the only implementation of torch that can be differentiated twice
plain_attention = _SharedSetting(functools.partial(sdpa_kernel, SDPBackend.MATH))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy; `labels` are class indices (b,) or probabilities (b, classes).

    Raises `InputError` for labels that do not fit, and for those that torch leaves out of the mean (as its `ignore_index`): with
    them the pieces of a batch would not add up to the batch.
    """
    if logits.dim() == 2:
        kind: LabelKind = "probabilities" if labels.is_floating_point() else "indices"
        check_labels(labels, kind, len(logits), logits.shape[1], labels.dtype)
    return F.cross_entropy(logits, labels)


def cross_entropy_from_logits(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Return the mean cross-entropy against softmax(`label_logits`) (b, classes): learned soft labels, as DATM keeps them."""
    return cross_entropy(logits, label_logits.softmax(dim=1))


@dataclass(frozen=True)
class GenericStudent:
    """Compute a step of any network and loss by autograd: the directional derivative is the gradient of v·g, in the graph of one step.

    The saved activations are that graph. If all steps save theirs, the two sweeps do what autograd through all steps does.
    """

    network: Network
    loss: Loss = cross_entropy

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        if save:  # at a copy: the graph saves θ, and would be invalid once the next row of the path is written
            step = self._recorded(theta.clone(), images, labels)
            return StepGradient(step.loss.detach(), as_sums(step.gradient.detach()), [step])
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            loss = self.loss(self.network(leaf, gathered(images)), labels)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return StepGradient(loss.detach(), as_sums(gradient), None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        step = saved.pop() if saved else self._recorded(theta, images, labels)
        v_dot_g = torch.dot(step.gradient.detach(), v)
        hessian_v, images_bar_dot, *labels_bar_dot = torch.autograd.grad(
            step.gradient, step.leaves, v, materialize_grads=True
        )
        to_labels = labels_bar_dot[0] if labels_bar_dot else None
        return GradientTangent(v_dot_g, as_sums(hessian_v), images_bar_dot, to_labels, step.loss.detach())

    def _recorded(self, theta: Tensor, images: Inputs, labels: Tensor) -> _RecordedStep:
        inputs = gathered(images)
        differentiated = (theta, inputs, labels) if labels.is_floating_point() else (theta, inputs)
        with plain_attention, torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in differentiated]
            loss = self.loss(self.network(leaves[0], leaves[1]), leaves[2] if len(leaves) == 3 else labels)
            (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        return _RecordedStep(leaves, loss, gradient)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 + 9, of which the backward sweep repeats 3 unless the graph was saved."""
        return 12, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`.

        The live bytes are interpolated linearly between two steps on meta tensors, with few samples and with many.
        """
        few = 2 if self.network.mixes_samples else 1  # batch norm needs two samples
        fewer, more = (live_bytes(self.network, count, image_shape, dtype) for count in (few, _MANY))
        share = (batch - few) / (_MANY - few)
        live = StepBytes(*(int(less + share * (most - less)) for less, most in zip(fewer, more, strict=True)))
        saved = int(_SAVED_OVERHEAD * live.saved)
        return StepBytes(
            gradient=int(_STEP_OVERHEAD * live.gradient),
            gradient_saving=int(_STEP_OVERHEAD * (live.gradient_saving - live.saved)) + saved,
            gradient_jvp=int(_STEP_OVERHEAD * live.gradient_jvp),
            gradient_jvp_saved=int(_STEP_OVERHEAD * live.gradient_jvp_saved),
            saved=saved,
            work=0,
        )


class _RecordedStep(NamedTuple):
    """The autograd graph of a step, from its leaves to the gradient with respect to the parameters."""

    leaves: list[Tensor]  # parameters, images, and soft labels
    loss: Tensor  # ()
    gradient: Tensor  # (P,)


@dataclass(frozen=True)
class InMicrobatches:
    """Cut each batch into pieces of at most `size` samples, and call `student` on each.

    The result is exact: the loss is a mean over samples, so the loss and its gradients are weighted sums over the pieces.
    """

    student: Student
    size: int

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        total_loss, total, saved = theta.new_zeros(()), torch.zeros_like(theta), []
        for piece, weight in self._pieces(len(images)):
            part = self.student.gradient(theta, images[piece], labels[piece], save)
            total_loss.add_(part.loss, alpha=weight)
            total.add_(part.theta, alpha=weight)
            saved.append(part.saved)
        return StepGradient(total_loss, as_sums(total), saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        v_dot_g, hessian_v, loss = theta.new_zeros(()), torch.zeros_like(theta), None
        to_images = theta.new_empty(images.shape)
        to_labels = torch.empty_like(labels) if labels.is_floating_point() else None
        for piece, weight in self._pieces(len(images)):
            piece_saved = saved.pop(0) if saved else None
            part = self.student.gradient_jvp(theta, images[piece], labels[piece], v, piece_saved)
            v_dot_g.add_(part.v_dot_g, alpha=weight)
            hessian_v.add_(part.hessian_v, alpha=weight)
            torch.mul(part.images, weight, out=to_images[piece])
            if to_labels is not None and part.labels is not None:
                torch.mul(part.labels, weight, out=to_labels[piece])
            if part.loss is not None:
                loss = torch.add(theta.new_zeros(()) if loss is None else loss, part.loss, alpha=weight)
        return GradientTangent(v_dot_g, as_sums(hessian_v), to_images, to_labels, loss)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`."""
        return self.student.passes

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`: the memory of the largest piece, and the saved activations of all pieces."""
        sizes = [piece.stop - piece.start for piece, _ in self._pieces(batch)]
        steps = {size: self.student.step_bytes(size, image_shape, dtype, device) for size in set(sizes)}
        largest, saved = steps[sizes[0]], sum(steps[size].saved for size in sizes)
        return largest._replace(saved=saved, gradient_saving=saved - largest.saved + largest.gradient_saving)

    def _pieces(self, batch: int) -> Iterator[tuple[slice, float]]:
        for start in range(0, batch, self.size):
            stop = min(start + self.size, batch)
            yield slice(start, stop), (stop - start) / batch


_Shapes = tuple[int, torch.Size, torch.dtype]
_LIVE_BYTES: weakref.WeakKeyDictionary[Network, dict[_Shapes, StepBytes]] = weakref.WeakKeyDictionary()
"""Cache of `live_bytes`, since an evaluation asks again and again for each network of a pool. An entry lives as long as its network."""


def live_bytes(network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> StepBytes:
    """Return the bytes of the live tensors in steps of a `GenericStudent`, at their peaks and between the sweeps.

    Nothing is computed: the steps run on the meta device, with a small loss in place of the caller's. Raises `InputError` for a
    network that does not run there, and for one that cannot be a key of the cache.
    """
    try:
        known = _LIVE_BYTES.setdefault(network, {})
    except TypeError as error:
        raise InputError(
            f"`net`: expected a network with a hash and weak references, under which the memory of its steps is noted, found {error}; "
            "make a dataclass with eq=False, or leave `memory_budget` out"
        ) from error
    shapes = (batch, image_shape, dtype)
    if shapes not in known:
        try:
            with torch.autograd.set_detect_anomaly(False):  # which reads values, for NaN
                known[shapes] = _counted_live_bytes(network, *shapes)
        except RuntimeError as error:
            raise InputError(
                "`net`: expected a network that runs on tensors without data, which count the memory of a step, found "
                f"{str(error).partition(chr(10))[0]!r} for images {tuple(image_shape)}; make its tensors buffers of a module and read "
                "no tensor's value in it; `unroll` counts only for a `memory_budget`"
            ) from error
    return known[shapes]


def _counted_live_bytes(network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> StepBytes:
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    images = torch.empty((batch, *image_shape), dtype=dtype, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    student = GenericStudent(network, lambda logits, _: logits.square().mean())
    with CountLiveBytes() as gradient:
        student.gradient(theta, images, labels)
    with CountLiveBytes() as gradient_jvp:
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta))
    with CountLiveBytes() as saving:
        step = student.gradient(theta, images, labels, save=True)
        saved, forward_peak = saving.live, saving.peak
        saving.peak = saved
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta), step.saved)
    return StepBytes(
        gradient=gradient.peak,
        gradient_saving=forward_peak,
        gradient_jvp=gradient_jvp.peak,
        gradient_jvp_saved=saving.peak - saved,
        saved=saved,
        work=0,
    )


class CountLiveBytes(TorchDispatchMode):
    """Follow the bytes of the tensors that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size
