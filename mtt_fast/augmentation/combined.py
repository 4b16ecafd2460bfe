"""SelMatch's augmentation for training on a set with both distilled and real images (Lee & Chung, ICML 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mtt_fast.augmentation.operations import Draws, parameters_of_steps
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.checks import device_of

_MAX_SHIFT = 4  # pixels that a real image is shifted by at most, along each axis


class CombinedAugment(SiameseAugment):
    """Augment each distilled image by an operation of its own, chosen uniformly from `strategy`, and a real one by a crop and a flip.

    It is "combined" in SelMatch's code.
    """

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (Σb, 13) of `augment_with` for distilled images, drawn step by step for batches like `batches`."""
        device = device_of(generator)
        operations = [SiameseAugment(operation) for operation in self.operations]
        draws, places, first = [], [], 0
        for images in batches:
            like, chosen = images, torch.randint(len(operations), (len(images),), generator=generator, device=device)
            for number, operation in enumerate(operations):
                place = (chosen == number).nonzero()[:, 0]
                if len(place):
                    draws.append(operation.draw(images[: len(place)], generator))
                    places.append(first + place)
            first += len(images)
        by_operation = parameters_of_steps(draws, like.shape)
        parameters = torch.empty_like(by_operation).index_copy_(0, torch.cat(places), by_operation)
        return parameters.to(torch.promote_types(like.dtype, torch.float32))

    def draw_both(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return parameters (Σb, 2 · 13) of each image, first as a distilled and then as a real one; `select` takes one of the two."""
        real_parameters: list[Tensor] = []

        def each_step() -> Iterator[Tensor]:
            for images in batches:
                yield images
                real_parameters.append(_crop_and_flip(images, generator))

        distilled = self.draw_parameters(each_step(), generator)
        return torch.cat([distilled, torch.cat(real_parameters).to(distilled.dtype)], dim=1)

    def select(self, parameters: Tensor, real: Tensor) -> Tensor:
        """Return the half of `parameters` (b, 2 · 13), from `draw_both`, that applies to each image; `real` (b,) marks real images."""
        distilled, real_parameters = parameters.chunk(2, dim=1)
        return torch.where(real[:, None], real_parameters, distilled)


def _crop_and_flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the parameters (b, 13) of shifts by up to four pixels, with zeros from outside, and flips of half the images (b, C, H, W)."""
    device = device_of(generator)
    shifts = (
        torch.randint(-_MAX_SHIFT, _MAX_SHIFT + 1, (len(images),), generator=generator, device=device) for _ in range(2)
    )
    crop, flip = Draws("crop", tuple(shifts)), SiameseAugment("flip").draw(images, generator)
    return parameters_of_steps([crop], images.shape) + parameters_of_steps([flip], images.shape)
