"""Hold Triton's warps and their transposes to the reference: a family of triton_comparison.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtt_fast.kernels import BatchGradient
from tests.kernels.comparison import Case, check

# (B, C, H, W): one channel, blocks of pixels that are not whole, more channels than an image's, a line of pixels, and as many
# numbers as a mean adds up in several turns
IMAGES = [(2, 1, 5, 6), (4, 3, 19, 17), (2, 5, 4, 3), (1, 3, 1, 8), (2, 3, 27, 26)]
LARGE_IMAGES = [(4, 3, 32, 32), (4, 3, 128, 128), (4, 1, 28, 28), (3, 3, 33, 63)]


def warp_rows(shape: tuple[int, int, int, int]) -> Tensor:
    """Return parameters for at most four samples: a turn, all at once, none, and a whole displacement under a mask."""
    batch, _, height, width = shape
    rotated = [0, 0, 0, -0.03, 0.26, 0, -0.26, -0.03, 0, 0, 0, 0, 0]
    everything = [0.3, -0.4, 0.5, -0.16, 0.1, 0.7, -0.2, 0.2, -1.3, 1, 3, 0, 2]
    shifted = [0, 0, 0, 0, 0, 1, 0, -2, -1, 0, height, 1, width]
    return torch.tensor([rotated, everything, [0] * 13, shifted][:batch], dtype=torch.float64)


def warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Compare warps; each sample has parameters of its own."""
    from mtt_fast.kernels import reference, triton

    batch = shape[0]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images, parameters = torch.randn(shape).to(device, dtype), warp_rows(shape).to(device, wide)
        for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
            operation = getattr(triton, name)
            expected = getattr(reference, name)(images.double(), parameters.double()).to(dtype)
            check((name, shape, str(dtype)), partial(operation, images, parameters), expected, tolerance)
            if batch > 2:
                assert torch.equal(operation(images, parameters)[2], images[2]), "zeros are the identity"


def added_warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Compare warps' transposes that are added to rows; an index comes again, with a warp in between and without."""
    from mtt_fast.kernels import reference, triton

    parameters = warp_rows(shape)
    index = torch.tensor([3, 0, 3, 3])[: shape[0]]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        out, y_bar = torch.randn(5, *shape[1:], dtype=dtype), torch.randn(shape, dtype=dtype)
        scale = torch.tensor(-0.37, dtype=dtype)
        for rows in (parameters, None):
            wide_rows = None if rows is None else rows.double()
            wide = BatchGradient(out.to(torch.float64, copy=True), index, y_bar.double(), wide_rows)
            move(reference, wide, scale.double())
            moved_rows = None if rows is None else rows.to(device, dtype)
            given = (index.to(device), y_bar.to(device), moved_rows)
            case = ("adjoint_step with colour_warp_mask_transpose", shape, str(dtype), rows is not None)

            def added(given: Any = given, out: Tensor = out, scale: Tensor = scale) -> Tensor:
                moved = out.to(device, copy=True)
                version = moved._version
                move(triton, BatchGradient(moved, *given), scale.to(device))
                assert moved._version > version  # autograd is told
                return moved

            check(case, added, wide.out.to(dtype), tolerance)


def move(back_end: Any, batch: BatchGradient, scale: Tensor) -> None:
    """Add the gradient of a batch by a step of the adjoint, whose vectors are of no account."""
    vector, out = batch.y_bar.new_zeros(2, 1)
    back_end.adjoint_step(vector, vector, vector, scale, out, None, 0.0, batch)


def warp_cases(device: str) -> list[Case]:
    """Return the comparisons of small images, and on a GPU also of those that a student has."""
    images = IMAGES if device == "cpu" else IMAGES + LARGE_IMAGES
    return [partial(check, device, shape) for shape in images for check in (warps, added_warps)]
