"""Check the arguments of one step of a student, without waiting for a GPU."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from mtt_fast.engine.students.batch import Batch, Inputs
from mtt_fast.errors import InputError, dtype_name
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.convnet import ConvNet


def check_choices(label_kind: str, precision: str) -> None:
    """Raise `InputError` for an unknown `label_kind` or `precision`."""
    for name, value, kinds in (("label_kind", label_kind, LabelKind), ("precision", precision, Precision)):
        if value not in get_args(kinds):
            raise InputError(f"`{name}` {value}: expected {', '.join(get_args(kinds))}")


def check_step(
    network: ConvNet, label_kind: LabelKind | None, images: Inputs, labels: Tensor, theta: Tensor, **directions: Tensor
) -> None:
    """Raise `InputError` unless types, shapes, dtypes and devices of a step's tensors fit the network and each other.

    `directions` must be like `theta`. The values of class indices are checked only on a CPU. A `label_kind` of None means that a
    user's loss takes the labels; they are not checked.
    """
    pixels = images.images if isinstance(images, Batch) else images
    for name, tensor in {"theta": theta, "images": pixels, "labels": labels, **directions}.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"`{name}`: expected a tensor, found {type(tensor).__name__}")
        if tensor.device != theta.device:
            raise InputError(f"`{name}`: expected the device of theta, {theta.device}, found {tensor.device}")
        if tensor.requires_grad:
            raise InputError(f"`{name}`: expected a tensor without a graph, found one that requires grad; detach it")
    _check_vector("theta", theta, network, (torch.float32, torch.float64))
    for name, direction in directions.items():
        _check_vector(name, direction, network, (theta.dtype,))
    _check_images(images, pixels, network)
    if label_kind is not None:
        check_labels(labels, label_kind, len(images), network.num_classes, theta.dtype)


def check_saved(saved: Any, network: ConvNet, images: Inputs) -> None:
    """Raise `InputError` unless `saved` is None, or activations of `network` for as many images that have not been used yet.

    They are a list: the scale of the cotangents, then for each block, the last one first, its activations and p̄ (b, …).
    """
    if saved is None:
        return
    found = type(saved).__name__
    if isinstance(saved, list) and len(saved) == network.depth + 1:
        _, p_bar = saved[1]
        if len(p_bar) == len(images):
            return
        found = f"those of {len(p_bar)}"
    elif isinstance(saved, list):
        found = "consumed ones"
    raise InputError(
        f"`saved`: expected activations of `gradient` for these {len(images)} images, found {found}; call it again with save"
    )


def _check_vector(name: str, vector: Tensor, network: ConvNet, dtypes: tuple[torch.dtype, ...]) -> None:
    if vector.shape != (network.num_parameters,) or vector.dtype not in dtypes or not vector.is_contiguous():
        raise InputError(
            f"`{name}`: expected the network's ({network.num_parameters},) parameters, contiguous, "
            f"{' or '.join(map(dtype_name, dtypes))}, found {_found(vector)}"
        )


def _check_images(images: Inputs, pixels: Tensor, network: ConvNet) -> None:
    if pixels.dim() != 4 or not len(images) or images.shape[1] != network.in_channels or not pixels.is_floating_point():
        raise InputError(
            f"`images`: expected floating-point numbers (b, {network.in_channels}, H, W), at least one image, found {_found(pixels)}"
        )
    if network.feature_size_of(*images.shape[2:]) != network.feature_size:
        raise InputError(f"`images`: expected the network's size {network.image_size}, found {tuple(images.shape[2:])}")


def check_labels(labels: Tensor, kind: LabelKind, count: int, classes: int, dtype: torch.dtype) -> None:
    """Raise `InputError` unless `labels` are int64 class indices (count,), or soft labels (count, classes) of `dtype`.

    The values of indices are checked only on a CPU, since a check would synchronise with a GPU.
    """
    shape, expected = ((count,), torch.int64) if kind == "indices" else ((count, classes), dtype)
    if labels.shape != shape or labels.dtype != expected:
        raise InputError(f"`labels`: expected {kind} {shape}, {dtype_name(expected)}, found {_found(labels)}")
    if kind == "indices" and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"`labels`: expected class indices 0 … {classes - 1}, found {int(labels.min())} … {int(labels.max())}"
        )


def _found(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}{strides}"
