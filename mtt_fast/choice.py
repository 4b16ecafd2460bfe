"""Which student answers for a network."""

from __future__ import annotations

import torch

from mtt_fast.convnet import ConvNet
from mtt_fast.errors import InputError
from mtt_fast.fused import FusedConvNetStudent
from mtt_fast.kernels import LabelKind, native_available
from mtt_fast.student import (
    GenericStudent,
    InMicrobatches,
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
    microbatch: int | None = None,
) -> Student:
    """Return the student for `network` on `device`, in pieces of at most `microbatch` samples if given.

    That is the fused one for `ConvNet` under cross-entropy where its kernels are, else the generic one. A `loss` of the
    user's own takes logits and labels as they are. Raises `InputError` if pieces are asked of a network whose samples
    depend on each other (batch norm).
    """
    student: Student
    if isinstance(network, ConvNet) and loss is None and kernels_for(device):
        student = FusedConvNetStudent(network, label_kind)
    else:
        default = cross_entropy_from_logits if label_kind == "logits" else cross_entropy
        student = GenericStudent(network, loss or default)
    if microbatch is None:
        return student
    if microbatch < 1:
        raise InputError(f"microbatch: expected at least 1, found {microbatch}")
    if network.mixes_samples:
        raise InputError(
            "microbatch: the network's batch norm uses batch statistics, so cutting the batch would change the result; "
            "use instance norm, evaluation mode, or no micro-batches"
        )
    return InMicrobatches(student, microbatch)


def kernels_for(device: torch.device) -> bool:
    """Return whether the fused student's kernels have a native twin on `device`.

    Their definitions run everywhere, but in plain torch a fused gradient takes twice the time of autograd's.
    """
    return device.type == "cpu" and native_available()
