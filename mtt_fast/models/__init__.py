"""Networks by the names that the public code gives them."""

from __future__ import annotations

import re

from mtt_fast.convnet import ConvNet
from mtt_fast.errors import InputError


def network_by_name(name: str, image_shape: tuple[int, int, int], num_classes: int) -> ConvNet:
    """Return the network called `name` for images (C, H, W): ConvNet, ConvNetD4 (depth), ConvNetW256 (width), ConvNetD2W64.

    The norm comes last: IN is the instance norm, which is there without a name too, and NN is none: ConvNetD4NN.
    Raises `InputError` for any other name, or a depth that the images are too small for.
    """
    match = re.fullmatch(r"ConvNet(?:D(\d+))?(?:W(\d+))?(IN|NN)?", name)
    if match is None:
        raise InputError(
            f"--model {name}: expected ConvNet, with depth, width and norm (IN instance, NN none) as in ConvNetD4, "
            "ConvNetD3W256 or ConvNetNN"
        )
    channels, height, width = image_shape
    return ConvNet(
        in_channels=channels,
        num_classes=num_classes,
        image_size=height if height == width else (height, width),
        width=int(match[2] or 128),
        depth=int(match[1] or 3),
        norm="none" if match[3] == "NN" else "instance",
    )
