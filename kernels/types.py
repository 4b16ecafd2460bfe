"""Define the types that operations and back ends share: records of tensors, label kinds, precisions, layers, memory formats."""

from __future__ import annotations

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

LARGEST_COTANGENT = 64.0
"""The largest magnitude that a power of two lets the gradient to float16 features have: the next layers make it larger."""


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


class Patches(NamedTuple):
    """Images as the first block reads them, and all that its statistics depend on, whatever its weights.

    A patch x̃ is the 9·C numbers that a pixel of a 3×3 convolution sees, in the order (3, 3, C), and a one.
    """

    images: Tensor  # (B, H + 2·padding, W + 2·padding, C), less a shift of each channel; their dtype is that of planes
    gram: Tensor  # (B, parts, 9·C + 1, 9·C + 1): sums of x̃x̃ᵀ over parts of the pixels; not bfloat16
    padding: int


class Folded(NamedTuple):
    """A norm folded into weights of each sample, as the back end lays them out that made them and alone reads them."""

    weight: Tensor
    weight_dot: Tensor | None
    stats: Tensor


class PartialSums(NamedTuple):
    """A flat vector (P,) in pieces, each of them summands (S, …): the vector is their sums over S, flattened, one after the other.

    What is summed last, over samples or over parts of them, is left for one pass over all parameters. S may be 0.
    """

    pieces: tuple[Tensor, ...]
    factors: tuple[Tensor, ...] = ()  # () each: powers of two that all summands have, and the vector has not

    def vector(self) -> Tensor:
        """Return the vector, by plain torch."""
        # most often there is one summand, of which a view is enough
        pieces = [piece[0] if len(piece) == 1 else piece.sum(0) for piece in self.pieces]
        vector = pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
        for factor in self.factors:
            vector = vector / factor
        return vector


class PartialPlanes(NamedTuple):
    """Planes (B, C, H, W) that are the sum of parts, as a convolution leaves them to the operation that reads them first.

    That one adds the parts up in their order and stores the sum, rounded, in `planes`, for all that read them afterwards.
    """

    parts: Tensor  # (S, B, C, H, W), float32: each part in the memory format of the planes
    planes: Tensor  # (B, C, H, W): memory without values until then


Convolved = Tensor | PartialPlanes
"""The result of a convolution: planes (B, C, H, W), whole or, from a back end that cuts the sum, in parts."""


def planes_of(convolved: Convolved) -> Tensor:
    """Return planes, or the memory of those that are in parts, which their first reader fills."""
    return convolved.planes if isinstance(convolved, PartialPlanes) else convolved


def vector_of(sums: Tensor | PartialSums) -> Tensor:
    """Return a vector that may be given as partial sums, by plain torch."""
    return sums.vector() if isinstance(sums, PartialSums) else sums


class PackedWeight(NamedTuple):
    """A convolution's weight, with copies of it as a back end's products read them, rounded as they round."""

    weight: Tensor  # (K, C, 3, 3)
    straight: Tensor  # (K, 3, 3, C)
    rotated: Tensor  # (C, 3, 3, K): for the input gradient, each 3×3 rotated by 180°


Weight = Tensor | PackedWeight
"""A convolution's weight (K, C, 3, 3), packed or as it is."""


def weight_of(weight: Weight) -> Tensor:
    """Return the weight (K, C, 3, 3) itself."""
    return weight.weight if isinstance(weight, PackedWeight) else weight


class PackedParameters(NamedTuple):
    """Parameters of a step, and perhaps a direction of them, as the step's products read them."""

    weights: tuple[Weight, ...]  # of the layers that were asked for
    weights_dot: tuple[Weight, ...]  # none without a direction
    direction: Tensor | None  # (P,): the direction times `scale`
    scale: Tensor | None  # (): a power of two; None for 1


class WeightBytes(NamedTuple):
    """Bytes that a convolution takes in a step beside its planes and its weight."""

    packed: int  # by copies of the weight
    summands: int  # by the summands of the weight's gradient
    copies: int = 0  # by the planes' copies that the weight's gradient is made of, while it is made
    dual_copies: int = 0  # likewise, in a direction
    parts: int = 0  # by the parts that the gradient to the input is left in, until it is read
    dual_parts: int = 0  # likewise, with its derivative


class WeightPlace(NamedTuple):
    """Say where a convolution's weight (filters, channels, 3, 3) lies in the flat vector of parameters."""

    offset: int
    filters: int
    channels: int


def plane_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """Return the dtype of all that has pixels, and of what is multiplied with it, for images and parameters of `dtype`."""
    return HALF_PRECISIONS.get(precision, dtype) if dtype == torch.float32 else dtype


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
