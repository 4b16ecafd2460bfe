"""Which student answers for a network."""

from __future__ import annotations

import torch

from mtt_fast.convnet import ConvNet
from mtt_fast.errors import InputError
from mtt_fast.fused import FusedConvNetStudent
from mtt_fast.kernels import LabelKind, Precision, has_kernels
from mtt_fast.student import (
    GenericStudent,
    Loss,
    Network,
    Student,
    cross_entropy,
    cross_entropy_from_logits,
)


def student_for(
    network: Network,
    device: torch.device,
    label_kind: LabelKind = "indices",
    loss: Loss | None = None,
    precision: Precision = "fp32",
) -> Student:
    """Return the student for `network` on `device`: the fused one for `ConvNet` where its kernels are, else the generic.

    Without a `loss` it is cross-entropy with labels of `label_kind`; a loss of the user's own takes the generic one.
    `precision` is the fused student's; the generic one's is what torch's own settings say.
    """
    if isinstance(network, ConvNet) and loss is None and kernels_for(device):
        return FusedConvNetStudent(network, label_kind, precision)
    default = cross_entropy_from_logits if label_kind == "logits" else cross_entropy
    return GenericStudent(network, loss or default)


def kernels_for(device: torch.device) -> bool:
    """Return whether a back end has the fused student's kernels for `device`.

    The reference runs everywhere, but in plain torch a fused gradient takes twice the time of autograd's. Raises
    `InputError` for a CUDA device where Triton is missing.
    """
    try:
        found: bool = has_kernels(device)
    except ImportError as error:
        raise InputError(f"{device}: {error}") from error
    return found
