"""Add up the partial sums of a convolution, in the kernel that reads the planes first, or in a separate kernel."""

from __future__ import annotations

from torch import Tensor

from ..types import Convolved, PartialPlanes, planes_of
from .launch import launch, tl, triton

_BLOCK = 512  # elements of a program


@triton.jit
def load_planes(
    planes: tl.tensor,  # pointer
    parts: tl.tensor | None,  # pointer to the first of COUNT parts; offsets are those of the planes
    offsets: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor | None,  # elements of a part, which is the step from part to part
    COUNT: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,  # parts that are loaded at the same time: a divisor of COUNT
) -> tl.tensor:
    """Return elements of planes at `offsets`, zero where masked.

    Where there are parts, add them up in their order in float32, and round the sum to the planes' dtype. The sum is not stored
    here: loads that follow a store would wait for it.
    """
    if parts is None:
        value = tl.load(planes + offsets, mask, 0)
    else:
        total = tl.zeros(offsets.shape, tl.float32)
        for _ in range(COUNT // PARTS_AT_ONCE):
            for _ in tl.static_range(PARTS_AT_ONCE):
                total += tl.load(parts + offsets, mask, 0)
                parts += size
        value = total.to(planes.dtype.element_ty)
    return value


@triton.jit
def _add_planes(parts: tl.tuple, planes: tl.tuple, size: tl.tensor, COUNTS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Store the sums of the parts in the planes, BLOCK elements of each."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    for number in tl.static_range(len(COUNTS)):
        value = load_planes(planes[number], parts[number], offsets, mask, size, COUNTS[number], COUNTS[number])
        tl.store(planes[number] + offsets, value, mask)


def add_planes(*planes: Convolved) -> tuple[Tensor, ...]:
    """See `mtt_fast.kernels.add_planes`."""
    partial = [each for each in planes if isinstance(each, PartialPlanes)]
    if partial:
        size = partial[0].planes.numel()
        launch(
            _add_planes,
            triton.cdiv(size, _BLOCK),
            tuple(each.parts for each in partial),
            tuple(each.planes for each in partial),
            size,
            COUNTS=tuple(len(each.parts) for each in partial),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return tuple(map(planes_of, planes))


def add_pair(planes: Convolved, planes_dot: Convolved | None) -> tuple[Tensor, Tensor | None]:
    """Return `planes` and `planes_dot`, which may be None, as tensors: partial sums are added up."""
    first, *second = add_planes(planes) if planes_dot is None else add_planes(planes, planes_dot)
    return first, second[0] if second else None


def part_arguments(planes: Convolved, planes_dot: Convolved | None) -> tuple[Tensor | int | None, ...]:
    """Return the arguments of a kernel that adds up both: their parts, or None for tensors, and the elements of a part, or None."""
    parts = [each.parts if isinstance(each, PartialPlanes) else None for each in (planes, planes_dot)]
    return *parts, None if parts[0] is parts[1] is None else planes_of(planes).numel()


def part_counts(planes: Convolved, planes_dot: Convolved | None) -> dict[str, int]:
    """Return COUNT and COUNT_DOT of a kernel that adds up both: their numbers of parts, or 0 for tensors."""
    counts = [len(each.parts) if isinstance(each, PartialPlanes) else 0 for each in (planes, planes_dot)]
    return dict(zip(("COUNT", "COUNT_DOT"), counts, strict=True))
