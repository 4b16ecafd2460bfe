"""The operations on tensors from which the engine is built.

`ops/` has the signatures, contracts and checks. `reference/` defines each operation in plain torch, on any device.
`native/` (compiled from `cpp/`) and `triton/` compute the same faster on a CPU and on CUDA. `dispatch` chooses between them.

The package is `mtt_fast.kernels`. A program that starts in the repository finds it as `kernels` too, and transformers, which looks for a
package of this name, imports it. That is harmless: the copy has no version, and nothing here uses it.
"""

from __future__ import annotations

from . import ops
from .dispatch import (
    compile_ahead,
    has_image_block,
    has_kernels,
    image_block_bytes,
    native_available,
    release_memory,
    weight_bytes,
    workspace_bytes,
)
from .ops import *  # noqa: F403 - all operations
from .reference.linear import linear, linear_backward, linear_dual, linear_dual_backward
from .types import (
    HALF_PRECISIONS,
    WARP_PARAMETERS,
    Affine,
    BatchGradient,
    BatchImages,
    ConvLayer,
    Convolved,
    Folded,
    ImageBlockBytes,
    LabelKind,
    PackedParameters,
    PackedWeight,
    PartialPlanes,
    PartialSums,
    Patches,
    PlaneStats,
    Precision,
    Weight,
    WeightBytes,
    WeightPlace,
    plane_dtype,
    planes_of,
    weight_of,
)

__all__ = [
    "HALF_PRECISIONS",
    "WARP_PARAMETERS",
    "Affine",
    "BatchGradient",
    "BatchImages",
    "ConvLayer",
    "Convolved",
    "Folded",
    "ImageBlockBytes",
    "LabelKind",
    "PackedParameters",
    "PackedWeight",
    "PartialPlanes",
    "PartialSums",
    "Patches",
    "PlaneStats",
    "Precision",
    "Weight",
    "WeightBytes",
    "WeightPlace",
    "compile_ahead",
    "has_image_block",
    "has_kernels",
    "image_block_bytes",
    "linear",
    "linear_backward",
    "linear_dual",
    "linear_dual_backward",
    "native_available",
    "plane_dtype",
    "planes_of",
    "release_memory",
    "weight_bytes",
    "weight_of",
    "workspace_bytes",
]
__all__ += ops.__all__
