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
"""A function from placeholders for the images of each step, of which it reads shape and dtype, to the parameters (ΣB, K) of all."""


class StepDraws(NamedTuple):
    """The draws of some steps, the rows of all one after the other."""

    lengths: list[int]  # of the steps
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
    """Draw, on the CPU, for steps that see images of `image_shape` (C, H, W) and `dtype` at `batches`, index vectors (b,).

    `generator` is used step by step: each batch is asked for before its parameters are drawn.
    """
    like, indices = torch.empty((), dtype=dtype), []

    def images_of_steps() -> Iterator[Tensor]:
        for index in batches:
            indices.append(index)
            yield like.expand(len(index), *image_shape)

    every = images_of_steps()
    parameters = draw(every, generator) if draw is not None else None
    deque(every, maxlen=0)
    return StepDraws([len(index) for index in indices], torch.cat(indices), parameters)
