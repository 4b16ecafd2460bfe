"""Define the types that operations and back ends share: records of tensors, label kinds, precisions, layers, memory formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LabelKind = Literal["indices", "probabilities", "logits"]
"""Labels are class indices (B,), probabilities (B, K), or logits (B, K) of which the softmax is taken."""

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
"""The format that float32 factors of a product are rounded to; sums are always float32. float64 tensors stay float64.

Planes may be float16 or bfloat16 themselves. Then products are fp16 or bf16, and tensors without pixels are float32: see
`accumulator`.
"""

HALF_PRECISIONS: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""The precisions whose planes take two bytes a number, with the dtype of the planes."""


class Affine(NamedTuple):
    """Scale and shift that follow an instance norm, one of each a channel; also their derivative in a direction."""

    gamma: Tensor  # (C,)
    beta: Tensor  # (C,)


class PlaneStats(NamedTuple):
    """Statistics of the planes of y (B, C, H, W) and of ẏ that the backward of a norm takes from its forward.

    With h = (y − mean) · rstd the normalised plane, k1 = E[ẏ] and k2 = E[h ẏ] over the plane's pixels.
    """

    mean: Tensor  # (B, C)
    rstd: Tensor
    k1: Tensor
    k2: Tensor


@dataclass(repr=False, eq=False)
class Activations:
    """Tensors that the forward of a block saves for its backward, which takes them once.

    A block without a norm saves neither ẏ, which moves no gradient there, nor statistics.
    """

    x: Tensor  # (B, C, H, W)
    x_dot: Tensor | None  # None for images, which do not move with the parameters
    y: Tensor  # (B, K, H', W')
    y_dot: Tensor | None = None
    stats: PlaneStats | None = None

    def take(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, PlaneStats | None]:
        """Return x, ẋ, y, ẏ and the statistics, and forget them here.

        The backward then holds the only reference to each tensor, and frees the tensor as soon as it has used it.
        """
        fields = (self.x, self.x_dot, self.y, self.y_dot, self.stats)
        del self.x, self.x_dot, self.y, self.y_dot, self.stats
        return fields

    @property
    def is_empty(self) -> bool:
        """Return whether the tensors were taken."""
        return not hasattr(self, "x")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over planes of `dtype`, of their statistics, of the parameters and their gradients."""
    return torch.float32 if dtype in HALF_PRECISIONS.values() else dtype


WARP_PARAMETERS = (
    "brightness",
    "saturation",
    "contrast",
    "row_by_row",
    "row_by_column",
    "row_shift",
    "column_by_row",
    "column_by_column",
    "column_shift",
    "top",
    "bottom",
    "left",
    "right",
)
"""Names of the parameters of one image in `colour_warp_mask`, in the order of the columns; all zeros are the identity."""


class ConvLayer(NamedTuple):
    """A 3×3 convolution of (B, channels, height, width)."""

    channels: int
    height: int
    width: int
    filters: int
    padding: int

    @property
    def out_height(self) -> int:
        """Return the number of rows of the result."""
        return self.height + 2 * self.padding - 2

    @property
    def out_width(self) -> int:
        """Return the number of columns of the result."""
        return self.width + 2 * self.padding - 2


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the format of `tensor` (B, C, H, W); channels_last where both fit. Raises `ValueError` if neither does."""
    for candidate in (torch.channels_last, torch.contiguous_format):
        if tensor.is_contiguous(memory_format=candidate):
            return candidate
    raise ValueError(
        f"expected contiguous or channels_last, found {tuple(tensor.shape)} with strides {tensor.stride()}"
    )


def in_format_of(model: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the memory format of `model`, `tensor` itself if it has that format already."""
    return tensor.contiguous(memory_format=memory_format(model))
