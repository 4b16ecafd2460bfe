"""Pack the weights of convolutions in the layouts and the dtype in which matrix products read them.

The terms of a sum become adjacent in memory. A second copy is rotated by 180° for the input gradient. One kernel packs all
weights of a step and of its direction. If planes are float16, it scales the direction too. It can also make the patches of the
step's images, in separate programs, so that a step begins with one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import (
    HALF_PRECISIONS,
    BatchImages,
    PackedParameters,
    PackedWeight,
    Precision,
    Weight,
    WeightPlace,
    plane_dtype,
)
from .block import gathering_of
from .configurations import configuration
from .launch import architecture, launch, tl, triton
from .patches import gather
from .powers import largest_parts, power_of_two_from_parts

_ALIGNMENT = 64  # elements: each copy begins at a multiple of 128 bytes, as TMA descriptors need it


@triton.jit
def _pack_weights(
    vector: tl.tensor,  # (P,)
    packed: tl.tensor,  # for each weight: (K, 3, 3, C), then (C, 3, 3, K) rotated by 180°
    factor: tl.tensor,
    program: tl.tensor,
    WEIGHTS: tl.constexpr,  # offset in the vector, offset in `packed`, K, C, elements of a copy
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Pack FILTERS × CHANNELS 3×3 weights, one program's tile, wide enough for coalesced loads and stores."""
    first = 0
    for weight in tl.static_range(len(WEIGHTS)):
        source, target, filters, channels, apart = WEIGHTS[weight]
        across = (channels + CHANNELS - 1) // CHANNELS
        end = first + (filters + FILTERS - 1) // FILTERS * across
        if (program >= first) & (program < end):
            filter = (program - first) // across * FILTERS + tl.arange(0, FILTERS)[:, None, None]
            channel = (program - first) % across * CHANNELS + tl.arange(0, CHANNELS)[None, :, None]
            tap = tl.arange(0, 16)[None, None, :]
            mask = (filter < filters) & (channel < channels) & (tap < 9)
            value = tl.load(vector + source + (filter * channels + channel) * 9 + tap, mask, 0) * factor
            value = value.to(packed.dtype.element_ty)
            tl.store(packed + target + (filter * 9 + tap) * channels + channel, value, mask)
            tl.store(packed + target + apart + (channel * 9 + 8 - tap) * filters + filter, value, mask)
        first = end


# `index` and `parameters` of a step have any alignment, and single loads read them
@triton.jit(do_not_specialize_on_alignment=["index", "parameters"])
def _pack(
    theta: tl.tensor,  # (P,)
    packed: tl.tensor,
    direction: tl.tensor | None,  # (P,)
    packed_dot: tl.tensor | None,
    partials: tl.tensor | None,  # (PARTIALS,): largest magnitudes of the direction
    scaled: tl.tensor | None,  # (P,)
    scale: tl.tensor | None,  # ()
    size: tl.tensor,  # P
    x: tl.tensor | None,  # this and the next six arguments are those of `gather`
    index: tl.tensor | None,
    parameters: tl.tensor | None,
    images: tl.tensor | None,
    gram: tl.tensor | None,
    parts: tl.tensor | None,
    tiles: tl.tensor | None,
    gathers: tl.tensor,  # programs that gather patches
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,  # of all weights together
    LARGEST: tl.constexpr,
    PARTIALS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    PATCHES: tl.constexpr,  # a `PatchSizes`, or None
) -> None:
    """Gather patches in the first programs, pack weights in the next TILES, those of a direction in TILES more.

    All others scale the direction.
    """
    program = tl.program_id(0) - gathers
    if program < 0:
        if PATCHES is not None:
            PRECISION: tl.constexpr = PATCHES.PRECISION  # Triton 3.6 takes no string out of a tuple as an argument
            gather(
                x,
                index,
                parameters,
                images,
                gram,
                parts,
                tiles,
                C=PATCHES.C,
                H=PATCHES.H,
                W=PATCHES.W,
                PADDING=PATCHES.PADDING,
                CHANNELS_LAST=PATCHES.CHANNELS_LAST,
                TERMS=PATCHES.TERMS,
                PRECISION=PRECISION,
                BLOCK_C=PATCHES.BLOCK_C,
                BLOCK_M=PATCHES.BLOCK_M,
                ELEMENTS=PATCHES.ELEMENTS,
            )
    elif program < TILES:
        _pack_weights(theta, packed, 1.0, program, WEIGHTS, FILTERS, CHANNELS)
    elif direction is not None:
        factor = 1.0
        if partials is not None:
            factor = power_of_two_from_parts(partials, LARGEST, PARTIALS)
        if program < 2 * TILES:
            _pack_weights(direction, packed_dot, factor, program - TILES, WEIGHTS, FILTERS, CHANNELS)
        elif partials is not None:
            offsets = (program - 2 * TILES) * SIZE + tl.arange(0, SIZE)
            tl.store(scaled + offsets, tl.load(direction + offsets, offsets < size, 0) * factor, offsets < size)
            if program == 2 * TILES:
                tl.store(scale, factor)


