"""The student for any network and loss: the gradient and its directional derivative by autograd."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.engine.students.batch import Inputs, gathered
from mtt_fast.engine.students.live_bytes import live_bytes
from mtt_fast.engine.students.protocol import GradientTangent, Loss, SavedActivations, StepBytes, StepGradient, as_sums
from mtt_fast.errors import InputError, dtype_name
from mtt_fast.kernels import LabelKind
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.numerics import plain_attention

# The memory of a generic step as a multiple of its live bytes, and that of a saved graph as a multiple of its tensors'. It is
# more than one, since operations allocate inside, and glibc's allocator keeps freed blocks between those in use. Measured: 0.8 to
# 2.3, and up to 1.9, with ConvNet (32 to 128 pixels), ResNet18, VGG11, AlexNet and a ViT.
_STEP_OVERHEAD, _SAVED_OVERHEAD = 2.6, 2.0
_MANY = 128  # samples


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy; `labels` are class indices (b,) or probabilities (b, classes).

    Raises `InputError` for outputs other than logits (b, classes), for labels that do not fit, and for labels that torch leaves
    out of the mean (`ignore_index`), since then the losses of pieces would not add up to the batch's.
    """
    if logits.dim() != 2:
        raise InputError(
            f"`net`: expected logits (b, classes), found shape {tuple(logits.shape)}; return these, or give a `loss` that takes others"
        )
    kind: LabelKind = "probabilities" if labels.is_floating_point() else "indices"
    check_labels(labels, kind, len(logits), logits.shape[1], labels.dtype)
    return F.cross_entropy(logits, labels)


def check_labels(labels: Tensor, kind: LabelKind, count: int, classes: int, dtype: torch.dtype) -> None:
    """Raise `InputError` unless `labels` are int64 class indices (count,), or soft labels (count, classes) of `dtype`.

    The values of indices are checked only on a CPU, since a check would synchronise with a GPU.
    """
    shape, expected = ((count,), torch.int64) if kind == "indices" else ((count, classes), dtype)
    if labels.shape != shape or labels.dtype != expected:
        found = f"{dtype_name(labels.dtype)} of shape {tuple(labels.shape)}"
        raise InputError(f"`labels`: expected {kind} {shape}, {dtype_name(expected)}, found {found}")
    if kind == "indices" and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"`labels`: expected class indices 0 … {classes - 1}, found {int(labels.min())} … {int(labels.max())}"
        )


