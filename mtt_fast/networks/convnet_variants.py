"""The variants of ConvNet that the field compares: activation, norm and pooling other than `mtt_fast.ConvNet`'s."""

from __future__ import annotations

from torch import nn

from mtt_fast.errors import InputError
from mtt_fast.networks.layers import in_sequence, norm_2d

_GROUPS = 4  # of the group norm


def convnet_variant(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int,
    depth: int,
    activation: type[nn.Module],
    norm: str,
    pooling: type[nn.Module] | None,
) -> nn.Module:
    """Return [conv 3×3 → norm → activation → 2×2 pooling] × depth and a linear classifier, for images (C, H, W).

    `activation` and `pooling` are classes of torch's layers, and None is no pooling; `norm` is instance, batch, layer, group
    (four groups) or none. Padding is 1, but 3 in the first layer for one-channel images. Names and order of the parameters
    are the public code's. Raises `InputError` if the poolings leave nothing, the groups do not divide the width, or a norm has only one
    value to normalise.
    """
    channels, height, side = image_shape
    padding = 3 if channels == 1 else 1
    height, side = height + 2 * (padding - 1), side + 2 * (padding - 1)
    if height * side == 1 and (norm == "instance" or (norm, width) == ("group", _GROUPS)):
        raise InputError(
            f"ConvNet with {norm} norm: expected more than one value to normalise, found maps of one pixel; use larger images, or no norm "
            "(NN)"
        )
    layers: list[nn.Module] = []
    for block in range(depth):
        layers.append(nn.Conv2d(width if block else channels, width, 3, padding=1 if block else padding))
        layers += _norm(norm, width, height, side)
        layers.append(activation())
        if pooling is not None:
            layers.append(pooling(2))
            height, side = height // 2, side // 2
        if min(height, side) < 1:
            raise InputError(
                f"ConvNet depth {depth}: {depth} poolings leave nothing of {image_shape[1]}×{image_shape[2]} images; use a "
                "smaller depth or larger images"
            )
    return in_sequence(
        features=nn.Sequential(*layers),
        flatten=nn.Flatten(),
        classifier=nn.Linear(width * height * side, num_classes),
    )


def _norm(norm: str, width: int, height: int, side: int) -> list[nn.Module]:
    """Return the norm of a block whose maps are (width, height, side), or nothing."""
    if norm == "group":
        if width % _GROUPS:
            raise InputError(f"ConvNet with group norm: expected a width divisible by {_GROUPS}, found {width}")
        return [nn.GroupNorm(_GROUPS, width)]
    if norm == "layer":
        return [nn.LayerNorm([width, height, side])]
    return [] if norm == "none" else [norm_2d(width, batch_norm=norm == "batch")]
