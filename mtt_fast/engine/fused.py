"""ConvNet's gradient and its directional derivative, scheduled by hand over `mtt_fast.kernels`: no autograd graph.

The formulas are derived in docs/adjoint.md. Of each block a step saves the input x, the convolution's output y, their
tangents, and the statistics of the planes; nothing else that is as large as an image. Of the first block it saves no y
where a back end needs none. A dot is the derivative in direction v, a bar the gradient of the loss. fused_blocks.py has
the blocks.

On request `gradient` saves for `gradient_jvp` each block's y, and the gradient of the loss to the block's result p. With
these the derivative needs no convolution of a primal: it costs 6 F in place of 8 F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.batch import Inputs, batch_images, gathered
from mtt_fast.engine.fused_blocks import EPILOGUES, Block, ImageBlock, Parameters, PlaneBlock, Tensors
from mtt_fast.engine.step_checks import check_choices, check_saved, check_step
from mtt_fast.engine.student import GradientTangent, SavedActivations, StepBytes, StepGradient
from mtt_fast.errors import InputError
from mtt_fast.kernels import (
    ConvLayer,
    Convolved,
    LabelKind,
    PackedParameters,
    PartialSums,
    Patches,
    Precision,
    Weight,
    WeightPlace,
    plane_dtype,
    planes_of,
)
from mtt_fast.networks.convnet import ConvNet

_LARGEST_DIRECTION = 1.0


@dataclass(frozen=True)
class FusedConvNetStudent:
    """A `Student` for `ConvNet` under cross-entropy, with labels of one kind; float32 or float64.

    `precision` is that of the factors of float32 convolutions; a CPU's kernels know fp32 alone. With fp16 or bf16 all planes
    but the given images and their gradient are float16 or bfloat16, in half the memory. With fp16 the direction and the
    cotangents are scaled by powers of two; all results are linear in them, so the scales are removed exactly. A number that is
    still too large makes the results not finite. float64 stays float64.
    """

    network: ConvNet
    label_kind: LabelKind = "indices"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not isinstance(self.network, ConvNet):
            raise InputError(f"`network`: expected a ConvNet, found {type(self.network).__name__}; use student_for")
        check_choices(self.label_kind, self.precision)

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`. Raises `InputError` for tensors that do not fit the network or each other."""
        check_step(self.network, self.label_kind, images, labels, theta)
        packed, x = self._begin(theta, None, images)
        parameters, classifier = self._parts(theta, packed.weights)
        blocks = self._blocks(images, parameters, [None] * self.network.depth)
        activations = []
        for block in blocks:
            x, held = block.forward(x)
            activations.append(held)
            del held

        assert isinstance(x, Tensor)
        x_bar: Convolved | None
        loss, x_bar, *classifier_bar, scale = kernels.linear_cross_entropy(x, *classifier, labels, self.label_kind)
        del x

        saved: SavedActivations = [scale]
        gradients: list[Sequence[Tensor]] = [classifier_bar]
        for block in reversed(blocks):
            assert x_bar is not None
            if save:
                saved.append((block.to_save(activations[-1]), planes_of(x_bar)))
            x_bar, parameters_bar = block.backward(activations.pop(), x_bar, not save)
            gradients.append(parameters_bar)
        sums = self._sums(gradients, () if scale is None else (scale,))
        return StepGradient(loss, sums, saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`. Raises `InputError` for tensors that do not fit, and activations that are used up."""
        check_step(self.network, self.label_kind, images, labels, theta, v=v)
        check_saved(saved, self.network, images)
        packed, x = self._begin(theta, v, images, None if saved is None else saved[-1][0])
        parameters, classifier = self._parts(theta, packed.weights)
        directions, classifier_dot = self._parts(packed.direction, packed.weights_dot)
        blocks = self._blocks(images, parameters, directions)
        x_dot, activations, saved_bars = None, [], []
        for block in blocks:
            of_block, saved_bar = saved.pop() if saved is not None else (None, None)
            saved_bars.append(saved_bar)
            x, x_dot, held = block.dual(x, x_dot, of_block)
            activations.append(held)
            del of_block, held

        assert isinstance(x, Tensor)
        assert x_dot is not None
        # p̄ that were saved have the factor of the step that saved them, and their derivatives need the same
        scale = None if saved is None else saved.pop()
        x_bar: Convolved | None
        x_bar_dot: Convolved
        v_dot_g, x_bar, x_bar_dot, *classifier_bar_dot, labels_bar_dot, scale = kernels.linear_cross_entropy_dual(
            x, x_dot, *classifier, *classifier_dot, labels, self.label_kind, scale, packed.scale
        )
        del x, x_dot

        scales = tuple(each for each in (packed.scale, scale) if each is not None)
        derivatives: list[Sequence[Tensor]] = [classifier_bar_dot]
        for block in reversed(blocks):
            saved_bar = saved_bars.pop()
            p_bar = x_bar if saved_bar is None else saved_bar
            assert p_bar is not None
            x_bar, x_bar_dot, parameters_bar_dot = block.dual_backward(
                activations.pop(), p_bar, x_bar_dot, saved_bar is None, scales
            )
            derivatives.append(parameters_bar_dot)
        assert isinstance(x_bar_dot, Tensor)
        return GradientTangent(v_dot_g, self._sums(derivatives, scales), x_bar_dot, labels_bar_dot)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 F and 8 F, of which two are the primal's."""
        return 11, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`. The sums follow the schedule above."""
        layers = self.layers(image_shape)
        of_planes = plane_dtype(dtype, self.precision).itemsize
        each, parameters = batch * of_planes, dtype.itemsize * self.network.num_parameters
        features = each * self.network.width * math.prod(self.network.feature_size)
        # of each block: x (of the first, the images, which are not counted), y, and the epilogue's output
        xs = [0, *(each * layer.channels * layer.height * layer.width for layer in layers[1:])]
        ys = [each * layer.filters * layer.out_height * layer.out_width for layer in layers]
        pooled = [*xs[1:], features]
        of_products = (plane_dtype(dtype, self.precision), device, self.precision)
        weights, convolved = kernels.weight_bytes(batch, layers, *of_products), layers
        packed, summands = sum(weight.packed for weight in weights), [weight.summands for weight in weights]
        of_weights = dtype.itemsize * sum(9 * layer.channels * layer.filters for layer in layers)
        small = each * image_shape.numel() + parameters - of_weights  # channels last; the other results
        image_block = ImageBlockBytes(0, 0, 0, 0, 0)
        if self._has_image_block(image_shape, device):
            ys[0], convolved = 0, layers[1:]
            image_block = image_block_bytes(layers[0], batch, of_planes, dtype)
            packed -= weights[0].packed
            summands[0] = batch * dtype.itemsize * (9 * layers[0].channels + 2) * layers[0].filters  # of each sample
            small = image_block.patches + image_block.folded + parameters - of_weights
        small += packed
        # of the direction, which fp16 scales
        along = packed + image_block.folded + (parameters if self.precision == "fp16" else 0)
        results = sum(summands) + parameters  # and their sum
        left = [sum(summands[block:]) for block in range(len(layers))]  # by the blocks that the backward has passed
        forward_sweep = sum(xs) + sum(ys) + 3 * features
        tangents = 2 if self.network.norm == "instance" else 1  # without a norm ẏ is not saved
        backward_sweep = [
            2 * (sum(xs[: block + 1]) + ys[block] + pooled[block]) + tangents * sum(ys[:block])
            for block in range(len(layers))
        ]
        dual_copies, dual_parts = [weight.dual_copies for weight in weights], [weight.dual_parts for weight in weights]
        backward_sweep = _with_work(backward_sweep, [2 * after for after in pooled], dual_copies, dual_parts)
        backward_sweep[0] += image_block.linear + max(image_block.columns, 2 * image_block.sums)
        # at the classifier p̄ and p, with their tangents, and on a CPU one of them in the public code's order too
        backward_sweep[-1] += 3 * features
        backward = [sum(xs[: block + 1]) + sum(ys[: block + 1]) + pooled[block] for block in range(len(layers))]
        copies, parts = [weight.copies for weight in weights], [weight.parts for weight in weights]
        backward = _with_work(backward, pooled, copies, parts)
        backward[0] += image_block.sums
        backward[-1] = max(forward_sweep, backward[-1])
        # ȳ is not written over y, and p̄ are saved
        saving = [
            sum(xs[: block + 1]) + sum(ys) + ys[block] + sum(pooled[block:]) + passed
            for block, passed in enumerate(left)
        ]
        saving = _with_work(saving, [0] * len(layers), copies, parts)
        saving[0] += image_block.sums
        both_sweeps = [planes + passed for planes, passed in zip(backward_sweep, left, strict=True)]
        return StepBytes(
            gradient=max(*(planes + passed for planes, passed in zip(backward, left, strict=True)), results) + small,
            gradient_saving=max(forward_sweep, *saving, results) + small,
            gradient_jvp=max(*both_sweeps, results) + small + along,
            gradient_jvp_saved=max(max(both_sweeps) - sum(ys), results) + small + along,
            saved=sum(ys) + sum(pooled) + image_block.patches,
            work=kernels.work_bytes(batch, convolved, *of_products),
        )

    def layers(self, image_shape: torch.Size) -> list[ConvLayer]:
        """Return the convolutions of the blocks, on images (C, H, W)."""
        channels, height, width = image_shape
        layers = []
        for block in range(self.network.depth):
            padding = self._padding(block)
            layers.append(ConvLayer(channels, height, width, self.network.width, padding))
            channels = self.network.width
            height, width = ((side + 2 * padding - 2) // 2 for side in (height, width))
        return layers

    def _blocks(
        self, images: Inputs, parameters: Sequence[Parameters], directions: Sequence[Parameters | None]
    ) -> list[Block]:
        """Return the blocks at their parameters; the first one without planes where a back end has that."""
        epilogue, precision = EPILOGUES[self.network.norm], self.precision
        blocks: list[Block] = [
            PlaneBlock(epilogue, at, along, self._padding(number), precision, number == 0)
            for number, (at, along) in enumerate(zip(parameters, directions, strict=True))
        ]
        if self._has_image_block(images.shape[1:], images.device):
            blocks[0] = ImageBlock(parameters[0], directions[0], precision)
        return blocks

    def _has_image_block(self, image_shape: torch.Size, device: torch.device) -> bool:
        return self.network.norm == "instance" and kernels.has_image_block(self.layers(image_shape)[0], device)

    def _begin(
        self, theta: Tensor, v: Tensor | None, images: Inputs, saved: Any = None
    ) -> tuple[PackedParameters, Tensor | Patches]:
        """Return the weights of all blocks with planes, and of the direction `v` if there is one, as products read them.

        Return also the images as the first block takes them: patches, unless they are `saved`, or channels_last planes.
        """
        without_planes = self._has_image_block(images.shape[1:], images.device)
        places = [
            WeightPlace(block[0].storage_offset() - theta.storage_offset(), *block[0].shape[:2])
            for block in self.network.split(theta)[int(without_planes) : self.network.depth]
        ]
        batch = None
        if without_planes and saved is None:
            batch = batch_images(images, self.network.first_padding)
        packed = kernels.pack_parameters(theta, v, places, self.precision, _LARGEST_DIRECTION, batch)
        if without_planes:
            return packed, saved if packed.patches is None else packed.patches
        dtype = plane_dtype(theta.dtype, self.precision)
        return packed, gathered(images).to(dtype, memory_format=torch.channels_last)

    def _parts(self, vector: Tensor | None, packed: Sequence[Weight]) -> tuple[list[Parameters], Tensors]:
        """Return the parameters of each block that have an effect, the last blocks' weights `packed`, and the classifier's two.

        In front of an instance norm the convolution's bias has none, so its gradient is exactly zero.
        """
        assert vector is not None
        *blocks, classifier = self.network.split(vector)
        affine = 2 if self.network.norm == "instance" else 1
        weights = [*(block[0] for block in blocks[: len(blocks) - len(packed)]), *packed]
        return [Parameters(weight, block[affine:]) for weight, block in zip(weights, blocks, strict=True)], classifier

    def _sums(self, layers: Sequence[Sequence[Tensor]], scales: Tensors) -> PartialSums:
        """Return the sums of the vector (P,) of all parameters from those of the layers, the last layer's first, less their factors."""
        classifier, *blocks = layers
        # a bias before an instance norm has no summand
        biases = (classifier[0].new_empty(0, self.network.width),) if self.network.norm == "instance" else ()
        pieces = [piece for weight, *affine in reversed(blocks) for piece in (weight, *biases, *affine)]
        pieces += [piece[None] for piece in classifier]
        return PartialSums(tuple(pieces), scales)

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1


def _with_work(bars: list[int], gone: list[int], copies: list[int], parts: list[int]) -> list[int]:
    """Return the bytes of each block on the way back: its `bars`, and what its convolution allocates.

    The gradient to the weight may need `copies`, after what is `gone` has been freed. The gradient to the input may be left in
    `parts`, which live until the block before this one has read them.
    """
    read = [*parts[1:], 0]
    return [
        max(whole + left, whole - after + copied) + taken
        for whole, after, copied, left, taken in zip(bars, gone, copies, parts, read, strict=True)
    ]


class ImageBlockBytes(NamedTuple):
    """Bytes that a first block without planes takes, and for how long."""

    patches: int  # to the end of the step
    folded: int  # the weights with the norm in them, to the end of the step; as many again in a direction
    sums: int  # U, while the gradients to the parameters are computed; as many again for U̇
    linear: int  # M, for the images' gradient alone
    columns: int  # the patches of x̄̇, likewise, after U


def image_block_bytes(layer: ConvLayer, batch: int, of_planes: int, dtype: torch.dtype) -> ImageBlockBytes:
    """Return the bytes of a first block without planes, whose planes would have `of_planes` bytes a number."""
    terms = 16 if layer.channels == 1 else 32
    padded = layer.channels * (layer.out_height + 2) * (layer.out_width + 2)
    of_sample = ImageBlockBytes(
        patches=of_planes * padded + dtype.itemsize * (9 * layer.channels + 1) ** 2,
        folded=of_planes * terms * layer.filters,
        sums=dtype.itemsize * terms * layer.filters,
        linear=dtype.itemsize * terms**2 * (layer.filters // 16),  # one for each block of filters, of 16 or more
        columns=of_planes * terms * layer.out_height * layer.out_width,
    )
    return ImageBlockBytes(*(batch * size for size in of_sample))
