"""ConvNet's gradient and its directional derivative, scheduled by hand over `mtt_fast.kernels`: no autograd graph.

The formulas are derived in docs/adjoint.md. Of each block a step saves the input x, the convolution's output y, their
tangents, and the statistics of the planes; nothing else that is as large as an image. Of the first block it saves no y
where a back end needs none. A dot is the derivative in direction v, a bar the gradient of the loss. fused_blocks.py has
the blocks.

If it is asked to, `gradient` saves for `gradient_jvp` y of each block and the gradient of the loss to the block's
result p. With these the derivative needs no convolution of a primal: it costs 6 F in place of 8 F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.fused_blocks import EPILOGUES, Block, ImageBlock, Parameters, PlaneBlock, Tensors, plane_dtype
from mtt_fast.engine.student import GradientTangent, SavedActivations, StepBytes, StepGradient
from mtt_fast.kernels import ConvLayer, LabelKind, Precision
from mtt_fast.networks.convnet import ConvNet

_LARGEST_DIRECTION = 1.0


@dataclass(frozen=True)
class FusedConvNetStudent:
    """A `Student` for `ConvNet` under cross-entropy, with labels of one kind; float32 or float64.

    `precision` is that of the factors of float32 convolutions; a CPU's kernels know fp32 alone. With fp16 or bf16 all that
    has pixels is float16 or bfloat16 but for the images that are given and their gradient: half the memory. With fp16 the
    direction and the cotangents are scaled by powers of two, which are taken out exactly, as all is linear in them; a number
    that is too large all the same makes results that are not finite. float64 stays float64.
    """

    network: ConvNet
    label_kind: LabelKind = "indices"
    precision: Precision = "fp32"

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        parameters, classifier = self._parts(theta)
        blocks = self._blocks(images, parameters, [None] * self.network.depth)
        x = blocks[0].inputs(images)
        activations = []
        for block in blocks:
            x, held = block.forward(x)
            activations.append(held)
            del held

        x_bar: Tensor | None
        loss, x_bar, *classifier_bar, scale = kernels.linear_cross_entropy(x, *classifier, labels, self.label_kind)
        del x

        saved: SavedActivations = [scale]
        gradients: list[Sequence[Tensor]] = [classifier_bar]
        for block in reversed(blocks):
            assert x_bar is not None
            if save:
                saved.append((block.to_save(activations[-1]), x_bar))
            x_bar, parameters_bar = block.backward(activations.pop(), x_bar, not save)
            gradients.append(parameters_bar)
        return StepGradient(loss, self._flat(gradients, scale), saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        direction_scale = self._direction_scale(v)
        parameters, classifier = self._parts(theta)
        directions, classifier_dot = self._parts(v if direction_scale is None else v * direction_scale)
        blocks = self._blocks(images, parameters, directions)
        x, x_dot = blocks[0].inputs(images), None
        activations, saved_bars = [], []
        for block in blocks:
            of_block, saved_bar = saved.pop() if saved is not None else (None, None)
            saved_bars.append(saved_bar)
            x, x_dot, held = block.dual(x, x_dot, of_block)
            activations.append(held)
            del of_block, held

        assert x_dot is not None
        # p̄ that were saved have the factor of the step that saved them, and their derivatives need the same
        scale = None if saved is None else saved.pop()
        x_bar: Tensor | None
        v_dot_g, x_bar, x_bar_dot, *classifier_bar_dot, labels_bar_dot, scale = kernels.linear_cross_entropy_dual(
            x, x_dot, *classifier, *classifier_dot, labels, self.label_kind, scale, direction_scale
        )
        del x, x_dot

        derivatives: list[Sequence[Tensor]] = [classifier_bar_dot]
        for block in reversed(blocks):
            saved_bar = saved_bars.pop()
            p_bar = x_bar if saved_bar is None else saved_bar
            assert p_bar is not None
            x_bar, x_bar_dot, parameters_bar_dot = block.dual_backward(
                activations.pop(), p_bar, x_bar_dot, saved_bar is None
            )
            derivatives.append(parameters_bar_dot)
        hessian_v, images_bar_dot = self._flat(derivatives, scale), x_bar_dot.to(theta.dtype).contiguous()
        if scale is not None and direction_scale is not None:
            hessian_v.div_(direction_scale)
            images_bar_dot.div_(direction_scale).div_(scale)
        return GradientTangent(v_dot_g, hessian_v, images_bar_dot, labels_bar_dot)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 F and 8 F, of which two are the primal's."""
        return 11, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`. The sums follow the schedule above."""
        layers = self._layers(image_shape)
        of_planes = plane_dtype(dtype, self.precision).itemsize
        each, parameters = batch * of_planes, dtype.itemsize * self.network.num_parameters
        features = each * self.network.width * math.prod(self.network.feature_size)
        # of each block: x but for the images, y, and the epilogue's output
        xs = [0, *(each * layer.channels * layer.height * layer.width for layer in layers[1:])]
        ys = [each * layer.filters * layer.out_height * layer.out_width for layer in layers]
        pooled = [*xs[1:], features]
        small = each * image_shape.numel() + parameters  # channels last; the layers' results
        patches = columns = 0
        if self._has_image_block(image_shape, device):
            ys[0] = 0
            patches, folded, columns = _bytes_without_planes(layers[0], batch, of_planes, dtype)
            small = patches + folded + parameters
        if self.precision == "fp16":
            small += parameters  # the scaled direction
        forward_sweep = sum(xs) + sum(ys) + 3 * features
        tangents = 2 if self.network.norm == "instance" else 1  # without a norm ẏ is not saved
        backward_sweep = [
            2 * (sum(xs[: block + 1]) + ys[block] + pooled[block]) + tangents * sum(ys[:block])
            for block in range(len(layers))
        ]
        backward_sweep[0] += columns
        # at the classifier p̄ and p, with their tangents, and on a CPU one of them in the public code's order too
        backward_sweep[-1] += 3 * features
        return StepBytes(
            # at the end there are the results once more, as a vector
            gradient=max(forward_sweep, parameters) + small,
            gradient_saving=forward_sweep + max(*ys, parameters - forward_sweep) + small,  # ȳ is not written over y
            gradient_jvp=max(*backward_sweep, parameters) + small,
            gradient_jvp_saved=max(max(backward_sweep) - sum(ys), parameters) + small,
            saved=sum(ys) + sum(pooled) + patches,
            work=kernels.work_bytes(batch, layers, dtype, device),
        )

    def _layers(self, image_shape: torch.Size) -> list[ConvLayer]:
        channels, height, width = image_shape
        layers = []
        for block in range(self.network.depth):
            padding = self._padding(block)
            layers.append(ConvLayer(channels, height, width, self.network.width, padding))
            channels = self.network.width
            height, width = ((side + 2 * padding - 2) // 2 for side in (height, width))
        return layers

    def _blocks(
        self, images: Tensor, parameters: Sequence[Parameters], directions: Sequence[Parameters | None]
    ) -> list[Block]:
        """Return the blocks at their parameters; the first one without planes where a back end has that."""
        epilogue, precision = EPILOGUES[self.network.norm], self.precision
        blocks: list[Block] = [
            PlaneBlock(epilogue, at, along, self._padding(number), precision, number == 0)
            for number, (at, along) in enumerate(zip(parameters, directions, strict=True))
        ]
        if self._has_image_block(images.shape[1:], images.device):
            blocks[0] = ImageBlock(parameters[0], directions[0], self._padding(0), precision)
        return blocks

    def _has_image_block(self, image_shape: torch.Size, device: torch.device) -> bool:
        return self.network.norm == "instance" and kernels.has_image_block(self._layers(image_shape)[0], device)

    def _parts(self, theta: Tensor) -> tuple[list[Parameters], Tensors]:
        """Return views of the parameters of each block that have an effect, and of the classifier's two.

        In front of an instance norm the convolution's bias has none, so its gradient is exactly zero.
        """
        *blocks, classifier = self.network.split(theta)
        affine = 2 if self.network.norm == "instance" else 1
        return [Parameters(block[0], block[affine:]) for block in blocks], classifier

    def _flat(self, layers: Sequence[Sequence[Tensor]], scale: Tensor | None) -> Tensor:
        """Return the flat vector (P,) of results of the layers, the last layer's first, which have a factor `scale`."""
        classifier, *blocks = layers
        bias = (classifier[0].new_zeros(self.network.width),) if self.network.norm == "instance" else ()
        pieces = [piece for weight, *affine in reversed(blocks) for piece in (weight, *bias, *affine)]
        vector = torch.cat([piece.flatten() for piece in (*pieces, *classifier)])
        return vector if scale is None else vector.div_(scale)

    def _direction_scale(self, v: Tensor) -> Tensor | None:
        """Return the power of two by which what is linear in `v` stays in the range of the planes; None if that is float32's."""
        is_half = plane_dtype(v.dtype, self.precision) == torch.float16
        return kernels.power_of_two(_LARGEST_DIRECTION, v) if is_half else None

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1


def _bytes_without_planes(layer: ConvLayer, batch: int, of_planes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return what a first block without planes takes: of patches, of folded weights, and of the patches of x̄̇."""
    terms = 16 if layer.channels == 1 else 32
    padded = layer.channels * (layer.out_height + 2) * (layer.out_width + 2)
    patches = of_planes * padded + dtype.itemsize * (9 * layer.channels + 1) ** 2
    folded = 2 * of_planes * terms * layer.filters
    columns = of_planes * terms * layer.out_height * layer.out_width
    return batch * patches, batch * folded, batch * columns
