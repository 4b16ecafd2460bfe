"""Draw one augmentation for real and synthetic images alike (DSA: Zhao & Bilen, ICML 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.runtime.prefetch import upload


def siamese_augmentation(strategy: str, like: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Draw one operation of `strategy` with its random numbers, for images like `like` (b, C, H, W).

    Returns a function that applies this augmentation to every image of any batch; for the strategy "none", the identity.
    """
    augment = augment_by_strategy(strategy)
    if augment is None:
        return lambda images: images
    parameters = upload(augment.draw_parameters([like[:1]], generator), like.device)
    return lambda images: augment_with(images, parameters.expand(len(images), -1).contiguous())
