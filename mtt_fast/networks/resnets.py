"""ResNets as the public codes have them: a 3×3 first layer without pooling, for 32-pixel images.

Names and order of the parameters are the public code's. Other sizes, which that code lacks, change only the number of
the classifier's features.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mtt_fast.networks.layers import in_sequence, norm_2d, too_small

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Number of blocks in each stage, by depth."""
_BOTTLENECKS_FROM = 50  # depth


def resnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int = 18,
    batch_norm: bool = False,
    average_pooled: bool = False,
    first_stride: int = 1,
) -> nn.Module:
    """Return a ResNet of 18, 34, 50, 101 or 152 layers with instance or batch norm, for images (C, H, W).

    Three stages halve the image by a convolution with stride 2, and an average over 4×4 comes before the classifier.
    With `average_pooled` (ResNet18_AP) the stages halve it by an average pooling, and the classifier sees all features; only of
    18 or 34 layers. The first layer has the stride `first_stride`: 2 in ResNet18_Tiny, for 64-pixel images.
    Raises `InputError` if the images are too small.
    """
    channels, *sides = image_shape
    sides = [(side - 1) // first_stride + 1 for side in sides]
    for _ in _STAGES[1:]:
        sides = [side // 2 if average_pooled else (side + 1) // 2 for side in sides]
    if math.prod(sides) < (1 if batch_norm else 2):  # of a single pixel an instance norm leaves nothing
        raise too_small(f"ResNet{depth}", image_shape)
    pooled = 1 if average_pooled else min(4, *sides)
    height, width = (side // pooled for side in sides)

    def block(before: int, inner: int, stride: int) -> nn.Module:
        if depth >= _BOTTLENECKS_FROM:
            return Bottleneck(before, inner, stride, batch_norm=batch_norm)
        return BasicBlock(before, inner, stride, batch_norm=batch_norm, average_pooled=average_pooled)

    stages: dict[str, nn.Module] = {}
    before, expansion = _STAGES[0][0], Bottleneck.EXPANSION if depth >= _BOTTLENECKS_FROM else 1
    for number, ((inner, stride), count) in enumerate(zip(_STAGES, _BLOCKS[depth], strict=True), start=1):
        after = expansion * inner
        stages[f"layer{number}"] = nn.Sequential(
            block(before, inner, stride), *(block(after, inner, 1) for _ in range(count - 1))
        )
        before = after
    return in_sequence(
        conv1=nn.Conv2d(channels, _STAGES[0][0], 3, stride=first_stride, padding=1, bias=False),
        bn1=norm_2d(_STAGES[0][0], batch_norm=batch_norm),
        relu=nn.ReLU(),
        **stages,
        pool=nn.AvgPool2d(pooled),
        flatten=nn.Flatten(),
        classifier=nn.Linear(before * height * width, num_classes),
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with norms, beside a shortcut; with stride 2 both halve the image (B, C, H, W)."""

    def __init__(self, before: int, after: int, stride: int, *, batch_norm: bool, average_pooled: bool) -> None:
        super().__init__()
        step = 1 if average_pooled else stride
        self.conv1 = nn.Conv2d(before, after, 3, stride=step, padding=1, bias=False)
        self.bn1 = norm_2d(after, batch_norm=batch_norm)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = norm_2d(after, batch_norm=batch_norm)
        self.pooled = stride if average_pooled else 1
        self.shortcut = _shortcut(before, after, stride, batch_norm=batch_norm, average_pooled=average_pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output (B, `after`, H / stride, W / stride)."""
        inner = F.relu(self.bn1(self.conv1(images)))
        if self.pooled != 1:
            inner = F.avg_pool2d(inner, self.pooled)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


class Bottleneck(nn.Module):
    """A 3×3 convolution between two 1×1 ones, with norms, beside a shortcut; with stride 2 both halve the image (B, C, H, W)."""

    EXPANSION = 4  # channels of the output for each `inner` one

    def __init__(self, before: int, inner: int, stride: int, *, batch_norm: bool) -> None:
        super().__init__()
        after = self.EXPANSION * inner
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = norm_2d(inner, batch_norm=batch_norm)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm_2d(inner, batch_norm=batch_norm)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        self.bn3 = norm_2d(after, batch_norm=batch_norm)
        self.shortcut = _shortcut(before, after, stride, batch_norm=batch_norm)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output (B, 4 · `inner`, H / stride, W / stride)."""
        inner = F.relu(self.bn1(self.conv1(images)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(images))


def _shortcut(before: int, after: int, stride: int, *, batch_norm: bool, average_pooled: bool = False) -> nn.Sequential:
    """Return the identity if a block keeps the shape of its images, and otherwise a 1×1 convolution with a norm."""
    if stride == 1 and before == after:
        return nn.Sequential()
    convolution = nn.Conv2d(before, after, 1, stride=1 if average_pooled else stride, bias=False)
    pool = [nn.AvgPool2d(stride)] if average_pooled else []
    return nn.Sequential(convolution, *pool, norm_2d(after, batch_norm=batch_norm))
