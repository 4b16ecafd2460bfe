"""The memory of a step of `FusedConvNetStudent`, part by part, beside its `gradient` and `gradient_jvp` in fused.py.

The forward part keeps x and y of every block. The backward part goes from the last block to the first. At a block it holds the
activations of this block and of the earlier ones, and the summands of the gradients of this block and of the later ones. Some back
ends leave x̄ in parts, which the block before adds up when it reads them as its p̄.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import mtt_fast.kernels as kernels
from mtt_fast.engine.students.protocol import StepBytes
from mtt_fast.kernels import ConvLayer, ImageBlockBytes, Precision, WeightBytes, plane_dtype
from mtt_fast.networks.convnet import ConvNet


class BlockBytes(NamedTuple):
    """Bytes of a block: its planes (tangents and cotangents take the same), and what its operations allocate."""

    x: int  # 0 for images, which are arguments of the step
    y: int  # 0 in an `ImageBlock`, which stores none
    y_dot: int  # kept from the forward part to the backward part; 0 without a norm too
    p: int
    weight: WeightBytes
    image_block: ImageBlockBytes


def fused_step_bytes(
    network: ConvNet,
    layers: Sequence[ConvLayer],
    has_image_block: bool,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: Precision,
    *,
    has_loss: bool,
) -> StepBytes:
    """Return the peak memory of a step on `batch` samples of `dtype`.

    `layers` are the convolutions of the blocks. `has_image_block` says whether the first block is an `ImageBlock`, and `has_loss`
    whether a user's loss replaces cross-entropy; its logits are not counted.
    """
    planes, parameters = plane_dtype(dtype, precision), dtype.itemsize * network.num_parameters
    weights = kernels.weight_bytes(batch, layers, planes, device, precision)
    blocks = _plane_blocks(layers, weights, batch * planes.itemsize, network.norm == "instance")
    if has_image_block:
        summands = batch * dtype.itemsize * (9 * layers[0].channels + 2) * layers[0].filters  # of each sample
        weight = weights[0]._replace(packed=0, summands=summands)
        image_block = kernels.image_block_bytes(batch, layers[0], planes, device, precision)
        blocks[0] = blocks[0]._replace(y=0, y_dot=0, weight=weight, image_block=image_block)

    # Until the step ends it holds the images (as patches, or in channels_last), the packed weights, and the gradients of all
    # parameters but the convolutions' weights; `gradient_jvp` also the direction's weights, and its copy that fp16 scales.
    channels, height, width = layers[0][:3]
    patches = blocks[0].image_block.patches
    images = patches if has_image_block else batch * planes.itemsize * channels * height * width
    packed = sum(block.weight.packed for block in blocks) + blocks[0].image_block.folded
    convolutions = dtype.itemsize * sum(9 * layer.channels * layer.filters for layer in layers)
    throughout = images + packed + parameters - convolutions
    direction = packed + (parameters if precision == "fp16" else 0)

    # The classifier runs beside all activations, and holds p and p̄ with their tangents. On a CPU it copies one of these to the
    # public code's order.
    p, copies, ys = blocks[-1].p, int(device.type == "cpu"), sum(block.y for block in blocks)
    dual_copies = copies
    if has_loss:  # features and their gradient, with their tangents, in the dtype of the parameters
        ratio = dtype.itemsize // planes.itemsize
        copies, dual_copies = 2 * ratio - 1, 4 * ratio
    classifier = sum(block.x for block in blocks) + ys + (2 + copies) * p
    dual_classifier = sum(2 * block.x + block.y_dot for block in blocks) + ys + (4 + dual_copies) * p
    backward, saving, dual_forward, dual_backward = (
        max(peak(blocks[:number], block, blocks[number + 1 :]) for number, block in enumerate(blocks))
        for peak in (_backward_peak, _saving_backward_peak, _saved_dual_forward_peak, _dual_backward_peak)
    )
    dual = max(dual_classifier, dual_backward)
    # at the end the summands of the gradient are added up
    adding_up = sum(block.weight.summands for block in blocks) + parameters
    return StepBytes(
        gradient=max(classifier, backward, adding_up) + throughout,
        gradient_saving=max(classifier, saving, adding_up) + throughout,
        gradient_jvp=max(dual, adding_up) + throughout + direction,
        gradient_jvp_saved=max(max(dual_forward, dual) - ys, adding_up) + throughout + direction,
        saved=ys + sum(block.p for block in blocks) + patches,
        workspace=kernels.workspace_bytes(batch, layers[int(has_image_block) :], planes, device, precision),
    )


def _plane_blocks(
    layers: Sequence[ConvLayer], weights: Sequence[WeightBytes], pixel_bytes: int, norm: bool
) -> list[BlockBytes]:
    """Return the bytes of blocks that store their planes; a pixel of a plane takes `pixel_bytes`, for all samples together."""
    blocks, x = list[BlockBytes](), 0
    for layer, weight in zip(layers, weights, strict=True):
        y = pixel_bytes * layer.filters * layer.out_height * layer.out_width
        p = pixel_bytes * layer.filters * (layer.out_height // 2) * (layer.out_width // 2)
        blocks.append(BlockBytes(x, y, y if norm else 0, p, weight, ImageBlockBytes()))
        x = p
    return blocks


def _backward_peak(earlier: Sequence[BlockBytes], block: BlockBytes, later: Sequence[BlockBytes]) -> int:
    """Return the peak of `Block.backward` in `gradient`: ȳ overwrites y."""
    activations = sum(each.x + each.y for each in (*earlier, block))
    # the caller holds p̄ beside the copies too, but `WeightBytes` allows for the summands of `gradient_jvp`, which are more
    weight_peak, input_peak = activations + block.weight.copies, activations + block.p + block.weight.parts
    p_bar_parts = later[0].weight.parts if later else 0
    peak: int = max(weight_peak, input_peak) + p_bar_parts + block.image_block.sums + _summands(block, later)
    return peak


def _saving_backward_peak(earlier: Sequence[BlockBytes], block: BlockBytes, later: Sequence[BlockBytes]) -> int:
    """Return the peak of `Block.backward` in `gradient` with save=True: ȳ does not overwrite y; all y and all p̄ so far stay."""
    saved = sum(each.y for each in (*earlier, block, *later)) + sum(each.p for each in (block, *later))
    live = sum(each.x for each in (*earlier, block)) + block.y + saved
    p_bar_parts = later[0].weight.parts if later else 0
    operation = max(block.weight.copies, block.weight.parts) + block.image_block.sums
    peak: int = live + operation + p_bar_parts + _summands(block, later)
    return peak


def _saved_dual_forward_peak(earlier: Sequence[BlockBytes], block: BlockBytes, later: Sequence[BlockBytes]) -> int:
    """Return the peak of `Block.dual` in `gradient_jvp` with saved activations: the y of later blocks are there already."""
    activations = sum(2 * each.x + each.y + each.y_dot for each in earlier) + 2 * (block.x + block.y + block.p)
    return activations + sum(each.y for each in later)


def _dual_backward_peak(earlier: Sequence[BlockBytes], block: BlockBytes, later: Sequence[BlockBytes]) -> int:
    """Return the peak of `Block.dual_backward` in `gradient_jvp`: ȳ and ȳ̇ overwrite y and ẏ, and the caller holds p̄ and p̄̇."""
    live = sum(2 * each.x + each.y + each.y_dot for each in earlier) + 2 * (block.x + block.y + block.p)
    p_bar_parts = later[0].weight.dual_parts if later else 0
    image_block = block.image_block.linear + max(block.image_block.columns, block.image_block.dual_sums)
    operation = max(block.weight.dual_copies, block.weight.dual_parts) + image_block
    peak: int = live + operation + p_bar_parts + _summands(block, later)
    return peak


def _summands(block: BlockBytes, later: Sequence[BlockBytes]) -> int:
    """Return the bytes of the summands of the gradients, from the last block to this one."""
    return sum(each.weight.summands for each in (block, *later))
