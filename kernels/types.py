"""Define the types that operations and back ends share: records of tensors, label kinds, precisions, layers, memory formats."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LabelKind = Literal["indices", "probabilities", "logits"]
"""Kinds of labels: class indices (B,), probabilities (B, K), or logits (B, K), whose softmax gives the probabilities."""

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
"""Format to which the float32 factors of matrix products are rounded. Sums are float32, and float64 tensors stay float64.

With fp16 and bf16 the planes are themselves float16 or bfloat16; parameters, statistics and sums are float32 (`accumulator`).
"""

HALF_PRECISIONS: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions with planes of 16 bits, and the dtype of these planes."""

LARGEST_COTANGENT = 64.0
"""Upper bound of the magnitude to which the gradient of float16 features is scaled, by a power of two.

It is far below the range of float16, since gradients may grow on the way back through the layers.
"""


class Affine(NamedTuple):
    """Scale γ and shift β of each channel after an instance norm, or the derivatives of both in a direction."""

    gamma: Tensor  # (C,)
    beta: Tensor  # (C,)


class PlaneStats(NamedTuple):
    """Statistics of the planes of y (B, C, H, W) and ẏ, computed in the forward of a norm for its backward.

    With h = (y − mean) · rstd the normalised plane, k1 = E[ẏ] and k2 = E[h ẏ] over the plane's pixels.
    """

    mean: Tensor  # (B, C)
    rstd: Tensor
    k1: Tensor
    k2: Tensor


class Patches(NamedTuple):
    """Images for the first block, and the sums from which the statistics of its planes follow for any weights.

    A patch x̃ consists of the 9·C values under the 3×3 filter at one pixel, in the order (3, 3, C), followed by a one.
    """

    images: Tensor  # (B, H + 2·padding, W + 2·padding, C), minus a shift of each channel; of the planes' dtype
    gram: Tensor  # (B, parts, 9·C + 1, 9·C + 1): sums of x̃x̃ᵀ over parts of the pixels; not bfloat16
    padding: int


class Folded(NamedTuple):
    """The weights of each sample with the norm folded in. The layout is private to the back end."""

    weight: Tensor
    weight_dot: Tensor | None
    stats: Tensor


class PartialSums(NamedTuple):
    """A flat vector (P,) as partial sums over samples, or parts of samples. One later pass over all parameters adds them up.

    The vector is the concatenation of the pieces (S, …), each summed over its axis S and flattened. S may be 0, for zeros.
    """

    pieces: tuple[Tensor, ...]
    divisors: tuple[Tensor, ...] = ()  # () each: powers of two, 2⁻¹²⁶ … 2¹²⁶, by which the sums are divided

    def vector(self) -> Tensor:
        """Return the vector (P,), computed in plain torch."""
        # most often there is one summand, of which a view is enough
        pieces = [piece[0] if len(piece) == 1 else piece.sum(0) for piece in self.pieces]
        vector = pieces[0].flatten() if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
        for divisor in self.divisors:
            vector = vector / divisor
        return vector


class PartialPlanes(NamedTuple):
    """Planes (B, C, H, W) as partial sums of a convolution.

    The first operation that reads them adds the parts in their order, rounds the sum once, and stores it in `planes` for later
    operations.
    """

    parts: Tensor  # (S, B, C, H, W), float32, each part in the memory format of the planes
    planes: Tensor  # (B, C, H, W), uninitialised until the parts are added up


Convolved = Tensor | PartialPlanes
"""Result of a convolution: planes (B, C, H, W), or their partial sums."""


def planes_of(convolved: Convolved) -> Tensor:
    """Return the tensor (B, C, H, W) of planes; for partial sums that are not added up yet it is uninitialised."""
    return convolved.planes if isinstance(convolved, PartialPlanes) else convolved


def vector_of(sums: Tensor | PartialSums) -> Tensor:
    """Return `sums` as a vector (P,); partial sums are added up in plain torch."""
    return sums.vector() if isinstance(sums, PartialSums) else sums


