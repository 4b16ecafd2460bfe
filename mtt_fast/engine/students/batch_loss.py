"""The student for a loss that is not a mean over samples: the network gets pieces of a batch, and the loss the outputs of all.

A contrastive loss compares each sample with all others, and class weights divide by the weights of the whole batch. The loss ℓ
depends on the network only through its outputs z (b, …), which are small. So the pieces of a batch need only ∂ℓ/∂z, and their
gradients add up ("gradient caching", Gao et al. 2021). docs/adjoint.md derives the directional derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.students.batch import Inputs, gathered
from mtt_fast.engine.students.generic import GenericStudent, derivatives_of, loss_graph
from mtt_fast.engine.students.microbatches import InMicrobatches, pieces_of
from mtt_fast.engine.students.protocol import GradientTangent, SavedActivations, StepBytes, StepGradient, as_sums
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.numerics import plain_attention


@dataclass(frozen=True)
class BatchLossStudent:
    """Compute a step of `student` with its network on pieces of at most `size` samples, and its loss on the whole batch.

    The result is exact for any loss, if the network does not mix samples. Activations are not saved.
    """

    student: GenericStudent
    size: int

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        graph = loss_graph(self.student.loss, outputs_in_pieces(self.student.network, theta, images, self.size), labels)
        step = self._pieces.gradient(theta, images, len(images) * graph.gradient.detach())
        return StepGradient(graph.loss.detach(), step.sums, None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        graph = loss_graph(self.student.loss, outputs_in_pieces(self.student.network, theta, images, self.size), labels)
        outputs_bar = len(images) * graph.gradient.detach()
        # with ∂ℓ/∂z as a constant; the derivative with respect to that constant is the tangent of the outputs
        part = self._pieces.gradient_jvp(theta, images, outputs_bar, v)
        assert part.labels is not None
        # then with ∂ℓ/∂z as a function of the outputs: its tangent is ∂²ℓ/∂z² times the outputs' tangent
        outputs_bar_dot, *labels_bar_dot = derivatives_of(graph, len(images) * part.labels)
        hessian_v = part.hessian_v
        self._add_vjp(theta, images, outputs_bar_dot, out=(hessian_v, part.images))
        to_labels = labels_bar_dot[0] if labels_bar_dot else None
        return GradientTangent(part.v_dot_g, as_sums(hessian_v), part.images, to_labels, graph.loss.detach())

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: the outputs in both sweeps (2), the derivatives of the pieces (12), and the terms through ∂ℓ/∂z (3)."""
        return 17, 17

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`: the memory of a piece. The plan, not this, allows for the memory of the loss itself."""
        step = InMicrobatches(self.student, self.size).step_bytes(batch, image_shape, dtype, device)
        return step._replace(gradient_saving=step.gradient, gradient_jvp_saved=step.gradient_jvp, saved=0)

    @property
    def _pieces(self) -> InMicrobatches:
        """Return the student whose "labels" are b·∂ℓ/∂z: the mean of z·(b ∂ℓ/∂z) over the samples has the gradient of ℓ."""
        return InMicrobatches(GenericStudent(self.student.network, _mean_inner_product), self.size)

    def _add_vjp(self, theta: Tensor, images: Inputs, outputs_bar: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Add the gradients of the network's outputs · `outputs_bar` with respect to θ and to the images to `out`."""
        to_theta, to_images = out
        for piece, _ in pieces_of(len(images), self.size):
            with plain_attention, torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (theta, gathered(images[piece]))]
                outputs = self.student.network(leaves[0], leaves[1].clone())
            torch.autograd.backward(outputs, outputs_bar[piece])
            for total, leaf in zip((to_theta, to_images[piece]), leaves, strict=True):
                if leaf.grad is not None:
                    total.add_(leaf.grad)


def outputs_in_pieces(network: Network, theta: Tensor, images: Inputs, size: int) -> Tensor:
    """Return the network's outputs (b, …) of a whole batch, without a graph, computed on at most `size` samples at once."""
    with torch.no_grad():
        pieces = [network(theta, gathered(images[piece]).clone()) for piece, _ in pieces_of(len(images), size)]
    return torch.cat(pieces)


def _mean_inner_product(outputs: Tensor, factors: Tensor) -> Tensor:
    """Return the mean over the samples of the inner products of `outputs` and `factors`, both (b, …)."""
    return (outputs * factors).sum() / len(outputs)
