"""CutMix (Yun et al., ICCV 2019), with the draws kept apart from the operation."""

from __future__ import annotations

import torch
from torch import Tensor

_SHARE_OF_BATCHES = 0.5
_BOX = 4  # columns that describe a box: top, bottom, left, right (bottom and right exclusive)


def draw_box(count: int, image_shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return the draws (count, 5) of `mixed` for a batch of `count` images (C, H, W): the box, and each image's partner in the batch.

    In half of the batches the box is empty. Otherwise its share of the image is uniform in [0, 1), before the box is clipped at
    the border.
    """
    device = generator.device
    draws = torch.zeros(count, _BOX + 1, dtype=torch.float32, device=device)
    chance, share = torch.rand(2, generator=generator, device=device, dtype=torch.float32).tolist()
    if chance < _SHARE_OF_BATCHES:
        box = []
        for size in image_shape[1:]:
            centre = int(torch.randint(size, (), generator=generator, device=device))
            half = int(size * share**0.5) // 2
            box += [max(centre - half, 0), min(centre + half, size)]
        draws[:, :_BOX] = torch.tensor(box, device=device)
        draws[:, _BOX] = torch.randperm(count, generator=generator, device=device)
    return draws


def mixed(images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images (b, C, H, W) with the box of `draws` (b, 5) taken from each image's partner, and the mean of both labels (b, classes).

    The mean is weighted by area. The function is pure, and reads no tensor on the host.
    """
    top, bottom, left, right = (column[:, None, None] for column in draws[:, :_BOX].unbind(1))
    row, column = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = (row[:, None] >= top) & (row[:, None] < bottom) & (column >= left) & (column < right)  # (b, H, W)
    share = inside.to(labels.dtype).mean((1, 2))[:, None]
    partner = draws[:, _BOX].long()
    return torch.where(inside[:, None], images[partner], images), labels.lerp(labels[partner], share)