class BatchImages(NamedTuple):
    """The images of a batch for the first block, neither gathered nor augmented yet."""

    x: Tensor  # (n, C, H, W), float32 or float64; contiguous, or channels_last without `parameters`
    padding: int  # of the convolution
    indices: Tensor | None = None  # (B,) int64, into `x`; None for all
    warp: Tensor | None = None  # (B, 13), the parameters of `colour_warp_mask`; None for images that are not augmented


class BatchGradient(NamedTuple):
    """The gradient of the augmented images of a batch, to be added to the gradient of all images."""

    out: Tensor  # (n, C, H, W), contiguous: the gradient of all images
    indices: Tensor  # (B,) int64: the images of the batch
    y_bar: Tensor  # (B, C, H, W), contiguous: the gradient of the augmented images
    warp: Tensor | None  # (B, 13), the parameters of `colour_warp_mask`; None without augmentation


class PackedWeight(NamedTuple):
    """A convolution's weight, with copies in the layouts and the precision of a back end's matrix products."""

    weight: Tensor  # (K, C, 3, 3)
    straight: Tensor  # (K, 3, 3, C)
    rotated: Tensor  # (C, 3, 3, K): for the input gradient, each 3×3 filter rotated by 180°


Weight = Tensor | PackedWeight
"""A convolution's weight (K, C, 3, 3), packed or not."""


def weight_of(weight: Weight) -> Tensor:
    """Return the weight (K, C, 3, 3) itself."""
    return weight.weight if isinstance(weight, PackedWeight) else weight


class PackedParameters(NamedTuple):
    """The result of `pack_parameters`: the packed weights of a step's parameters and of their direction."""

    weights: tuple[Weight, ...]  # of the layers at `places`
    weights_dot: tuple[Weight, ...]  # the same of the direction; empty without one
    direction: Tensor | None  # (P,): the direction times `scale`
    scale: Tensor | None  # (): a power of two; None for 1
    patches: Patches | None = None  # of the images in `batch`; None without them


class WeightBytes(NamedTuple):
    """Bytes that a convolution takes in a step in addition to its planes and its weight."""

    packed: int  # copies of the weight
    summands: int  # summands of the weight's gradient
    copies: int = 0  # copies of planes, while the weight's gradient is computed
    dual_copies: int = 0  # the same, while the derivative of the weight's gradient is computed
    parts: int = 0  # partial sums of the input's gradient, until they are added up
    dual_parts: int = 0  # the same, with the derivative of the input's gradient


class ImageBlockBytes(NamedTuple):
    """Bytes that a first block without stored planes takes in a step, and for how long."""

    patches: int = 0  # with the sums of their products, to the end of the step
    folded: int = 0  # the weights with the norm folded in, to the end of the step; twice with a direction
    sums: int = 0  # U, while the parameters' gradients are computed
    dual_sums: int = 0  # U and U̇, while the derivatives of the parameters' gradients are computed
    linear: int = 0  # M, while the images' gradient is computed
    columns: int = 0  # T, the patches of x̄̇, while the images' gradient is computed, after U is freed


class WeightPlace(NamedTuple):
    """Position of a convolution's weight (filters, channels, 3, 3) in the flat vector of parameters."""

    offset: int
    filters: int
    channels: int


def plane_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """Return the dtype of planes for parameters of `dtype`."""
    return HALF_PRECISIONS.get(precision, dtype) if dtype == torch.float32 else dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics, parameters and their gradients for planes of `dtype`."""
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
    """Return the memory format of `tensor` (B, C, H, W), channels_last if it has both. Raises `ValueError` if it has neither."""
    for candidate in (torch.channels_last, torch.contiguous_format):
        if tensor.is_contiguous(memory_format=candidate):
            return candidate
    raise ValueError(
        f"expected contiguous or channels_last, found {tuple(tensor.shape)} with strides {tensor.stride()}"
    )


def in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the memory format of `like`, copied only if it has another."""
    return tensor.contiguous(memory_format=memory_format(like))
