"""Check the arguments of the operations. Each check raises a `ValueError` that names the operation and the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .types import (
    WARP_PARAMETERS,
    BatchGradient,
    BatchImages,
    Convolved,
    LabelKind,
    PartialPlanes,
    PartialSums,
    Weight,
    accumulator,
    memory_format,
    planes_of,
    weight_of,
)


def check_vectors(op: str, vectors: dict[str, Tensor | PartialSums | None], scalars: dict[str, Tensor]) -> None:
    """Raise `ValueError` unless vectors have the size, dtype and device of the first one that is a tensor, and scalars its dtype and device."""
    given = {name: vector for name, vector in vectors.items() if isinstance(vector, Tensor)}
    first = next(iter(given.values()))
    check_tensors(op, first, given, (first.numel(),))
    check_tensors(op, first, scalars, ())
    for name, vector in vectors.items():
        if isinstance(vector, PartialSums):
            check_partial_sums(op, name, vector, first)
            size = sum(piece.shape[1:].numel() for piece in vector.pieces)
            if size != first.numel():
                raise ValueError(f"{op}: expected {name} of {first.numel()} numbers, found pieces of {size}")


def check_partial_sums(op: str, name: str, sums: PartialSums, first: Tensor) -> None:
    """Raise `ValueError` unless the pieces and divisors of partial sums have the dtype and device of `first`.

    Each summand must be contiguous, or channels_last if it is a weight.
    """
    for divisor in sums.divisors:
        check_tensors(op, first, {f"a divisor of {name}": divisor}, ())
    for piece in sums.pieces:
        summand = piece.new_empty(0) if len(piece) == 0 else piece[0]
        as_channels_last = summand.permute(0, 2, 3, 1) if summand.dim() == 4 else summand
        if piece.dtype != first.dtype or piece.device != first.device:
            raise ValueError(
                f"{op}: expected {name} of {first.dtype} on {first.device}, found {piece.dtype} on {piece.device}"
            )
        check_plain(op, name, piece)
        if not (summand.is_contiguous() or as_channels_last.is_contiguous()):
            raise ValueError(
                f"{op}: expected summands of {name} contiguous or channels_last, found strides {piece.stride()}"
            )


def check_planes(
    op: str,
    y: Tensor,
    planes: Mapping[str, Convolved],
    channels: dict[str, Tensor],
    stats: dict[str, Tensor] | None = None,
    pooled: Mapping[str, Convolved] | None = None,
) -> None:
    """Raise `ValueError` unless the arguments of a plane operation fit `y` (B, C, H, W) in shape, dtype, device and memory format.

    `planes` are like `y`, `channels` are (C,), `stats` (B, C), and `pooled` (B, C, H//2, W//2).
    """
    pooled = pooled or {}
    if y.dim() != 4 or min(y.shape[:2]) < 1 or min(y.shape[2:]) < 2:
        raise ValueError(f"{op}: expected y (B, C, H, W) of at least 2×2 pixels, found {tuple(y.shape)}")
    batch, channel_count, height, width = y.shape
    check_tensors(op, y, {name: planes_of(each) for name, each in planes.items()}, y.shape, like_format=y)
    check_tensors(op, y, channels, (channel_count,), dtype=accumulator(y.dtype))
    check_tensors(op, y, stats or {}, (batch, channel_count), dtype=accumulator(y.dtype))
    bars = {name: planes_of(each) for name, each in pooled.items()}
    check_tensors(op, y, bars, (batch, channel_count, height // 2, width // 2), like_format=y)
    for name, each in (*planes.items(), *pooled.items()):
        check_parts(op, name, each)


def check_parts(op: str, name: str, planes: Convolved) -> None:
    """Raise `ValueError` unless partial planes have at least one part, float32, of the planes' shape, device and memory format."""
    if isinstance(planes, PartialPlanes):
        if planes.parts.dim() != 5 or len(planes.parts) < 1:
            raise ValueError(f"{op}: expected parts of {name} (S, B, C, H, W), found {tuple(planes.parts.shape)}")
        first = {f"a part of {name}": planes.parts[0]}
        check_tensors(op, planes.planes, first, planes.planes.shape, like_format=planes.planes, dtype=torch.float32)
        if planes.parts.stride(0) != planes.planes.numel() and len(planes.parts) > 1:
            raise ValueError(
                f"{op}: expected parts of {name} one after the other, found strides {planes.parts.stride()}"
            )


def check_convolution(
    op: str, padding: int, inputs: dict[str, Tensor], weights: dict[str, Weight], channel_axis: int
) -> None:
    """Raise `ValueError` unless the inputs and the weights of a convolution fit.

    `channel_axis` is the axis of the weights that has the inputs' channels: 1, or 0 for the gradient of the input.
    """
    plain = {name: weight_of(each) for name, each in weights.items()}
    first, weight = next(iter(inputs.values())), next(iter(plain.values()))
    if (
        first.dim() != 4
        or weight.dim() != 4
        or weight.shape[2:] != (3, 3)
        or weight.shape[channel_axis] != first.shape[1]
        or min(len(first), *weight.shape[:2]) < 1
    ):
        raise ValueError(
            f"{op}: expected (B, C, H, W) and 3×3 weights of as many channels, at least one sample, channel and filter, "
            f"found {tuple(first.shape)}, {tuple(weight.shape)}"
        )
    growth = 2 * (padding - 1) * (1 if channel_axis == 1 else -1)
    if padding < 0 or min(first.shape[2:]) + growth < 1:
        raise ValueError(f"{op}: padding {padding} leaves nothing of {tuple(first.shape)}")
    check_tensors(op, first, inputs, first.shape, like_format=first)
    check_tensors(op, first, plain, weight.shape, dtype=accumulator(first.dtype))


def check_correlation(op: str, padding: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    """Raise `ValueError` unless the `inputs` of a weight gradient, one of them named "x", fit its `outputs`, shaped as convolutions of x."""
    x, y = inputs["x"], next(iter(outputs.values()))
    if x.dim() != 4 or y.dim() != 4 or min(*x.shape[:2], y.shape[1]) < 1:
        raise ValueError(
            f"{op}: expected (B, C, H, W) tensors of at least one sample and channel, "
            f"found {tuple(x.shape)}, {tuple(y.shape)}"
        )
    check_tensors(op, x, inputs, x.shape, like_format=x)
    out_shape = (len(x), y.shape[1], *(side + 2 * padding - 2 for side in x.shape[2:]))
    check_tensors(op, x, outputs, out_shape, like_format=y)


def check_classifier(
    op: str,
    planes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    labels: Tensor,
    label_kind: LabelKind,
    scales: dict[str, Tensor | None] | None = None,
) -> None:
    """Raise `ValueError` unless the arguments of a classifier fit the first of its planes (B, C, h, w) and of its biases (K,)."""
    first = planes[0]
    if label_kind not in get_args(LabelKind):
        raise ValueError(f"{op}: expected label_kind {', '.join(get_args(LabelKind))}, found {label_kind!r}")
    if first.dim() != 4 or first.numel() < 1 or biases[0].dim() != 1 or len(biases[0]) < 1:
        raise ValueError(
            f"{op}: expected p (B, C, h, w) and bias (K,) of at least one sample, feature and class, "
            f"found {tuple(first.shape)}, {tuple(biases[0].shape)}"
        )
    batch, classes, width = len(first), len(biases[0]), first[0].numel()
    dtype = accumulator(first.dtype)
    given = {name: scale for name, scale in (scales or {}).items() if scale is not None}
    check_tensors(op, first, {"p": first, "p_dot": planes[-1]}, first.shape, like_format=first)
    check_tensors(op, first, {"weight": weights[0], "weight_dot": weights[-1]}, (classes, width), dtype=dtype)
    check_tensors(op, first, {"bias": biases[0], "bias_dot": biases[-1]}, (classes,), dtype=dtype)
    check_tensors(op, first, given, (), dtype=dtype)
    if "scale" in given and first.dtype != torch.float16:
        raise ValueError(f"{op}: expected a scale only for planes of float16, found one for {first.dtype}")
    if label_kind != "indices":
        check_tensors(op, first, {label_kind: labels}, (batch, classes), dtype=dtype)
        return
    if labels.shape != (batch,) or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(
            f"{op}: expected int64 indices ({batch},), contiguous, found {labels.dtype} of shape {tuple(labels.shape)}"
        )
    check_plain(op, "labels", labels)
    if labels.device != first.device:
        raise ValueError(f"{op}: expected one device, found indices on {labels.device} and {first.device}")
    # on an accelerator the look-up itself checks, without a synchronisation
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{op}: expected indices 0 … {classes - 1}, found {int(labels.min())} … {int(labels.max())}")


def check_index(op: str, index: Tensor, count: int, rows: Tensor) -> None:
    """Raise `ValueError` unless `index` is int64 (count,) on the device of `rows`, and on a CPU its values are rows.

    On an accelerator the values are not checked, since that would synchronise.
    """
    if index.shape != (count,) or index.dtype != torch.int64 or index.device != rows.device:
        raise ValueError(
            f"{op}: expected int64 indices ({count},) on {rows.device}, found {index.dtype} of shape "
            f"{tuple(index.shape)} on {index.device}"
        )
    check_plain(op, "index", index)
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(rows):
        raise ValueError(f"{op}: expected indices 0 … {len(rows) - 1}, found {int(index.min())} … {int(index.max())}")


def check_warp(op: str, name: str, images: Tensor, parameters: Tensor) -> None:
    """Raise `ValueError` unless the images (B, C, H, W) of a warp, which the operation calls `name`, and its parameters fit."""
    if images.dim() != 4 or min(images.shape[1:]) < 1:
        raise ValueError(f"{op}: expected {name} (B, C, H, W), found {tuple(images.shape)}")
    check_tensors(op, images, {name: images}, images.shape)
    check_warp_parameters(op, parameters, len(images), images)


def check_batch_images(op: str, batch: BatchImages) -> None:
    """Raise `ValueError` unless the images of a batch fit the first block in shape, dtype, device and memory format, and on a CPU in the indices."""
    x, padding, indices, warp = batch
    if x.dim() != 4 or padding < 0 or min(x.shape[:2]) < 1 or min(x.shape[2:]) + 2 * padding < 4:
        raise ValueError(
            f"{op}: expected images (B, C, H, W) of at least 4×4 pixels with their padding, "
            f"found {tuple(x.shape)} and padding {padding}"
        )
    if accumulator(x.dtype) != x.dtype:
        raise ValueError(f"{op}: expected float32 or float64 images, found {x.dtype}")
    check_tensors(op, x, {"x": x}, x.shape, like_format=x if warp is None else None)
    if indices is not None:
        check_index(op, indices, indices.numel(), x)
        if not len(indices):
            raise ValueError(f"{op}: expected at least one index, found none")
    if warp is not None:
        check_warp_parameters(op, warp, len(x) if indices is None else len(indices), x)


def check_batch_gradient(op: str, batch: BatchGradient, scale: Tensor) -> None:
    """Raise `ValueError` unless the gradient of a batch can, times `scale` (), be added to the gradient of all images."""
    out, indices, y_bar, warp = batch
    if y_bar.dim() != 4 or min(y_bar.shape[1:]) < 1:
        raise ValueError(f"{op}: expected y_bar (B, C, H, W), found {tuple(y_bar.shape)}")
    check_tensors(op, y_bar, {"y_bar": y_bar}, y_bar.shape)
    check_tensors(op, y_bar, {"out": out}, (len(out), *y_bar.shape[1:]))
    check_tensors(op, y_bar, {"scale": scale}, ())
    check_index(op, indices, len(y_bar), out)
    if warp is not None:
        check_warp_parameters(op, warp, len(y_bar), y_bar)


def check_warp_parameters(op: str, parameters: Tensor, count: int, images: Tensor) -> None:
    """Raise `ValueError` unless the parameters (count, 13) of warps fit `images`; on a CPU each warp must be invertible."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=images.device)
    check_tensors(op, like, {"parameters": parameters}, (count, len(WARP_PARAMETERS)))
    if parameters.device.type == "cpu":
        column = dict(zip(WARP_PARAMETERS, parameters.unbind(1), strict=True))
        determinant = (1 + column["row_by_row"]) * (1 + column["column_by_column"])
        determinant = determinant - column["row_by_column"] * column["column_by_row"]
        if not bool((determinant.abs() > 0).all()):
            raise ValueError(
                f"{op}: expected warps that have an inverse, found determinants down to {determinant.abs().min()}"
            )


def check_tensors(
    op: str,
    first: Tensor,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    like_format: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise `ValueError` unless each of `tensors` has `shape`, the device of `first`, and no graph.

    Its dtype is `dtype`, or that of `first`. Its memory format is that of `like_format`; without one it is contiguous.
    """
    dtype = dtype or first.dtype
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}, found {tuple(tensor.shape)}")
        if tensor.dtype != dtype or not tensor.is_floating_point():
            raise ValueError(f"{op}: expected {name} of floating dtype {dtype}, found {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: expected one device, found {name} on {tensor.device} and {first.device}")
        check_plain(op, name, tensor)
        try:
            expected = torch.contiguous_format if like_format is None else memory_format(like_format)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
        if not tensor.is_contiguous(memory_format=expected):
            raise ValueError(f"{op}: expected {name} {str(expected)[6:]}, found strides {tensor.stride()}")


def check_plain(op: str, name: str, tensor: Tensor) -> None:
    """Raise `ValueError` unless compiled code can read the values of `tensor` from its memory.

    Compiled code ignores autograd, transforms of torch.func and negative views, so its result would be silently wrong.
    """
    if tensor.requires_grad or _has_tangent(tensor):
        found = "that requires grad" if tensor.requires_grad else "with a tangent of forward mode"
        raise ValueError(f"{op}: is not differentiable, found {name} {found}; detach it")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(f"{op}: expected a plain tensor, found {name} of a transform of torch.func; call without it")
    if not _has_memory(tensor):
        raise ValueError(f"{op}: expected a plain tensor, found {name} of the subclass {type(tensor).__name__}")
    if tensor.is_neg():
        raise ValueError(f"{op}: expected a plain tensor, found {name} that is a negative view; use .resolve_neg()")


def _has_memory(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` are at its address; those of a tensor subclass may not be."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _has_tangent(tensor: Tensor) -> bool:
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode and forward_ad.unpack_dual(tensor).tangent is not None
