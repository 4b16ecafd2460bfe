"""Draw the random numbers of several steps on the host before the first one, so that the steps are functions of tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Apply = Callable[[Tensor, Tensor], Tensor]
"""A function from a step's images (b, C, H, W) and parameters (b, K) to the augmented images."""

Draw = Callable[[Iterable[Tensor], torch.Generator | None], Tensor]
"""A function that draws the parameters (ΣB, K) of all steps. For each step it gets a tensor (b, C, H, W), of which only shape and dtype matter."""


class StepDraws(NamedTuple):
    """The draws of several steps, concatenated."""

    lengths: list[int]  # batch sizes b of the steps
    indices: Tensor  # (ΣB,) int64, into the images
    parameters: Tensor | None  # (ΣB, K), of the augmentation; None without one

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the fields that are tensors, in order."""
        return (self.indices,) if self.parameters is None else (self.indices, self.parameters)


def draw_steps(
    batches: Iterable[Tensor],
    image_shape: Sequence[int],
    dtype: torch.dtype,
    draw: Draw | None,
    generator: torch.Generator | None,
) -> StepDraws:
    """Draw the parameters of all steps on the CPU, for images of `image_shape` (C, H, W) and `dtype`.

    `batches` are the index vectors (b,) of the steps. It may be a generator that draws from `generator` too: the next batch is
    taken just before the parameters of its step are drawn.
    """
    like, indices = torch.empty((), dtype=dtype), []

    def images_of_steps() -> Iterator[Tensor]:
        for index in batches:
            indices.append(index)
            yield like.expand(len(index), *image_shape)

    images = images_of_steps()
    parameters = draw(images, generator) if draw is not None else None
    deque(images, maxlen=0)  # without `draw`, take the batches
    return StepDraws([len(index) for index in indices], torch.cat(indices), parameters)
