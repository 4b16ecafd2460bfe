"""Compute a student's logits on real images after its steps on the synthetic set: the loss of Dataset Distillation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtt_fast.engine.unroll import unroll
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Network


def logits_after_steps(
    network: Network,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    real: Tensor,
    precision: Precision = "fp32",
) -> Tensor:
    """Return logits (b, classes) of `real` images under θ_N, the end of the student's path from `theta` (P,).

    The logits are differentiable, exactly and through all steps, in `images`, soft `labels` and `lr`. The student's steps
    are those of `mtt_fast.unroll`, which takes the same arguments.
    """
    path = unroll(network, theta, images, labels, lr, batches, precision=precision)
    return network(path[-1], real)
