"""The augmentation of IDC (Kim et al., ICML 2022), and of NCFM, when networks are trained on a distilled set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtt_fast.augmentation.operations import Draws, parameters_of_steps
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.checks import device_of
from mtt_fast.kernels import WARP_PARAMETERS

_COLORS = ("color", "brightness", "saturation", "contrast")
_PLACE = WARP_PARAMETERS.index("column_by_column")
_OF_COLUMNS = [WARP_PARAMETERS.index("column_by_row"), _PLACE, WARP_PARAMETERS.index("column_shift")]


class FlipAndColorAugment(SiameseAugment):
    """Flip half the images, change the colors of all, and apply one of the other operations, which is drawn for each step.

    Cutout is left out of `strategy`: CutMix takes its place.
    """

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (Σb, 13) of `augment_with`, drawn step by step for batches like `batches` (b, C, H, W)."""
        one_of = "_".join(name for name in self.operations if name not in (*_COLORS, "flip", "cutout"))
        names = [name for name in self.operations if name in ("flip", *_COLORS)] + [one_of] * bool(one_of)
        draws: dict[str, list[Draws]] = {name: [] for name in names}
        count = 0
        for images in batches:
            like, count = images, count + len(images)
            for name in draws:
                draws[name].append(SiameseAugment(name).draw(images, generator))
        device = device_of(generator)
        parameters = torch.zeros(count, len(WARP_PARAMETERS), dtype=torch.float64, device=device)
        sign = torch.ones(count, 1, dtype=torch.float64, device=device)
        for name, steps in draws.items():
            drawn = parameters_of_steps(steps, like.shape)
            if name == "flip":
                sign += drawn[:, _PLACE, None]
            else:
                parameters += drawn
        # an image is flipped first, so its columns are those of the flipped image, counted from the other side
        parameters[:, _OF_COLUMNS] *= sign
        parameters[:, _PLACE] += sign[:, 0] - 1
        return parameters.to(torch.promote_types(like.dtype, torch.float32))
