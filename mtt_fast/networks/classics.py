"""MLP, LeNet, AlexNet and VGGs as the public codes have them: for 32-pixel images, and 28-pixel ones of one channel.

Names and order of the parameters are the public code's. Other sizes change only the number of the classifier's features. For
64-pixel images DATM's code has networks that halve the images once more (`first_stride`, `last_stride`), under names of their own.
"""

from __future__ import annotations

from torch import nn

from mtt_fast.networks.layers import in_sequence, norm_2d, too_small

_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Number of convolutions before each pooling, by depth."""
_VGG_CHANNELS = (64, 128, 256, 512, 512)


def mlp(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a perceptron with two hidden layers of 128 and ReLU, for images (C, H, W)."""
    channels, height, width = image_shape
    return in_sequence(
        flatten=nn.Flatten(),
        fc_1=nn.Linear(channels * height * width, 128),
        relu_1=nn.ReLU(),
        fc_2=nn.Linear(128, 128),
        relu_2=nn.ReLU(),
        fc_3=nn.Linear(128, num_classes),
    )


def lenet(image_shape: tuple[int, int, int], num_classes: int, *, first_stride: int = 1) -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling, for images (C, H, W). Raises `InputError` if they are too small."""
    channels, *sides = image_shape
    padding = 2 if channels == 1 else 0
    height, width = ((((side + 2 * padding - 5) // first_stride + 1) // 2 - 4) // 2 for side in sides)
    _check("LeNet", image_shape, height, width)
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5, first_stride, padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    return in_sequence(
        features=features,
        flatten=nn.Flatten(),
        fc_1=nn.Linear(16 * height * width, 120),
        relu_1=nn.ReLU(),
        fc_2=nn.Linear(120, 84),
        relu_2=nn.ReLU(),
        fc_3=nn.Linear(84, num_classes),
    )


def alexnet(
    image_shape: tuple[int, int, int], num_classes: int, *, batch_norm: bool = False, first_stride: int = 1
) -> nn.Module:
    """Return AlexNet with the strides and widths of the public code, for images (C, H, W); it has no dropout.

    `batch_norm` puts a batch norm after each convolution. Raises `InputError` if the images are too small.
    """
    channels, *sides = image_shape
    padding = 4 if channels == 1 else 2
    height, width = (((side + 2 * padding - 5) // first_stride + 1) // 8 for side in sides)
    _check("AlexNet", image_shape, height, width)

    def block(before: int, after: int, kernel: int, padding: int, stride: int = 1) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(after)] if batch_norm else []
        return [nn.Conv2d(before, after, kernel, stride, padding), *norm, nn.ReLU()]

    features = nn.Sequential(
        *block(channels, 128, 5, padding, first_stride), nn.MaxPool2d(2), *block(128, 192, 5, 2), nn.MaxPool2d(2),
        *block(192, 256, 3, 1), *block(256, 192, 3, 1), *block(192, 192, 3, 1), nn.MaxPool2d(2),
    )  # fmt: skip
    return in_sequence(features=features, flatten=nn.Flatten(), fc=nn.Linear(192 * height * width, num_classes))


def vgg(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int = 11,
    batch_norm: bool = False,
    last_stride: int = 1,
) -> nn.Module:
    """Return a VGG of 11, 13, 16 or 19 layers with one linear layer and no dropout, for images (C, H, W).

    Its norm is an instance norm, or a batch norm. Of every `last_stride` × `last_stride` pixels of the last map the classifier sees
    one, the first. Raises `InputError` if the images are too small.
    """
    channels, *sides = image_shape
    padding = 3 if channels == 1 else 1
    height, width = (((side + 2 * (padding - 1)) // 32 - 1) // last_stride + 1 for side in sides)
    _check(f"VGG{depth}", image_shape, height, width)
    layers: list[nn.Module] = []
    before = channels
    for after, count in zip(_VGG_CHANNELS, _VGG[depth], strict=True):
        for _ in range(count):
            convolution = nn.Conv2d(before, after, 3, padding=1 if layers else padding)
            layers += [convolution, norm_2d(after, batch_norm=batch_norm), nn.ReLU()]
            before = after
        layers.append(nn.MaxPool2d(2))
    if last_stride > 1:
        layers.append(nn.AvgPool2d(1, last_stride))
    return in_sequence(
        features=nn.Sequential(*layers),
        flatten=nn.Flatten(),
        classifier=nn.Linear(before * height * width, num_classes),
    )


def _check(name: str, image_shape: tuple[int, int, int], *sides: int) -> None:
    if min(sides) < 1:
        raise too_small(name, image_shape)
