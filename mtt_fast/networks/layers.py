"""Layers that several networks of the public code share, and `torch`'s draws of their parameters."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtt_fast.checks import device_of
from mtt_fast.errors import InputError


def norm_2d(channels: int, *, batch_norm: bool) -> nn.Module:
    """Return a batch norm, or an affine instance norm as the public code makes it: one group a channel."""
    return nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(channels, channels)


def too_small(name: str, image_shape: tuple[int, int, int]) -> InputError:
    """Return the error that the network called `name` leaves nothing of images (C, H, W)."""
    return InputError(
        f"{name}: nothing is left of images {image_shape}; use larger images, or another `model`, `models`, `eval_mode` or "
        "`cam_model`"
    )


def in_sequence(**layers: nn.Module) -> nn.Sequential:
    """Return `layers` one after another, under their names."""
    return nn.Sequential(OrderedDict(layers))


def default_parameters(module: nn.Module, generator: torch.Generator | None = None) -> Tensor:
    """Draw parameters (P,) for `module` in `module.parameters()` order, float32, on the generator's device (else the CPU).

    The distribution is `torch`'s default, which the public code uses: weights and biases of convolutions and linear
    layers uniform in ±1/√fan_in, weights of norms one and their biases zero. All of it comes from `generator`, so that
    networks may be drawn in several threads. Raises `InputError` for a layer of another kind.
    """
    device = device_of(generator)
    drawn = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            value = torch.ones(parameter.shape, device=device)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(part.weight[0].numel())
                value.uniform_(-bound, bound, generator=generator)
            elif not isinstance(part, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                raise InputError(f"{type(part).__name__}: expected a convolution, a linear layer or a norm to draw")
            elif name == "bias":
                value.zero_()
            drawn.append(value.reshape(-1))
    return torch.cat(drawn)
