"""SelMatch's augmentation for training on a set of which some images are distilled, and the others real (Lee & Chung, ICML 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.siamese import SiameseAugment, parameters_of_steps

_REACH = 4  # pixels that a real image is shifted by at most, along each axis


class CombinedAugment(SiameseAugment):
    """Augment each distilled image by an operation of its own, chosen uniformly from `strategy`, and a real one by a crop and a flip.

    It is "combined" in SelMatch's code.
    """

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (Σb, 2 · 13) of `augment_with` for each image, first as a distilled and then as a real one.

        They are drawn step by step, for batches like `batches` (b, C, H, W); `select` takes one of the two.
        """
        device = torch.device("cpu") if generator is None else generator.device
        operations = [SiameseAugment(operation) for operation in self.operations]
        draws, places, of_real, first = [], [], [], 0
        for images in batches:
            like, chosen = images, torch.randint(len(operations), (len(images),), generator=generator, device=device)
            for number, operation in enumerate(operations):
                place = (chosen == number).nonzero()[:, 0]
                if len(place):
                    draws.append(operation.draw(images[: len(place)], generator))
                    places.append(first + place)
            of_real.append(_crop_and_flip(len(images), device, generator))
            first += len(images)
        by_operation = parameters_of_steps(draws, like.shape)
        distilled = torch.empty_like(by_operation).index_copy_(0, torch.cat(places), by_operation)
        return torch.cat([distilled, torch.cat(of_real)], dim=1).to(torch.promote_types(like.dtype, torch.float32))

    def select(self, parameters: Tensor, real: Tensor) -> Tensor:
        """Return what applies of `parameters` (b, 2 · 13), as `draw_parameters` returns them, to images that are `real` (b,) or not."""
        distilled, of_real = parameters.chunk(2, dim=1)
        return torch.where(real[:, None], of_real, distilled)


def _crop_and_flip(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return the parameters (count, 13), float64, of shifts by up to four pixels, with zeros from outside, and flips of half the images."""
    parameters = torch.zeros(count, len(kernels.WARP_PARAMETERS), device=device, dtype=torch.float64)
    for name in ("row_shift", "column_shift"):
        shift = torch.randint(-_REACH, _REACH + 1, (count,), generator=generator, device=device)
        parameters[:, kernels.WARP_PARAMETERS.index(name)] = shift.double()
    flipped = torch.rand(count, generator=generator, device=device) < 0.5
    parameters[:, kernels.WARP_PARAMETERS.index("column_by_column")] = torch.where(flipped, -2.0, 0.0).double()
    return parameters
