"""Lay out a convolution's weights as its products read them, in one kernel: a sum's terms side by side, rotated, rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import HALF_PRECISIONS, Precision
from .launch import launch, tl, triton

_SIZE = 1024


@triton.jit
def _pack(
    weight: tl.tensor,  # (K, C, 3, 3)
    weight_dot: tl.tensor | None,
    packed: tl.tensor,  # (K, 3, 3, C), or ROTATED (C, 3, 3, K)
    packed_dot: tl.tensor | None,
    K: tl.constexpr,
    C: tl.constexpr,
    ROTATED: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    INNER: tl.constexpr = K if ROTATED else C
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    exists = place < 9 * K * C
    inner, tap, outer = place % INNER, place // INNER % 9, place // (9 * INNER)
    source = (inner * C + outer) * 9 + (8 - tap) if ROTATED else (outer * C + inner) * 9 + tap
    tl.store(packed + place, tl.load(weight + source, exists).to(packed.dtype.element_ty), exists)
    if weight_dot is not None:
        tl.store(packed_dot + place, tl.load(weight_dot + source, exists).to(packed.dtype.element_ty), exists)


def pack(weights: tuple[Tensor, ...], planes: Tensor, precision: Precision, *, rotated: bool = False) -> list[Tensor]:
    """Return one or two `weights` (K, C, 3, 3) as (K, 3, 3, C), in the dtype in which they are multiplied with `planes`.

    With `rotated` they are those of the input gradient: (C, 3, 3, K), each 3×3 rotated by 180°.
    """
    filters, channels, *_ = weights[0].shape
    shape = (channels, 3, 3, filters) if rotated else (filters, 3, 3, channels)
    dtype = HALF_PRECISIONS.get(precision, planes.dtype) if planes.dtype == torch.float32 else planes.dtype
    packed = [torch.empty(shape, dtype=dtype, device=planes.device) for _ in weights]
    first, second = [*weights, None][:2], [*packed, None][:2]
    programs = triton.cdiv(packed[0].numel(), _SIZE)
    launch(_pack, programs, *first, *second, K=filters, C=channels, ROTATED=rotated, SIZE=_SIZE)
    return packed
