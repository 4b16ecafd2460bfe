"""Choose the student that computes a network's steps, and its precision."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy, cross_entropy_from_logits
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.errors import InputError
from mtt_fast.kernels import HALF_PRECISIONS, LabelKind, Precision, has_kernels
from mtt_fast.networks.convnet import is_plain_convnet
from mtt_fast.networks.protocol import Network

PrecisionRequest = Literal["auto", "fp32", "tf32", "fp16", "bf16"]
"""A precision, or "auto": see `choose_precision`."""

_TENSOR_CORES = (8, 0)
"""The lowest compute capability with tf32, and for which Triton compiles the kernels for Tensor cores."""


class ChosenPrecision(NamedTuple):
    """A precision, and the reason for it as text for the log."""

    precision: Precision
    reason: str


def student_for(
    network: Network,
    device: torch.device,
    label_kind: LabelKind = "indices",
    loss: Loss | None = None,
    precision: Precision = "fp32",
) -> Student:
    """Return the student for `network` on `device`: `FusedConvNetStudent` for a `ConvNet` if kernels exist, else `GenericStudent`.

    A subclass of `ConvNet` that computes the logits differently gets `GenericStudent`, too. The default `loss` is cross-entropy
    with labels of `label_kind`. `GenericStudent` ignores `precision` and follows torch's own settings. Raises `InputError` for an
    unknown `label_kind` or `precision`, and for a plain module, whose parameters are not one vector.
    """
    for name, value, kinds in (("label_kind", label_kind, LabelKind), ("precision", precision, Precision)):
        if value not in get_args(kinds):
            raise InputError(f"`{name}` {value}: expected {', '.join(get_args(kinds))}")
    if isinstance(network, type):
        raise InputError(f"`net`: expected a network, found the class {network.__name__}; call it to make one")
    if not (hasattr(network, "num_parameters") and hasattr(network, "mixes_samples")):
        raise InputError(
            f"`net`: expected a network of one vector of parameters, found {type(network).__name__}; use ConvNet, or "
            "FlatModule of a torch.nn.Module"
        )
    if isinstance(loss, type):
        raise InputError(f"`loss`: expected a function, found the class {loss.__name__}; call it to make one")
    if loss is not None and not callable(loss):
        raise InputError(
            f"`loss`: expected a function of logits and labels, found {loss!r}; leave it out for cross-entropy"
        )
    if is_plain_convnet(network) and has_fused_kernels(device):
        return FusedConvNetStudent(network, label_kind, precision, loss)
    default = cross_entropy_from_logits if label_kind == "logits" else cross_entropy
    return GenericStudent(network, loss or default)


def has_fused_kernels(device: torch.device) -> bool:
    """Return whether a back end has the fused student's kernels for `device`.

    The reference runs everywhere, but there the fused gradient takes twice the time of autograd. Raises `InputError` for a CUDA
    device where Triton is missing.
    """
    try:
        return bool(has_kernels(device))
    except ImportError as error:
        raise InputError(f"{device}: {error}") from error


def choose_precision(
    device: torch.device, network: Network, requested: PrecisionRequest, *, iterations: bool = False
) -> ChosenPrecision:
    """Return the precision of the factors of products in a run with `network` on `device`.

    A CPU always computes in float32. On a GPU, "auto" is fp16 for the `iterations` of a distillation if `network` has a fused
    student, and tf32 otherwise (for experts and evaluations too). Before compute capability 8.0, which added tf32, "auto" and
    "tf32" mean fp32, with cuDNN's convolutions. Any other `requested` precision is returned unchanged. Raises `InputError` for an
    unknown precision, and for fp16 or bf16 with `GenericStudent`, which follows torch's own settings.
    """
    if requested not in get_args(PrecisionRequest):
        raise InputError(f"`precision` {requested}: expected {', '.join(get_args(PrecisionRequest))}")
    if device.type == "cpu":
        return ChosenPrecision("fp32", "a CPU computes in float32")
    is_fused = isinstance(student_for(network, device), FusedConvNetStudent)
    if requested in ("auto", "tf32") and torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        return ChosenPrecision("fp32", f"{requested}: this GPU has no tf32, and no Tensor cores for the kernels")
    if requested == "auto":
        return _automatic(is_fused=is_fused, iterations=iterations)
    if requested in HALF_PRECISIONS and not is_fused:
        raise InputError(
            f"`precision` {requested}: only the fused step of ConvNet supports it, and {type(network).__name__} uses the generic one "
            f"on {device}; use `precision` tf32 or fp32"
        )
    return ChosenPrecision(requested, "as requested")


def _automatic(*, is_fused: bool, iterations: bool) -> ChosenPrecision:
    if not iterations:
        return ChosenPrecision("tf32", "auto: fp16 is only for the iterations of a distillation")
    if not is_fused:
        return ChosenPrecision("tf32", "auto: only the fused step of ConvNet has fp16")
    return ChosenPrecision(
        "fp16", "auto: in the iterations, about as exact as tf32 there; experts and evaluations take tf32"
    )


def precision_on(
    device: torch.device, network: Network, requested: PrecisionRequest, *, iterations: bool = False
) -> Precision:
    """Return the precision that `choose_precision` chooses. Raises as it does."""
    return choose_precision(device, network, requested, iterations=iterations).precision


def describe_numerics(
    device: torch.device, network: Network, requested: PrecisionRequest, *, iterations: bool = False
) -> str:
    """Return the student of `network` on `device`, its precision and the reason for that, as text for a log."""
    chosen = choose_precision(device, network, requested, iterations=iterations)
    student = student_for(network, device, precision=chosen.precision)
    return f"{type(student).__name__}, {chosen.precision} ({chosen.reason})"
