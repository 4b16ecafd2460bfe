"""Define the types that operations and back ends share: records of tensors, label kinds, precisions, layers, memory formats."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LabelKind = Literal["indices", "probabilities", "logits"]
"""Labels are class indices (B,), probabilities (B, K), or logits (B, K), whose softmax is taken."""

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
"""Format to which the float32 factors of a product are rounded. Sums are float32, and float64 tensors stay float64.

Planes may themselves be float16 or bfloat16. Their products are then fp16 or bf16, and tensors without pixels are float32:
see `accumulator`.
"""

HALF_PRECISIONS: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions whose planes take two bytes a number, with the dtype of these planes."""

LARGEST_COTANGENT = 64.0
"""Largest magnitude of the gradient to float16 features after it was scaled by a power of two.

It is far below the range of float16, since the layers that the backward reaches next make gradients larger.
"""


class Affine(NamedTuple):
    """Scale γ and shift β of each channel after an instance norm, or the derivatives of both in a direction."""

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
    """Images laid out for the first block, and the sums from which its statistics follow for any weights.

    A patch x̃ is the 9·C numbers that a pixel of a 3×3 convolution sees, in the order (3, 3, C), and a one.
    """

    images: Tensor  # (B, H + 2·padding, W + 2·padding, C), less a shift of each channel; their dtype is that of planes
    gram: Tensor  # (B, parts, 9·C + 1, 9·C + 1): sums of x̃x̃ᵀ over parts of the pixels; not bfloat16
    padding: int


class Folded(NamedTuple):
    """A norm folded into the weights, for each sample. The layout is private to the back end that made it."""

    weight: Tensor
    weight_dot: Tensor | None
    stats: Tensor


class PartialSums(NamedTuple):
    """A flat vector (P,) whose last sum, over samples or parts of them, is left for one pass over all parameters.

    Each piece holds summands (S, …), and S may be 0. The vector is the pieces' sums over S, flattened, one after the other.
    """

    pieces: tuple[Tensor, ...]
    factors: tuple[Tensor, ...] = ()  # () each: powers of two that all summands are multiplied with; the vector is not

    def vector(self) -> Tensor:
        """Return the vector (P,), computed in plain torch."""
        # most often there is one summand, of which a view is enough
        pieces = [piece[0] if len(piece) == 1 else piece.sum(0) for piece in self.pieces]
        vector = pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
        for factor in self.factors:
            vector = vector / factor
        return vector


class PartialPlanes(NamedTuple):
    """Planes (B, C, H, W) as partial sums of a convolution, which the first operation that reads them adds up.

    That operation adds the parts in their order, rounds the sum once, and stores it in `planes` for all later readers.
    """

    parts: Tensor  # (S, B, C, H, W), float32: each part in the memory format of the planes
    planes: Tensor  # (B, C, H, W): memory without values until then


Convolved = Tensor | PartialPlanes
"""Result of a convolution: planes (B, C, H, W), or parts of them from a back end that cuts the sum."""


def planes_of(convolved: Convolved) -> Tensor:
    """Return planes (B, C, H, W) as a tensor. For planes in parts it is the memory that their first reader fills."""
    return convolved.planes if isinstance(convolved, PartialPlanes) else convolved


def vector_of(sums: Tensor | PartialSums) -> Tensor:
    """Return `sums` as a vector (P,); partial sums are added up in plain torch."""
    return sums.vector() if isinstance(sums, PartialSums) else sums


class BatchImages(NamedTuple):
    """The images of a batch for the first block: rows of all images, which are neither gathered nor augmented yet."""

    x: Tensor  # (n, C, H, W), float32 or float64; contiguous if they are augmented, else perhaps channels_last
    padding: int  # of the convolution
    rows: Tensor | None = None  # (B,) int64, of `x`; None for all
    parameters: Tensor | None = None  # (B, 13), of `colour_warp_mask`; None for rows that are not augmented


class BatchGradient(NamedTuple):
    """Gradient to the images of a batch, which a later operation adds to the gradient to all images."""

    out: Tensor  # (n, C, H, W), contiguous: the gradient to all images
    rows: Tensor  # (B,) int64, of `out`
    y_bar: Tensor  # (B, C, H, W), contiguous: the gradient to the augmented rows
    parameters: Tensor | None  # (B, 13), of `colour_warp_mask`; None for rows that were not augmented


class PackedWeight(NamedTuple):
    """A convolution's weight, with copies in the layouts and the precision that a back end's products read."""

    weight: Tensor  # (K, C, 3, 3)
    straight: Tensor  # (K, 3, 3, C)
    rotated: Tensor  # (C, 3, 3, K): for the input gradient, each 3×3 rotated by 180°


Weight = Tensor | PackedWeight
"""A convolution's weight (K, C, 3, 3), packed or as it is."""


def weight_of(weight: Weight) -> Tensor:
    """Return the weight (K, C, 3, 3) itself."""
    return weight.weight if isinstance(weight, PackedWeight) else weight


class PackedParameters(NamedTuple):
    """Parameters of a step as its products read them, and a direction of them if there is one."""

    weights: tuple[Weight, ...]  # of the layers that were asked for, in their order
    weights_dot: tuple[Weight, ...]  # () without a direction
    direction: Tensor | None  # (P,): the direction times `scale`
    scale: Tensor | None  # (): a power of two; None for 1
    patches: Patches | None = None  # of the batch that was given


class WeightBytes(NamedTuple):
    """Bytes that a convolution takes in a step in addition to its planes and its weight."""

    packed: int  # copies of the weight
    summands: int  # summands of the weight's gradient
    copies: int = 0  # copies of planes, while the weight's gradient is computed from them
    dual_copies: int = 0  # likewise, in a direction
    parts: int = 0  # parts of the gradient to the input, until it is read
    dual_parts: int = 0  # likewise, with the gradient's derivative


class WeightPlace(NamedTuple):
    """Place of a convolution's weight (filters, channels, 3, 3) in the flat vector of parameters."""

    offset: int
    filters: int
    channels: int


def plane_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """Return the dtype of planes, and of the factors of their products, for images and parameters of `dtype`."""
    return HALF_PRECISIONS.get(precision, dtype) if dtype == torch.float32 else dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over planes of `dtype`: of their statistics, of parameters, and of gradients to parameters."""
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
"""Parameters of `colour_warp_mask` for one image, in the order of the columns. All zeros are the identity."""


class ConvLayer(NamedTuple):
    """Sizes of a 3×3 convolution of planes (B, channels, height, width)."""

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
    """Return the memory format of `tensor` (B, C, H, W): channels_last where both fit. Raises `ValueError` if neither fits."""
    for candidate in (torch.channels_last, torch.contiguous_format):
        if tensor.is_contiguous(memory_format=candidate):
            return candidate
    raise ValueError(
        f"expected contiguous or channels_last, found {tuple(tensor.shape)} with strides {tensor.stride()}"
    )


def in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the memory format of `like`; it is copied only where its format is another."""
    return tensor.contiguous(memory_format=memory_format(like))
