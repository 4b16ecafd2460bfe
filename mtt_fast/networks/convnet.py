"""ConvNet, the standard network of dataset distillation (Gidaris & Komodakis 2018), as a pure function of one flat vector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.checks import device_of
from mtt_fast.errors import InputError
from mtt_fast.networks.layout import ParameterLayout

NORM_EPS = 1e-5

Norm = Literal["instance", "none"]


@dataclass(frozen=True)
class ConvNet:
    """[conv 3×3 → norm → ReLU → average pool 2×2] × depth, then a linear classifier.

    The norm is an affine instance norm (a group norm with one group a channel, eps 1e-5), or there is none. Padding is 1. In the
    first layer it is 3 for one-channel images, as in the public code, which turns MNIST's 28×28 into 32×32. The parameters are
    one vector `theta` (P,), in the public code's order, so that code's trajectories load unchanged.

    Raises `InputError` for invalid sizes and norms, and if `depth` poolings leave nothing of `image_size`.
    """

    in_channels: int = 3
    num_classes: int = 10
    image_size: int | tuple[int, int] = 32
    width: int = 128
    depth: int = 3
    norm: Norm = "instance"

    def __post_init__(self) -> None:
        for name in ("in_channels", "num_classes", "width", "depth"):
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise InputError(f"ConvNet {name}: expected a whole number, found {value!r}")
            if value < 1:
                raise InputError(f"ConvNet {name}: expected at least 1, found {value}")
            object.__setattr__(self, name, int(value))  # JSON does not take NumPy's integers
        sides = self.image_size if isinstance(self.image_size, Sequence) else (self.image_size, self.image_size)
        if isinstance(sides, str) or len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            raise InputError(f"ConvNet image_size: expected a side, or height and width, found {self.image_size!r}")
        if min(sides) < 1:
            raise InputError(f"ConvNet image_size: expected at least 1, found {self.image_size}")
        size = int(sides[0]) if isinstance(self.image_size, Integral) else (int(sides[0]), int(sides[1]))
        object.__setattr__(self, "image_size", size)  # a list has no hash
        if self.norm not in get_args(Norm):
            raise InputError(f"ConvNet norm: expected {' or '.join(get_args(Norm))}, found {self.norm}")
        if min(self.feature_size) < 1:
            raise InputError(
                f"ConvNet depth {self.depth}: {self.depth} poolings leave nothing of {self.image_size}-pixel images; "
                "use a smaller depth or larger images"
            )

    @property
    def mixes_samples(self) -> bool:
        """Return False: an instance norm mixes no samples, so a batch may be cut into micro-batches exactly."""
        return False

    @property
    def feature_size(self) -> tuple[int, int]:
        """Return the height and width of the last feature map."""
        size = self.image_size
        return self.feature_size_of(*((size, size) if isinstance(size, int) else size))

    def feature_size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the last feature map of images of this `height` and `width`."""
        grown = 2 * (self.first_padding - 1)
        return (height + grown) >> self.depth, (width + grown) >> self.depth

    @property
    def first_padding(self) -> int:
        """Return the padding of the first convolution."""
        return 3 if self.in_channels == 1 else 1

    @cached_property
    def layout(self) -> ParameterLayout:
        """Return the names (as in the public code's module) and shapes of the parameters, in flat order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for block in range(self.depth):
            conv = block * (4 if self.norm == "instance" else 3)  # the module's layers: conv, norm if any, ReLU, pool
            shapes[f"features.{conv}.weight"] = (self.width, self.width if block else self.in_channels, 3, 3)
            shapes[f"features.{conv}.bias"] = (self.width,)
            if self.norm == "instance":
                shapes[f"features.{conv + 1}.weight"] = (self.width,)
                shapes[f"features.{conv + 1}.bias"] = (self.width,)
        shapes["classifier.weight"] = (self.num_classes, self.width * math.prod(self.feature_size))
        shapes["classifier.bias"] = (self.num_classes,)
        return ParameterLayout(tuple(shapes), tuple(shapes.values()))

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters P."""
        return self.layout.num_parameters

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, as a record."""
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial parameters (P,), of torch's default dtype, on the generator's device (else the CPU).

        The distribution is PyTorch's default, which the public code uses: convolutions and classifier uniform in
        ±1/√fan_in, norm weights one and biases zero.
        """
        device = device_of(generator)
        theta = torch.empty(self.num_parameters, device=device)
        parameters = self.layout.named(theta)
        for name, parameter in parameters.items():
            module, kind = name.rsplit(".", 1)
            weight = parameters[f"{module}.weight"]
            if weight.dim() == 1:
                parameter.fill_(1.0 if kind == "weight" else 0.0)
            else:
                bound = 1 / math.sqrt(weight[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
        return theta

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits (n, num_classes) of `images` (n, in_channels, H, W) under the parameters `theta` (P,).

        A pure function: differentiable to any order, in forward and reverse mode, and usable under `torch.func`.
        """
        *blocks, classifier = self.split(theta)
        return F.linear(self._features(blocks, images), *classifier)

    def embed(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the classifier's inputs for `images`: the last feature map, flattened, (n, F). Also a pure function."""
        return self._features(self.split(theta)[:-1], images)

    def _features(self, blocks: Sequence[tuple[Tensor, ...]], images: Tensor) -> Tensor:
        features = images
        for block, (weight, bias, *norm) in enumerate(blocks):
            features = F.conv2d(features, weight, bias, padding=1 if block else self.first_padding)
            if norm:
                gamma, beta = norm
                features = F.group_norm(features, self.width, gamma, beta, NORM_EPS)
            features = F.avg_pool2d(F.relu(features), 2)
        return features.flatten(1)

    def split(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        """Return views of each block's parameters, and last of the classifier's weight and bias.

        A block's parameters are the weight and bias of its convolution, and those of its norm if it has one.
        """
        parameters = self.layout.split(theta)
        each = len(parameters[:-2]) // self.depth
        blocks = [tuple(parameters[each * block : each * (block + 1)]) for block in range(self.depth)]
        return [*blocks, tuple(parameters[-2:])]


def is_plain_convnet(network: object) -> TypeGuard[ConvNet]:
    """Return whether `network` is a `ConvNet`, or an instance of a subclass that computes the logits in the same way."""
    return isinstance(network, ConvNet) and all(
        getattr(type(network), name) is getattr(ConvNet, name) for name in ("__call__", "_features", "split", "layout")
    )
