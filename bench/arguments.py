"""Make the arguments of the operations of one block of a network, for the benchmarks that time them and that choose their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.settings import Setting
from mtt_fast import kernels
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.kernels import Affine, Precision, reference
from mtt_fast.kernels.types import accumulator
from mtt_fast.networks.convnet import NORM_EPS


@dataclass(frozen=True)
class Block:
    """The shapes of one block: images or features of `channels`, `size` pixels a side, and the block's convolution."""

    number: int
    """from 1; the inputs of block 1 are images"""
    channels: int
    size: int
    width: int
    padding: int

    @property
    def out_size(self) -> int:
        """Return the side of the convolution's output, in pixels."""
        return self.size + 2 * self.padding - 2


def blocks_of(setting: Setting) -> list[Block]:
    """Return the blocks of the setting's network."""
    net, channels, size, blocks = setting.net, setting.net.in_channels, setting.side, list[Block]()
    for number in range(1, net.depth + 1):
        blocks.append(Block(number, channels, size, net.width, net.first_padding if number == 1 else 1))
        channels, size = net.width, blocks[-1].out_size // 2
    return blocks


def block_arguments(
    block: Block, batch: int, precision: Precision, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of each operation of `block`, by its name, with random values and planes of `dtype`.

    Of the first block these are also the operations that compute it without planes.
    """

    def pair_of_planes(channels: int, size: int) -> tuple[Tensor, ...]:
        values = torch.randn(2 * batch, channels, size, size, generator=generator, device=generator.device)
        return values.to(dtype, memory_format=torch.channels_last).chunk(2)

    def parameters(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=accumulator(dtype))

    is_first, options = block.number == 1, (block.padding, precision)
    x, tangent = pair_of_planes(block.channels, block.size)
    x_dot = None if is_first else tangent  # images have none
    y_dot, y = pair_of_planes(block.width, block.out_size)  # ȳ̇ and ȳ too
    p_bar, p_bar_dot = pair_of_planes(block.width, block.out_size // 2)
    weight, weight_dot = (parameters(block.width, block.channels, 3, 3) / 10 for _ in range(2))
    affine, affine_dot = (Affine(parameters(block.width), parameters(block.width)) for _ in range(2))
    beta, beta_dot = affine.beta, affine_dot.beta
    stats = reference.norm_relu_pool_dual(y, y_dot, affine, affine_dot, NORM_EPS)[2]
    inputs, outputs = (x, x_dot, weight, weight_dot, *options), (y, y_dot, weight, weight_dot, *options)
    arguments: dict[str, tuple[Any, ...]] = {
        "conv3x3": (x, weight, *options),
        "conv3x3_weight_gradient": (x, y, *options),
        "conv3x3_dual": inputs,
        "conv3x3_tangent": inputs,
        "conv3x3_dual_weight_gradient": (x, x_dot, y, y_dot, *options),
    }
    if not is_first:
        arguments["conv3x3_input_gradient"] = (y, weight, *options)
        arguments["conv3x3_dual_input_gradient"] = outputs
    arguments |= {
        "conv3x3_input_gradient_tangent": outputs,
        "norm_relu_pool": (y, affine, NORM_EPS),
        "norm_relu_pool_backward": (y, stats.mean, stats.rstd, affine, p_bar),
        "norm_relu_pool_dual": (y, y_dot, affine, affine_dot, NORM_EPS),
        "norm_relu_pool_dual_backward": (y, y_dot, stats, affine, affine_dot, p_bar, p_bar_dot),
    }
    if is_first:
        images = x.to(weight.dtype).contiguous()
        warps = SiameseAugment("rotate").draw_parameters([images], generator)
        patches = kernels.image_patches(images, *options)
        primal, dual = (patches, weight, affine), (patches, weight, weight_dot, affine, affine_dot)
        norm = (NORM_EPS, precision)
        p, folded = kernels.conv_norm_relu_pool(*primal, *norm)
        *_, folded_dual = kernels.conv_norm_relu_pool_dual(*dual, *norm)
        bars = (p_bar.to(p.dtype), p_bar_dot.to(p.dtype))
        arguments |= {
            "image_patches": (images, *options, torch.arange(batch, device=images.device), warps),
            "conv_norm_relu_pool": (*primal, *norm),
            "conv_norm_relu_pool_backward": (*primal, bars[0], folded, *norm),
            "conv_norm_relu_pool_dual": (*dual, *norm),
            "conv_norm_relu_pool_dual_backward": (*dual, *bars, folded_dual, *norm),
        }
    return arguments | {
        "add_planes": (y, y_dot),
        "bias_relu_pool": (y, beta),
        "bias_relu_pool_backward": (y, beta, p_bar),
        "bias_relu_pool_dual": (y, y_dot, beta, beta_dot),
        "bias_relu_pool_dual_backward": (y, beta, p_bar, p_bar_dot),
    }