def cross_entropy_from_logits(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Return the mean cross-entropy against softmax(`label_logits`) (b, classes): learned soft labels, as DATM keeps them."""
    return cross_entropy(logits, label_logits.softmax(dim=1))


@dataclass(frozen=True)
class GenericStudent:
    """Compute a step of any network and loss by autograd: the directional derivative is the gradient of v·g, in the graph of one step.

    The saved activations are this graph. If all steps save theirs, the two sweeps do the same work as autograd through all steps.
    """

    network: Network
    loss: Loss = cross_entropy

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        if save:
            # of a copy of θ, since the graph saves θ and would be invalid once the next row of the path is written
            step = self._step_graph(theta.clone(), images, labels)
            return StepGradient(step.loss.detach(), as_sums(step.gradient.detach()), [step])
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            loss = self.loss(self.network(leaf, gathered(images)), labels)
            gradient = gradient_of(loss, leaf)
        return StepGradient(loss.detach(), as_sums(gradient), None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        step = saved.pop() if saved else self._step_graph(theta, images, labels)
        v_dot_g = torch.dot(step.gradient.detach(), v)
        hessian_v, images_bar_dot, *labels_bar_dot = derivatives_of(step, v)
        to_labels = labels_bar_dot[0] if labels_bar_dot else None
        return GradientTangent(v_dot_g, as_sums(hessian_v), images_bar_dot, to_labels, step.loss.detach())

    def _step_graph(self, theta: Tensor, images: Inputs, labels: Tensor) -> LossGraph:
        def loss(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            # of copies, since a network may modify its images in place, and a loss its labels
            return self.loss(self.network(theta, images.clone()), labels.clone())

        with plain_attention:
            return _graph_of(loss, theta, gathered(images), labels)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 + 9, of which the backward sweep repeats 3 unless the graph was saved."""
        return 12, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`.

        The live bytes are interpolated linearly between two steps on meta tensors, with few samples and with many.
        """
        few = 2 if self.network.mixes_samples else 1  # batch norm needs two samples
        fewer, more = (self.live_bytes(count, image_shape, dtype) for count in (few, _MANY))
        share = (batch - few) / (_MANY - few)
        live = StepBytes(*(int(less + share * (most - less)) for less, most in zip(fewer, more, strict=True)))
        saved = int(_SAVED_OVERHEAD * live.saved)
        return StepBytes(
            gradient=int(_STEP_OVERHEAD * live.gradient),
            gradient_saving=int(_STEP_OVERHEAD * (live.gradient_saving - live.saved)) + saved,
            gradient_jvp=int(_STEP_OVERHEAD * live.gradient_jvp),
            gradient_jvp_saved=int(_STEP_OVERHEAD * live.gradient_jvp_saved),
            saved=saved,
            workspace=0,
        )

    def live_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> StepBytes:
        """Return the bytes of the live tensors in a step, without the temporaries inside operations (see `step_bytes`).

        A small loss stands in for `loss`, so that the result depends only on the network. Raises `InputError` as the function
        `live_bytes` does.
        """
        student = GenericStudent(self.network, lambda outputs, _: outputs.square().mean().real)
        return live_bytes(self.network, student, batch, image_shape, dtype)


class LossGraph(NamedTuple):
    """The autograd graph of a loss, from its leaves to the gradient with respect to the first of them."""

    leaves: list[Tensor]  # of a step: parameters, images, and soft labels
    loss: Tensor  # ()
    gradient: Tensor  # of the shape of the first leaf


def loss_graph(loss: Loss, outputs: Tensor, labels: Tensor) -> LossGraph:
    """Return the graph of `loss` from a network's `outputs` (b, …), and from floating `labels`, to the gradient with respect to the outputs."""
    if outputs.is_complex():
        raise InputError(
            f"`net`: expected real outputs where batches are cut for a `loss` that is not a mean over samples, found {outputs.dtype}; "
            "return torch.view_as_real of them, of which the `loss` takes torch.view_as_complex"
        )
    # of copies, since a loss may modify its arguments in place
    return _graph_of(lambda outputs, labels: loss(outputs.clone(), labels.clone()), outputs, labels)


def _graph_of(loss: Callable[..., Tensor], *arguments: Tensor) -> LossGraph:
    """Return the graph of `loss` from its floating `arguments` to the gradient with respect to the first."""
    with torch.enable_grad(), explaining_missing_derivatives():
        given = [argument.detach().requires_grad_(argument.is_floating_point()) for argument in arguments]
        leaves = [argument for argument in given if argument.requires_grad]
        value = loss(*given)
        return LossGraph(leaves, value, gradient_of(value, leaves[0], create_graph=True))


def gradient_of(loss: Tensor, leaf: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of `loss` () with respect to `leaf`, the parameters or what depends on them.

    Raises `InputError` for a loss that does not depend on it.
    """
    depends = loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph, allow_unused=True) if depends else [None]
    if gradient is None:
        raise no_gradient_error("parameters")
    return gradient


def derivatives_of(graph: LossGraph, v: Tensor) -> list[Tensor]:
    """Return the gradient of v·g with respect to each leaf of `graph`, which can be used only once; `v` has the shape of g."""
    # by `backward`, since torch.autograd.grad treats a function that torch differentiates only once as a constant
    # a constant gradient, as of a loss that is linear in the parameters and does not read the images, has no graph
    if graph.gradient.requires_grad:
        with explaining_missing_derivatives():
            torch.autograd.backward(graph.gradient, v)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in graph.leaves]


@contextmanager
def explaining_missing_derivatives() -> Iterator[None]:
    """Turn torch's error that an operation has no (second) derivative into an `InputError`."""
    try:
        yield
    except RuntimeError as error:
        if not _NO_DERIVATIVE.search(str(error)):
            raise
        raise InputError(
            "`net`, `loss`: expected operations that torch differentiates twice, with respect to floating labels too, found one "
            f"that it does not ({error}); write it with other operations"
        ) from error


_NO_DERIVATIVE = re.compile(
    "derivative for .* is not implemented|not differentiable with respect to|differentiate twice"
)


def no_gradient_error(name: str) -> InputError:
    """Return the error that the loss of a step has no gradient with respect to its `name`, "parameters" or "images"."""
    return InputError(
        f"`net`, `loss`: expected a loss that depends on the {name}, found no gradient; leave out what cuts it off, such as "
        "detach, item, torch.no_grad or a constant"
    )
