"""The choice of the student that computes a network's steps, and of its precision."""

from __future__ import annotations

from typing import get_args

import torch

from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.student import GenericStudent, Loss, Student, cross_entropy, cross_entropy_from_logits
from mtt_fast.errors import InputError
from mtt_fast.kernels import HALF_PRECISIONS, LabelKind, Precision, has_kernels
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.networks.protocol import Network


def student_for(
    network: Network,
    device: torch.device,
    label_kind: LabelKind = "indices",
    loss: Loss | None = None,
    precision: Precision = "fp32",
) -> Student:
    """Return the student for `network` on `device`: the fused one for `ConvNet` where its kernels run, else the generic.

    Without a `loss` it is cross-entropy with labels of `label_kind`; a loss of the user's own takes the generic student.
    `precision` is the fused student's; the generic one follows torch's own settings.
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
        return bool(has_kernels(device))
    except ImportError as error:
        raise InputError(f"{device}: {error}") from error


def precision_on(device: torch.device, network: Network, precision: Precision) -> Precision:
    """Return the precision of the factors of products in a run with `network` on `device`, where `precision` is requested.

    A CPU computes in float32 whatever `precision` is. Raises `InputError` for an unknown precision, and for fp16 and bf16
    where `network` takes the generic student, which follows torch's own settings.
    """
    if precision not in get_args(Precision):
        raise InputError(f"`precision` {precision}: expected {', '.join(get_args(Precision))}")
    if device.type == "cpu":
        return "fp32"
    if precision in HALF_PRECISIONS and not isinstance(student_for(network, device), FusedConvNetStudent):
        raise InputError(
            f"`precision` {precision}: only the fused step of ConvNet knows it, and {type(network).__name__} takes the generic one "
            f"on {device}; use `precision` tf32 or fp32"
        )
    return precision


def describe_numerics(device: torch.device, network: Network, precision: Precision) -> str:
    """Return the student of `network` on `device` and its precision, as text for a log."""
    used = precision_on(device, network, precision)
    return f"{type(student_for(network, device, precision=used)).__name__}, {used}"
