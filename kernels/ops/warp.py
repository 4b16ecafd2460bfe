"""Change the colours of images, warp and mask them; apply the transpose of this."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_warp


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """Return y = A x + b for each image x: change its colours, then warp it, then set a rectangle to zero.

    `images` (B, C, H, W), contiguous, of any floating dtype; `parameters` (B, 13), float64 for float64 images and else float32,
    with the columns `WARP_PARAMETERS`. All parameters are differences from the identity: zeros leave an image unchanged. For each
    image, in this order:

    - colour: x + brightness; x + saturation · (x − the mean of the pixel's channels); x + contrast · (x − the mean of x).
    - warp: pixel (i, j) is interpolated linearly at (i + row_by_row · i' + row_by_column · j' + row_shift,
      j + column_by_row · i' + column_by_column · j' + column_shift), where (i', j') is (i, j) from the centre of the
      image, ((H − 1)/2, (W − 1)/2), and all are pixels; outside the image are zeros. Whole displacements are exact.
    - mask: rows top … bottom − 1 of columns left … right − 1 are zero.

    The warp must be invertible. This is checked only on a CPU, since on a GPU the check would synchronise. Raises `ValueError`
    for anything else, and for a tensor that requires grad.
    """
    check_warp("colour_warp_mask", "images", images, parameters)
    y: Tensor = dispatch.implementation_of("colour_warp_mask", images)(images, parameters)
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """Return x̄ = Aᵀ ȳ (B, C, H, W), the gradient of the images, from `y_bar`, the gradient of the result of `colour_warp_mask`.

    Shapes, dtypes and errors are those of `colour_warp_mask`. On a GPU each pixel of x̄ searches the pixels of ȳ that may
    have read it: at most ⌈2r⌉², with r the largest sum of magnitudes in a row of the inverse warp. That is 3 × 3 for
    rotations of square images by at most 15 degrees, and for scales of at least 1/1.2.
    """
    check_warp("colour_warp_mask_transpose", "y_bar", y_bar, parameters)
    x_bar: Tensor = dispatch.implementation_of("colour_warp_mask_transpose", y_bar)(y_bar, parameters)
    return x_bar
