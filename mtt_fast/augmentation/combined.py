"""SelMatch's augmentation for training on a set of which some images are distilled, and the others real (Lee & Chung, ICML 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.siamese import SiameseAugment, parameters_of_steps

_REACH = 4  # pixels that a real image is shifted by at most, along each axis


class CombinedAugment(SiameseAugment):
    """One operation for each image, chosen uniformly from `strategy`; for a real image a crop and a flip ("combined" in SelMatch's code)."""

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (Σb, 13) of `augment_with` for distilled images, as `SiameseAugment.draw_parameters` does."""
        device = torch.device("cpu") if generator is None else generator.device
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
        by_operation = parameters_of_steps(draws, like.shape).to(torch.promote_types(like.dtype, torch.float32))
        return torch.empty_like(by_operation).index_copy_(0, torch.cat(places), by_operation)

    def draw_of_real(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (count, 13) of `augment_with` for real images, in float32.

        They are shifted by up to four pixels along each axis, with zeros from outside, and every second one is mirrored.
        """
        device = torch.device("cpu") if generator is None else generator.device
        parameters = torch.zeros(count, len(kernels.WARP_PARAMETERS), device=device)
        for name in ("row_shift", "column_shift"):
            shift = torch.randint(-_REACH, _REACH + 1, (count,), generator=generator, device=device)
            parameters[:, kernels.WARP_PARAMETERS.index(name)] = shift.float()
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        parameters[:, kernels.WARP_PARAMETERS.index("column_by_column")] = torch.where(mirrored, -2.0, 0.0)
        return parameters
