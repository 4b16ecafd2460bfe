"""Count the floating-point operations of an engine, from only the shapes of convolutions and classifier."""

from __future__ import annotations

import math

from mtt_fast.networks.convnet import ConvNet

Passes = tuple[int, int]
"""The work of a step in forward passes, and the number of times that the first layer's share is not needed.

A layer's forward pass, its gradient to the input and its gradient to the weight cost the same, F. A plain gradient is
3F, less the first layer's input gradient (the images' own, which is not needed): (3, 1).
"""

PLAIN_GRADIENT: Passes = (3, 1)
# Whole graph, backward through that gradient: the tangent-like sum W∗ẋ + Ẇ∗x (2; the images have no ẋ), both terms of the
# input's gradient (2), both of the weight's (2; the first layer has one).
DOUBLE_BACKWARD: Passes = (6, 2)
# Only to the images. torch computes one of the weight's terms nevertheless.
DOUBLE_BACKWARD_TO_IMAGES: Passes = (5, 2)
# By hand: forward 1, tangent 2, gradient to the inputs 1, its tangent 2, tangent of the weight's gradient 2.
MIXED_STEP: Passes = (8, 3)
# With the primal's activations saved: neither its forward nor its gradient to the inputs.
MIXED_STEP_KEPT: Passes = (6, 2)
# Through torch.compile, which has no double backward. torch.func computes the primal's own gradients to weights and images
# too, and multiplies by the images' ẋ = 0.
COMPILED_MIXED_STEP: Passes = (9, 0)


def forward_flops(net: ConvNet) -> tuple[int, int]:
    """Return the operations (two for a multiply-add) of one sample's forward pass, and those of the first layer."""
    height, width = (net.image_size,) * 2 if isinstance(net.image_size, int) else net.image_size
    layers = []
    for block in range(net.depth):
        grown = 2 * (net.first_padding - 1) if block == 0 else 0
        height, width = height + grown, width + grown
        layers.append(2 * 9 * (net.width if block else net.in_channels) * net.width * height * width)
        height, width = height // 2, width // 2
    classifier = 2 * net.width * math.prod(net.feature_size) * net.num_classes
    return sum(layers) + classifier, layers[0]


def iteration_flops(net: ConvNet, steps: int, batch: int, *passes: Passes) -> int:
    """Return the operations of `steps` steps of `batch` images that make all of `passes`."""
    forward, first = forward_flops(net)
    return steps * batch * sum(count * forward - skipped * first for count, skipped in passes)
