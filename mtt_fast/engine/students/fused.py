"""ConvNet's gradient and its directional derivative by hand-written formulas over `mtt_fast.kernels`, without autograd.

docs/adjoint.md derives the formulas; fused_blocks.py has the blocks. A name with `_dot` is the derivative in direction v, one
with `_bar` the gradient of the loss. Between its forward and its backward part a step keeps, for each block, only the input x,
the convolution's output y, their tangents, and the statistics of the planes. Some back ends do not need y of the first block.

With `save=True`, `gradient` saves for `gradient_jvp` the y of each block, and p̄, the gradient of the block's output p. Then
`gradient_jvp` does not repeat the primal convolutions, and costs 6 F in place of 8 F (F: the convolutions of one forward pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.students.batch import Inputs, batch_images, gathered
from mtt_fast.engine.students.fused_blocks import EPILOGUES, Block, ImageBlock, Parameters, PlaneBlock, Tensors
from mtt_fast.engine.students.fused_head import Head
from mtt_fast.engine.students.fused_step_bytes import fused_step_bytes
from mtt_fast.engine.students.generic import check_labels
from mtt_fast.engine.students.protocol import GradientTangent, Loss, SavedActivations, StepBytes, StepGradient
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

_LARGEST_DIRECTION = 1.0  # largest magnitude to which fp16 scales the direction


@dataclass(frozen=True)
class FusedConvNetStudent:
    """Compute a step of `ConvNet` with cross-entropy or a user's `loss`, in float32 or float64.

    `precision` is the format to which the factors of float32 convolutions are rounded; a CPU emulates it, which takes longer.
    With fp16 or bf16 all planes except the given images and their gradient are float16 or bfloat16, in half the memory. With fp16
    the direction and the cotangents are scaled by powers of two. All results are linear in them, so the scales are removed
    exactly. A value that is still too large makes the results not finite. float64 stays float64.
    """

    network: ConvNet
    label_kind: LabelKind = "indices"
    precision: Precision = "fp32"
    loss: Loss | None = None
    """in place of the cross-entropy with labels of `label_kind`"""

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`. Raises `InputError` for labels that do not fit."""
        self._check_labels(labels, images, theta)
        packed, x = self._pack(theta, None, images)
        parameters, classifier = self._layer_parameters(theta, packed.weights)
        blocks = self._blocks(x, parameters, [None] * self.network.depth)
        activations = []
        for block in blocks:
            x, held = block.forward(x)
            activations.append(held)
            del held

        assert isinstance(x, Tensor)
        x_bar: Convolved | None
        loss, x_bar, *classifier_bar, scale = self._head.gradient(x, classifier, labels)
        del x

        saved: SavedActivations = [scale]
        gradients: list[Sequence[Tensor]] = [classifier_bar]
        for block in reversed(blocks):
            assert x_bar is not None
            if save:
                saved.append((block.to_save(activations[-1]), planes_of(x_bar)))
            x_bar, parameters_bar = block.backward(activations.pop(), x_bar, reuse=not save)
            gradients.append(parameters_bar)
        sums = self._sums(gradients, () if scale is None else (scale,))
        return StepGradient(loss, sums, saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`. Raises `InputError` for labels that do not fit."""
        self._check_labels(labels, images, theta)
        packed, x = self._pack(theta, v, images, None if saved is None else saved[-1][0])
        parameters, classifier = self._layer_parameters(theta, packed.weights)
        directions, classifier_dot = self._layer_parameters(packed.direction, packed.weights_dot)
        blocks = self._blocks(x, parameters, directions)
        x_dot, activations, saved_bars = None, [], []
        for block in blocks:
            saved_of_block, saved_bar = saved.pop() if saved is not None else (None, None)
            saved_bars.append(saved_bar)
            x, x_dot, held = block.dual(x, x_dot, saved_of_block)
            activations.append(held)
            del saved_of_block, held

        assert isinstance(x, Tensor)
        assert x_dot is not None
        # the saved p̄ were scaled by the step that saved them, so their derivatives need the same scale
        scale = None if saved is None else saved.pop()
        x_bar: Convolved | None
        x_bar_dot: Convolved
        v_dot_g, x_bar, x_bar_dot, *classifier_bar_dot, labels_bar_dot, scale, loss = self._head.gradient_jvp(
            x, x_dot, classifier, classifier_dot, labels, scale, packed.scale
        )
        del x, x_dot

        scales = tuple(each for each in (packed.scale, scale) if each is not None)
        derivatives: list[Sequence[Tensor]] = [classifier_bar_dot]
        for block in reversed(blocks):
            saved_bar = saved_bars.pop()
            p_bar = x_bar if saved_bar is None else saved_bar
            assert p_bar is not None
            x_bar, x_bar_dot, parameters_bar_dot = block.dual_backward(
                activations.pop(), p_bar, x_bar_dot, needs_x_bar=saved_bar is None, divisors=scales
            )
            derivatives.append(parameters_bar_dot)
        assert isinstance(x_bar_dot, Tensor)
        return GradientTangent(v_dot_g, self._sums(derivatives, scales), x_bar_dot, labels_bar_dot, loss)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 + 8. With saved activations the backward sweep does not repeat 2 primal passes."""
        return 11, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`."""
        layers, has_image_block = self.layers(image_shape), self._has_image_block(image_shape, device)
        return fused_step_bytes(
            self.network, layers, has_image_block, batch, dtype, device, self.precision, has_loss=self.loss is not None
        )

    def layers(self, image_shape: torch.Size) -> list[ConvLayer]:
        """Return the convolution of each block, for images (C, H, W)."""
        channels, height, width = image_shape
        layers = []
        for block in range(self.network.depth):
            padding = self._padding(block)
            layers.append(ConvLayer(channels, height, width, self.network.width, padding))
            channels = self.network.width
            height, width = ((side + 2 * padding - 2) // 2 for side in (height, width))
        return layers

    @property
    def _head(self) -> Head:
        return Head(self.label_kind, self.loss)

    def _check_labels(self, labels: Tensor, images: Inputs, theta: Tensor) -> None:
        if self.loss is None:
            check_labels(labels, self.label_kind, len(images), self.network.num_classes, theta.dtype)

    def _blocks(
        self, x: Tensor | Patches, parameters: Sequence[Parameters], directions: Sequence[Parameters | None]
    ) -> list[Block]:
        """Return the blocks with their parameters and directions. The first is an `ImageBlock` if its input `x` are patches."""
        epilogue, precision = EPILOGUES[self.network.norm], self.precision
        blocks: list[Block] = [
            PlaneBlock(epilogue, *each, self._padding(number), precision, is_first=number == 0)
            for number, each in enumerate(zip(parameters, directions, strict=True))
        ]
        if isinstance(x, Patches):
            blocks[0] = ImageBlock(parameters[0], directions[0], precision)
        return blocks

    def _has_image_block(self, image_shape: torch.Size, device: torch.device) -> bool:
        return self.network.norm == "instance" and kernels.has_image_block(self.layers(image_shape)[0], device)

    def _pack(
        self, theta: Tensor, v: Tensor | None, images: Inputs, saved: Any = None
    ) -> tuple[PackedParameters, Tensor | Patches]:
        """Return the weights of `theta` and of the direction `v` in the layout of the convolutions, and the images for the first block.

        An `ImageBlock` takes its weight unpacked, and the images as patches (`saved`, if given). Any other first block takes the
        images in channels_last.
        """
        has_image_block = self._has_image_block(images.shape[1:], images.device)
        places = [
            WeightPlace(block[0].storage_offset() - theta.storage_offset(), *block[0].shape[:2])
            for block in self.network.split(theta)[int(has_image_block) : self.network.depth]
        ]
        batch = None
        if has_image_block and saved is None:
            batch = batch_images(images, self.network.first_padding)
        packed = kernels.pack_parameters(theta, v, places, self.precision, _LARGEST_DIRECTION, batch)
        if has_image_block:
            return packed, saved if packed.patches is None else packed.patches
        dtype = plane_dtype(theta.dtype, self.precision)
        return packed, gathered(images).to(dtype, memory_format=torch.channels_last)

    def _layer_parameters(self, vector: Tensor | None, packed: Sequence[Weight]) -> tuple[list[Parameters], Tensors]:
        """Return the parameters of each block, and the weight and bias of the classifier, from a `vector` (P,).

        `packed` are the weights of the last blocks. The bias of a convolution before an instance norm is left out: it has no effect,
        and its gradient is exactly zero.
        """
        assert vector is not None
        *blocks, classifier = self.network.split(vector)
        affine = 2 if self.network.norm == "instance" else 1
        weights = [*(block[0] for block in blocks[: len(blocks) - len(packed)]), *packed]
        return [Parameters(weight, block[affine:]) for weight, block in zip(weights, blocks, strict=True)], classifier

    def _sums(self, layers: Sequence[Sequence[Tensor]], scales: Tensors) -> PartialSums:
        """Return the partial sums of the gradient (P,) from the layers' gradients, last layer first; `scales` are their divisors."""
        classifier, *blocks = layers
        # the gradient of a bias before an instance norm is zero: no summands
        biases = (classifier[0].new_empty(0, self.network.width),) if self.network.norm == "instance" else ()
        pieces = [piece for weight, *affine in reversed(blocks) for piece in (weight, *biases, *affine)]
        pieces += [piece[None] for piece in classifier]
        return PartialSums(tuple(pieces), scales)

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1
