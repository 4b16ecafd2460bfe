"""What the operations agree on about their arguments: formats, kinds of labels, precisions, layers, columns of parameters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LabelKind = Literal["indices", "probabilities", "logits"]
"""Labels are class indices (B,), probabilities (B, K), or logits (B, K) of which the softmax is taken."""

Precision = Literal["fp32", "tf32", "bf16"]
"""What float32 factors of a product are rounded to; sums are float32 always. float64 tensors stay float64.

Planes may be bfloat16 themselves. Then products are bf16, and what belongs to no pixel is float32: see `accumulator`.
"""

Activations = list[Any]
"""What a block's forward keeps for its way back: x, ẋ (None for images), y, ẏ, mean, rstd, k1, k2; emptied there."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums over planes of `dtype`, of the numbers of a plane, the parameters and their gradients."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


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
"""The numbers of one image in `colour_warp_mask`, in the order of the columns; all zeros are the identity."""


class ConvLayer(NamedTuple):
    """A 3×3 convolution of (B, channels, height, width)."""

    channels: int
    height: int
    width: int
    filters: int
    padding: int

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        return self.height + 2 * self.padding - 2

    @property
    def out_width(self) -> int:
        """Columns of the result."""
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
    """Return `tensor` in the memory format of `model`, itself if it is so already."""
    return tensor.contiguous(memory_format=memory_format(model))