def pack_parameters(
    theta: Tensor,
    direction: Tensor | None,
    places: Sequence[WeightPlace],
    precision: Precision,
    largest: float,
    batch: BatchImages | None = None,
) -> PackedParameters:
    """See `mtt_fast.kernels.pack_parameters`."""
    row = configuration("pack_parameters", architecture(theta.device), "")
    dtype = plane_dtype(theta.dtype, precision)
    shapes = _lay_out(places)
    total = sum(2 * apart for *_, apart in shapes)
    packed = torch.empty(total, dtype=dtype, device=theta.device)
    packed_dot = partials = scaled = scale = None
    if direction is not None:
        packed_dot = torch.empty_like(packed)
        if dtype == torch.float16:
            partials = largest_parts(direction)
            scaled, scale = torch.empty_like(direction), theta.new_empty(())
    tiles = sum(triton.cdiv(k, row["FILTERS"]) * triton.cdiv(c, row["CHANNELS"]) for _, _, k, c, _ in shapes)
    programs = tiles if direction is None else 2 * tiles
    if scaled is not None:
        programs += triton.cdiv(theta.numel(), row["SIZE"])
    parts = 0 if partials is None else partials.numel()
    constants: dict[str, Any] = {"TILES": tiles, "LARGEST": largest, "PARTIALS": parts, "PATCHES": None, **row}
    patches, gathers, patch_arguments = None, 0, (None,) * 7
    if batch is not None:
        patches, gathers, patch_arguments, constants["PATCHES"], options = gathering_of(batch, precision)
        constants |= options
    tensors = (theta, packed, direction, packed_dot, partials, scaled, scale)
    launch(_pack, gathers + programs, *tensors, theta.numel(), *patch_arguments, gathers, WEIGHTS=shapes, **constants)
    moved = direction if scaled is None else scaled
    weights_dot = () if moved is None or packed_dot is None else _views(moved, packed_dot, shapes)
    return PackedParameters(_views(theta, packed, shapes), weights_dot, moved, scale, patches)


def straight(weights: tuple[Weight, ...], planes: Tensor, precision: Precision) -> list[Tensor]:
    """Return one or two weights as (K, 3, 3, C), in the dtype in which they are multiplied with `planes`."""
    return [weight.straight for weight in _pack_missing(weights, planes, precision)]


def rotated(weights: tuple[Weight, ...], planes: Tensor, precision: Precision) -> list[Tensor]:
    """Return one or two weights as those of the input gradient: (C, 3, 3, K), each 3×3 rotated by 180°."""
    return [weight.rotated for weight in _pack_missing(weights, planes, precision)]


def _pack_missing(weights: tuple[Weight, ...], planes: Tensor, precision: Precision) -> list[PackedWeight]:
    """Return the weights packed. Each weight that is not packed yet is packed by a kernel."""
    by_planes = next((name for name, dtype in HALF_PRECISIONS.items() if dtype == planes.dtype), precision)
    return [weight if isinstance(weight, PackedWeight) else _pack_one(weight, by_planes) for weight in weights]


def _pack_one(weight: Tensor, precision: Precision) -> PackedWeight:
    """Return one weight (K, C, 3, 3) packed, by a separate kernel launch."""
    place = WeightPlace(0, weight.shape[0], weight.shape[1])
    (packed,) = pack_parameters(weight.flatten(), None, (place,), precision, 1.0).weights
    assert isinstance(packed, PackedWeight)
    return packed


def _lay_out(places: Sequence[WeightPlace]) -> tuple[tuple[int, int, int, int, int], ...]:
    """Return for each weight its offset in the vector, its offset in the packed memory, K, C, and the elements of a copy."""
    shapes, begin = [], 0
    for offset, filters, channels in places:
        room = triton.cdiv(9 * filters * channels, _ALIGNMENT) * _ALIGNMENT
        shapes.append((offset, begin, filters, channels, room))
        begin += 2 * room
    return tuple(shapes)


def _views(
    vector: Tensor, packed: Tensor, shapes: tuple[tuple[int, int, int, int, int], ...]
) -> tuple[PackedWeight, ...]:
    """Return each weight as a view of `vector`, with views of its copies in `packed`."""
    views = []
    for offset, begin, filters, channels, room in shapes:
        numbers = 9 * filters * channels
        views.append(
            PackedWeight(
                vector.narrow(0, offset, numbers).view(filters, channels, 3, 3),
                packed.narrow(0, begin, numbers).view(filters, 3, 3, channels),
                packed.narrow(0, begin + room, numbers).view(channels, 3, 3, filters),
            )
        )
    return tuple(views)
