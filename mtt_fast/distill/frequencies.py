"""Distil a few frequencies of each image in place of all its pixels (FreD).

D. Shin, S. Shin, I.-C. Moon, "Frequency Domain-based Dataset Distillation", NeurIPS 2023. The images of a class keep only the
frequencies in which its real images differ most, so that the same number of learned values holds more images.

Images are a linear function of their frequencies. So a step of SGD with momentum on the frequencies equals a step on the pixels
with a filtered gradient. The state of a run therefore holds images, and a mask of the frequencies that each class keeps.

F below is the cosine transform of FreD's code, the DCT-II of each axis without a scale: F[k] = 2 Σ_i x[i] cos(π k (2 i + 1) / 2N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.data.synthetic import classes_by_position
from mtt_fast.distill.options import DistillOptions
from mtt_fast.storage.checkpoint import State

_BLOCK = 1 << 20  # values of images that are filtered at once


def most_varying_frequencies(images: Tensor, ipc: int, count: int) -> Tensor:
    """Return a mask (classes, H, W) bool of the `count` frequencies that vary most among the images of each class.

    `images` (n, C, H, W) are sorted by class, with `ipc` of each. As in FreD's code, frequencies are means over the channels, and
    variances are those of F, in which the mean of an image counts more than in an orthonormal transform.
    """
    rows, columns = (_orthonormal_cosines(side, images.device) for side in images.shape[-2:])
    spectra = rows @ images.mean(1, dtype=torch.float64) @ columns.T
    variances = spectra.view(-1, ipc, *spectra.shape[1:]).var(1) / _squared_lengths(images)
    kept = torch.zeros_like(variances, dtype=torch.bool).flatten(1)
    kept.scatter_(1, variances.flatten(1).topk(count).indices, True)
    return kept.view_as(variances)


def with_frequencies(images: Tensor, kept: Tensor) -> Tensor:
    """Return the `images` (n, C, H, W), sorted by class, without the frequencies that their class does not keep."""
    return _filtered(images, kept.double())


def filter_frequencies(state: State, gradients: list[Tensor]) -> list[Tensor]:
    """Return `gradients` with the images' gradient filtered, so that SGD with it is SGD on the kept frequencies F.

    Without `state.frequencies`, `gradients` are returned unchanged.
    """
    if state.frequencies is None:
        return gradients
    images_gradient, *others = gradients
    # x = Bᵀ F, where the rows of B are orthogonal, so dL/dF = B dL/dx, and a step on F changes x by Bᵀ B dL/dx
    return [_filtered(images_gradient, state.frequencies * _squared_lengths(images_gradient)), *others]


def describe_frequencies(options: DistillOptions, data: ImageData | DatasetInfo) -> str:
    """Return a description of the synthetic images' frequencies in terms of pixels; "" if pixels are learned.

    A step on a frequency F moves the pixels in proportion to the squared length of its basis image, 1 / 4HW for most.
    """
    if options.msz_per_channel is None:
        return ""
    pixels, kept = math.prod(data.image_shape[1:]), options.msz_per_channel
    return (
        f"{kept} of {pixels} frequencies in each channel, so {options.ipc} per class have as many numbers as "
        f"{options.ipc * kept / pixels:g} of all pixels; --lr_img {options.lr_img:g} moves them about as far as "
        f"{options.lr_img / (4 * pixels):.3g} moves pixels"
    )


def _filtered(images: Tensor, factors: Tensor) -> Tensor:
    """Return `images` (n, C, H, W), sorted by class, after their frequencies are multiplied by `factors` (classes, H, W) float64.

    It is computed in float64, since matrix products may be in tf32 on a GPU, and in blocks, since the memory plan has no room for
    copies of all images.
    """
    rows, columns = (_orthonormal_cosines(side, images.device) for side in images.shape[-2:])
    classes, filtered = classes_by_position(images, len(factors)), torch.empty_like(images)
    block = max(1, _BLOCK // images[0].numel())
    for part, part_classes, result in zip(
        images.split(block), classes.split(block), filtered.split(block), strict=True
    ):
        result.copy_(rows.T @ (factors[part_classes][:, None] * (rows @ part.double() @ columns.T)) @ columns)
    return filtered


def _orthonormal_cosines(side: int, device: torch.device) -> Tensor:
    """Return the matrix (side, side) of the orthonormal cosine transform, float64, a row for each frequency."""
    index = torch.arange(side, dtype=torch.float64, device=device)
    cosines = torch.cos(math.pi / side * index[:, None] * (index + 0.5))
    return torch.nn.functional.normalize(cosines, dim=1)


def _squared_lengths(images: Tensor) -> Tensor:
    """Return the squared lengths (H, W) of the images of single frequencies F = 1, float64: 1/2N, or 1/4N at zero, for each axis."""
    lengths = [
        torch.full((side,), 1 / (2 * side), dtype=torch.float64, device=images.device) for side in images.shape[-2:]
    ]
    for each in lengths:
        each[0] /= 2
    return torch.outer(*lengths)
