"""ConvNet's gradient and its directional derivative, scheduled by hand over `mtt_fast.kernels`: no autograd graph.

The formulas are derived in docs/adjoint.md. Of each block a step keeps the input x, the convolution's output y, their
tangents, and the statistics of the planes; nothing else that is as large as an image. A dot is the derivative in
direction v, a bar the gradient of the loss. What follows the convolution is in block_ends.py.

What `gradient` keeps for `gradient_jvp`, if it is asked to, are of each block y and the gradient of the loss to the
block's result p. With those the derivative needs no convolution of a primal: it costs 6 F in place of 8 F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.fused_blocks import EPILOGUES, Convolution, Tensors
from mtt_fast.engine.student import GradientTangent, SavedActivations, StepBytes, StepGradient
from mtt_fast.kernels import Activations, ConvLayer, LabelKind, Precision
from mtt_fast.networks.convnet import ConvNet


@dataclass(frozen=True)
class FusedConvNetStudent:
    """A `Student` for `ConvNet` under cross-entropy, with labels of one kind; float32 or float64.

    `precision` is that of the factors of float32 convolutions; a CPU's kernels know fp32 alone. With bf16 all that has
    pixels is bfloat16 but for the images that are given and their gradient: half the memory. float64 stays float64.
    """

    network: ConvNet
    label_kind: LabelKind = "indices"
    precision: Precision = "fp32"

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        epilogue, (blocks, classifier) = EPILOGUES[self.network.norm], self._parts(theta)
        gradient = torch.zeros_like(theta)
        block_gradients, classifier_gradient = self._parts(gradient)
        x = self._first(images)
        held = []
        for block, (weight, affine) in enumerate(blocks):
            y = kernels.conv3x3(x, weight, self._padding(block), self.precision)
            pooled, of_y = epilogue.forward(y, affine)
            del y
            held.append((x, of_y))
            x = pooled

        features = _features(x, theta.dtype)
        loss, f_bar, *found = kernels.linear_cross_entropy(features, *classifier, labels, self.label_kind)
        _assign(classifier_gradient, found)
        x_bar = _pixels(f_bar, x)

        # Tensors are let go before the next ones are allocated, which may then take their place.
        saved: SavedActivations = []
        for block in reversed(range(len(blocks))):
            (weight, affine), padding = blocks[block], self._padding(block)
            x, of_y = held.pop()
            if save:
                saved.append((of_y[0], x_bar))
            y_bar, affine_bar = epilogue.backward(of_y, affine, x_bar, not save)
            del of_y
            weight_bar = kernels.conv3x3_weight_gradient(x, y_bar, padding, self.precision)
            del x
            if block > 0:
                x_bar = kernels.conv3x3_input_gradient(y_bar, weight, padding, self.precision)
            del y_bar
            to_weight, to_affine = block_gradients[block]
            _assign((to_weight, *to_affine), (weight_bar, *affine_bar))
        return StepGradient(loss, gradient, saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        epilogue, (blocks, classifier) = EPILOGUES[self.network.norm], self._parts(theta)
        block_dots, classifier_dot = self._parts(v)
        hessian_v = torch.zeros_like(theta)
        block_results, classifier_result = self._parts(hessian_v)
        convolutions = [
            Convolution(weight, weight_dot, self._padding(block), self.precision)
            for block, ((weight, _), (weight_dot, _)) in enumerate(zip(blocks, block_dots, strict=True))
        ]
        x, x_dot = self._first(images), None
        held: list[Activations] = []
        known_bars = []
        for convolution, (_, affine), (_, affine_dot) in zip(convolutions, blocks, block_dots, strict=True):
            y, known_bar = saved.pop() if saved else (None, None)
            known_bars.append(known_bar)
            x, x_dot, activations = epilogue.dual(x, x_dot, convolution, affine, affine_dot, y)
            held.append(activations)
            del y, activations

        assert x_dot is not None
        features = (_features(x, theta.dtype), _features(x_dot, theta.dtype))
        v_dot_g, f_bar, f_bar_dot, *found, labels_bar_dot = kernels.linear_cross_entropy_dual(
            *features, *classifier, *classifier_dot, labels, self.label_kind
        )
        _assign(classifier_result, found)
        x_bar: Tensor | None = _pixels(f_bar, x)
        x_bar_dot = _pixels(f_bar_dot, x)
        del x, x_dot, features

        for block in reversed(range(len(blocks))):
            (_, affine), (_, affine_dot), known_bar = blocks[block], block_dots[block], known_bars.pop()
            p_bar = x_bar if known_bar is None else known_bar
            wants_x_bar = block > 0 and known_bar is None
            x_bar, x_bar_dot, weight_bar_dot, affine_bar_dot = epilogue.dual_backward(
                held.pop(), convolutions[block], affine, affine_dot, p_bar, x_bar_dot, wants_x_bar
            )
            to_weight, to_affine = block_results[block]
            _assign((to_weight, *to_affine), (weight_bar_dot, *affine_bar_dot))
        return GradientTangent(v_dot_g, hessian_v, x_bar_dot.to(theta.dtype).contiguous(), labels_bar_dot)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 F and 8 F, of which two are the primal's."""
        return 11, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`. Follows the schedule above; only a CPU's kernels write ȳ over y."""
        layers = self._layers(image_shape)
        each = batch * dtype.itemsize
        features = each * self.network.width * math.prod(self.network.feature_size)
        # of each block: x but for the images, y, and what its end puts out
        xs = [0, *(each * layer.channels * layer.height * layer.width for layer in layers[1:])]
        ys = [each * layer.filters * layer.out_height * layer.out_width for layer in layers]
        pooled = [*xs[1:], features]
        small = each * image_shape.numel() + dtype.itemsize * self.network.num_parameters  # channels last; the result
        fresh = 0 if device.type == "cpu" else 1
        forward_sweep = sum(xs) + sum(ys) + 3 * features + fresh * ys[0]
        tangents = 2 if self.network.norm == "instance" else 1  # without a norm ẏ is not held
        backward_sweep = [
            2 * (sum(xs[: block + 1]) + (1 + fresh) * ys[block] + pooled[block]) + tangents * sum(ys[:block])
            for block in range(len(layers))
        ]
        backward_sweep[-1] += 5 * features  # of the classifier, p, f̄ and ȳ's in both formats, with their tangents
        return StepBytes(
            gradient=forward_sweep + small,
            gradient_saving=sum(xs) + sum(ys) + ys[0] + 3 * features + small,  # ȳ is not written over y
            gradient_jvp=max(backward_sweep) + small,
            gradient_jvp_saved=max(backward_sweep) - sum(ys) + small,
            saved=sum(ys) + sum(pooled),
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

    def _parts(self, theta: Tensor) -> tuple[list[tuple[Tensor, Tensors]], Tensors]:
        """Views of the convolution's weight and the affine parameters of each block, and of the classifier's two.

        In front of an instance norm the convolution's bias has no effect, so its gradient is exactly zero.
        """
        *blocks, classifier = self.network.split(theta)
        affine = 2 if self.network.norm == "instance" else 1
        return [(block[0], block[affine:]) for block in blocks], classifier

    def _first(self, images: Tensor) -> Tensor:
        """The images as the first block takes them."""
        narrow = self.precision == "bf16" and images.dtype == torch.float32
        return images.to(torch.bfloat16 if narrow else images.dtype, memory_format=torch.channels_last)

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1


def _features(pooled: Tensor, dtype: torch.dtype) -> Tensor:
    return pooled.to(dtype).contiguous().flatten(1)  # (b, C, h, w) -> (b, C·h·w), in the public code's order


def _pixels(features: Tensor, like: Tensor) -> Tensor:
    return features.view(like.shape).to(like.dtype, memory_format=torch.channels_last)


def _assign(places: Tensors, values: list[Tensor] | Tensors) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
