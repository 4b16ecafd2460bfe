"""Operations on flat vectors of parameters: a step of SGD, its adjoint, distance, packing of weights; and `index_add`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_batch_gradient,
    check_batch_images,
    check_index,
    check_partial_sums,
    check_plain,
    check_tensors,
    check_vectors,
)
from ..types import BatchGradient, BatchImages, PackedParameters, PartialSums, Precision, WeightPlace


def add_up(sums: PartialSums) -> Tensor:
    """Return the vector (P,) of partial sums, divided by their `divisors`.

    The pieces (S, …) are of one floating dtype and device. Each summand is contiguous, or, of weights (S, K, C, 3, 3),
    channels_last. Raises `ValueError` for anything else.
    """
    check_partial_sums("add_up", "sums", sums, sums.pieces[0])
    vector: Tensor = dispatch.implementation_of("add_up", sums.pieces[0])(sums)
    return vector


def sgd_step(
    theta: Tensor,
    gradient: Tensor | PartialSums,
    lr: Tensor,
    out: Tensor,
    velocity: Tensor | None = None,
    velocity_out: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """Write θ − `lr` · u to `out` and return it, with u = `momentum` · `velocity` + `gradient` + `weight_decay` · θ.

    That is a step of torch.optim.SGD. The new velocity u is written to `velocity_out` unless that is None. A `velocity` of None
    means zero. `theta` and the other vectors (P,), contiguous, and `lr` () are of one floating dtype and device. `out` may be
    `theta`, and `velocity_out` may be `velocity`. `gradient` may be partial sums, as `add_up` takes them. Raises `ValueError` for
    anything else.
    """
    vectors = {"theta": theta, "gradient": gradient, "out": out, "velocity": velocity, "velocity_out": velocity_out}
    check_vectors("sgd_step", vectors, {"lr": lr})
    arguments = (theta, gradient, lr, out, velocity, velocity_out, momentum, weight_decay)
    return dispatch.implementation_of("sgd_step", theta)(*arguments)  # type: ignore[no-any-return]


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor | PartialSums,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None = None,
    weight_decay: float = 0.0,
    batch: BatchGradient | None = None,
) -> Tensor:
    """Write λ + `scale` · (H v + `weight_decay` · v) + `incoming` to `out` and return it: the adjoint of `sgd_step`.

    λ is `adjoint`, the adjoint of the parameters after the step, and v is `direction`. An `incoming` of None means zero.
    `adjoint` and the other vectors (P,), contiguous, and `scale` () are of one floating dtype and device. `out` may be any of
    them but `hessian_v`, which a GPU reads in another order. `hessian_v` may be partial sums, as `add_up` takes them.

    With a `batch`, `scale` · Aᵀ ȳ of each sample is added in place to the sample's row of the gradient of all images (Aᵀ:
    `colour_warp_mask_transpose`). An index may repeat; its rows are added in their order, so the result is deterministic. On a
    GPU the same launch computes both, and an index out of range is not detected, since the check would synchronise. Raises
    `ValueError` for anything else.
    """
    vectors = {"adjoint": adjoint, "hessian_v": hessian_v, "direction": direction, "out": out, "incoming": incoming}
    check_vectors("adjoint_step", vectors, {"scale": scale})
    if batch is not None:
        check_batch_gradient("adjoint_step", batch, scale)
        batch = batch._replace(indices=batch.indices.contiguous())
    arguments = (adjoint, hessian_v, direction, scale, out, incoming, weight_decay, batch)
    return dispatch.implementation_of("adjoint_step", adjoint)(*arguments)  # type: ignore[no-any-return]


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a − b|², accumulated in float64, as a float64 scalar on the device of `a`.

    `a`, `b`: (P,), contiguous, of one device and one of float32, float64, bfloat16. The native result
    does not depend on the number of threads. Raises `ValueError` for anything else, and for a tensor that requires grad.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(
            f"squared_distance: expected two vectors of one size, found {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"squared_distance: expected one of float32, float64, bfloat16, found {a.dtype}, {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"squared_distance: expected one device, found {a.device} and {b.device}")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"squared_distance: expected contiguous vectors, found strides {a.stride()}, {b.stride()}")
    for name, vector in (("a", a), ("b", b)):
        check_plain("squared_distance", name, vector)
    distance: Tensor = dispatch.implementation_of("squared_distance", a)(a, b)
    return distance


def index_add(out: Tensor, index: Tensor, rows: Tensor, alpha: float = 1.0) -> Tensor:
    """Add `alpha` · `rows` to the rows `index` of `out`, in place, and return `out`: torch.Tensor.index_add_ along axis 0.

    `out` (n, …) and `rows` (b, …), contiguous, of one shape after the first axis, `index` (b,) int64, 0 … n − 1; all on one
    device, `out` and `rows` of one floating dtype. An index may repeat; its rows are added in their order, so the result is
    deterministic. Raises `ValueError` for anything else, but not for an index out of range on a GPU, since the check would
    synchronise.
    """
    check_tensors("index_add", out, {"out": out}, out.shape)
    check_tensors("index_add", out, {"rows": rows}, (len(rows), *out.shape[1:]))
    check_index("index_add", index, len(rows), out)
    result: Tensor = dispatch.implementation_of("index_add", out)(out, index.contiguous(), rows, alpha)
    return result


def pack_parameters(
    theta: Tensor,
    direction: Tensor | None,
    places: Sequence[WeightPlace],
    precision: Precision,
    largest: float = 1.0,
    batch: BatchImages | None = None,
) -> PackedParameters:
    """Return the weights at `places` of `theta` (P,), and of a `direction` (P,), in the layout that the convolutions read.

    The weights are rounded to the dtype of the planes (`plane_dtype`). If that is float16, the direction is first scaled by a
    power of two such that its largest magnitude is in [`largest` / 2, `largest`), where `largest` is a power of two. The exponent
    of the scale is at most 60, so that the product of two scales is finite in float32. The scale is 1 if all values are zero, or
    any is not finite. The vectors are contiguous, float32 or float64, on one device.

    With a `batch` of images, of the dtype and device of `theta`, their patches are returned too, as by `image_patches`. On a GPU
    the same launch computes both. Raises `ValueError` for anything else.
    """
    if theta.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"pack_parameters: expected float32 or float64, found {theta.dtype}")
    check_vectors("pack_parameters", {"theta": theta, "direction": direction}, {})
    if batch is not None:
        check_batch_images("pack_parameters", batch)
        check_tensors("pack_parameters", theta, {"x": batch.x}, batch.x.shape, like_format=batch.x)
        batch = batch if batch.indices is None else batch._replace(indices=batch.indices.contiguous())
    implementation = dispatch.implementation_of("pack_parameters", theta, precision)
    packed: PackedParameters = implementation(theta, direction, places, largest=largest, batch=batch)
    return packed
