"""ConvNet's gradient and its directional derivative, scheduled by hand over `mtt_fast.kernels`: no autograd graph.

The formulas are derived in docs/adjoint.md. Of each block a step saves the input x, the convolution's output y, their
tangents, and the statistics of the planes; nothing else that is as large as an image. A dot is the derivative in
direction v, a bar the gradient of the loss. What follows the convolution is in fused_blocks.py.

If it is asked to, `gradient` saves for `gradient_jvp` y of each block and the gradient of the loss to the block's
result p. With these the derivative needs no convolution of a primal: it costs 6 F in place of 8 F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.fused_blocks import EPILOGUES, Convolution, Tensors
from mtt_fast.engine.scaling import power_of_two
from mtt_fast.engine.student import GradientTangent, SavedActivations, StepBytes, StepGradient
from mtt_fast.kernels import HALF_PRECISIONS, Activations, ConvLayer, LabelKind, Precision
from mtt_fast.networks.convnet import ConvNet

_LARGEST_DIRECTION, _LARGEST_COTANGENT = 1.0, 64.0


@dataclass(frozen=True)
class FusedConvNetStudent:
    """A `Student` for `ConvNet` under cross-entropy, with labels of one kind; float32 or float64.

    `precision` is that of the factors of float32 convolutions; a CPU's kernels know fp32 alone. With fp16 or bf16 all that
    has pixels is float16 or bfloat16 but for the images that are given and their gradient: half the memory. With fp16 the
    direction and the cotangents are scaled by powers of two (mtt_fast/engine/scaling.py); a number that is too large all the
    same makes results that are not finite. float64 stays float64.
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
        activations = []
        for block, (weight, affine) in enumerate(blocks):
            y = kernels.conv3x3(x, weight, self._padding(block), self.precision)
            pooled, plane_tensors = epilogue.forward(y, affine)
            del y
            activations.append((x, plane_tensors))
            x = pooled

        features = _features(x, theta.dtype)
        loss, f_bar, *classifier_bar = kernels.linear_cross_entropy(features, *classifier, labels, self.label_kind)
        _assign(classifier_gradient, classifier_bar)
        scale = self._scale(_LARGEST_COTANGENT, f_bar)
        x_bar = _pixels(f_bar if scale is None else f_bar * scale, x)

        # tensors are let go before the next ones are allocated, which may then take the memory
        saved: SavedActivations = [scale]
        for block in reversed(range(len(blocks))):
            (weight, affine), padding = blocks[block], self._padding(block)
            x, plane_tensors = activations.pop()
            if save:
                saved.append((plane_tensors[0], x_bar))
            y_bar, affine_bar = epilogue.backward(plane_tensors, affine, x_bar, not save)
            del plane_tensors
            weight_bar = kernels.conv3x3_weight_gradient(x, y_bar, padding, self.precision)
            del x
            if block > 0:
                x_bar = kernels.conv3x3_input_gradient(y_bar, weight, padding, self.precision)
            del y_bar
            to_weight, to_affine = block_gradients[block]
            _assign((to_weight, *to_affine), (weight_bar, *affine_bar), scale)
        return StepGradient(loss, gradient, saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        epilogue, (blocks, classifier) = EPILOGUES[self.network.norm], self._parts(theta)
        direction_scale = self._scale(_LARGEST_DIRECTION, v)
        block_dots, classifier_dot = self._parts(v if direction_scale is None else v * direction_scale)
        hessian_v = torch.zeros_like(theta)
        block_results, classifier_result = self._parts(hessian_v)
        convolutions = [
            Convolution(weight, weight_dot, self._padding(block), self.precision)
            for block, ((weight, _), (weight_dot, _)) in enumerate(zip(blocks, block_dots, strict=True))
        ]
        x, x_dot = self._first(images), None
        held: list[Activations] = []
        saved_bars = []
        for convolution, (_, affine), (_, affine_dot) in zip(convolutions, blocks, block_dots, strict=True):
            y, saved_bar = saved.pop() if saved is not None else (None, None)
            saved_bars.append(saved_bar)
            x, x_dot, activations = epilogue.dual(x, x_dot, convolution, affine, affine_dot, y)
            held.append(activations)
            del y, activations

        assert x_dot is not None
        features = (_features(x, theta.dtype), _features(x_dot, theta.dtype))
        v_dot_g, f_bar, f_bar_dot, *classifier_bar_dot, labels_bar_dot = kernels.linear_cross_entropy_dual(
            *features, *classifier, *classifier_dot, labels, self.label_kind
        )
        _assign(classifier_result, classifier_bar_dot)
        # p̄ that were saved have the factor of the step that saved them, and their derivatives need the same
        scale = self._scale(_LARGEST_COTANGENT, f_bar, f_bar_dot) if saved is None else saved.pop()
        x_bar: Tensor | None = _pixels(f_bar if scale is None else f_bar * scale, x)
        x_bar_dot = _pixels(f_bar_dot if scale is None else f_bar_dot * scale, x)
        del x, x_dot, features

        for block in reversed(range(len(blocks))):
            (_, affine), (_, affine_dot), saved_bar = blocks[block], block_dots[block], saved_bars.pop()
            p_bar = x_bar if saved_bar is None else saved_bar
            wants_x_bar = block > 0 and saved_bar is None
            x_bar, x_bar_dot, weight_bar_dot, affine_bar_dot = epilogue.dual_backward(
                held.pop(), convolutions[block], affine, affine_dot, p_bar, x_bar_dot, wants_x_bar
            )
            to_weight, to_affine = block_results[block]
            _assign((to_weight, *to_affine), (weight_bar_dot, *affine_bar_dot), scale)
        images_bar_dot = x_bar_dot.to(theta.dtype).contiguous()
        if scale is not None and direction_scale is not None:
            for result in (v_dot_g, hessian_v, images_bar_dot, labels_bar_dot):
                if result is not None:
                    result.div_(direction_scale)
            images_bar_dot.div_(scale)
        return GradientTangent(v_dot_g, hessian_v, images_bar_dot, labels_bar_dot)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`: 3 F and 8 F, of which two are the primal's."""
        return 11, 9

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`. The sums follow the schedule above; only a CPU's kernels write ȳ over y."""
        layers = self._layers(image_shape)
        each = batch * self._plane_dtype(dtype).itemsize
        features = batch * dtype.itemsize * self.network.width * math.prod(self.network.feature_size)
        # of each block: x but for the images, y, and the epilogue's output
        xs = [0, *(each * layer.channels * layer.height * layer.width for layer in layers[1:])]
        ys = [each * layer.filters * layer.out_height * layer.out_width for layer in layers]
        pooled = [*xs[1:], features]
        # images channels last, and, where planes are narrower, their gradient in both dtypes; the result; v scaled
        vectors = 2 if self._plane_dtype(dtype) == torch.float16 else 1
        in_both = (each + batch * dtype.itemsize) if each < batch * dtype.itemsize else 0
        small = (each + in_both) * image_shape.numel() + vectors * dtype.itemsize * self.network.num_parameters
        fresh = 0 if device.type == "cpu" else 1
        forward_sweep = sum(xs) + sum(ys) + 3 * features + fresh * ys[0]
        tangents = 2 if self.network.norm == "instance" else 1  # without a norm ẏ is not saved
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
        """Return views of the convolution's weight and the affine parameters of each block, and of the classifier's two.

        In front of an instance norm the convolution's bias has no effect, so its gradient is exactly zero.
        """
        *blocks, classifier = self.network.split(theta)
        affine = 2 if self.network.norm == "instance" else 1
        return [(block[0], block[affine:]) for block in blocks], classifier

    def _first(self, images: Tensor) -> Tensor:
        """Return the images in the dtype and memory format of the first block."""
        return images.to(self._plane_dtype(images.dtype), memory_format=torch.channels_last)

    def _plane_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of all that has pixels, for parameters of `dtype`."""
        return HALF_PRECISIONS.get(self.precision, dtype) if dtype == torch.float32 else dtype

    def _scale(self, largest: float, *tensors: Tensor) -> Tensor | None:
        """Return the power of two by which what is linear in `tensors` stays in the range of the planes; None if that is float32's."""
        return power_of_two(largest, *tensors) if self._plane_dtype(tensors[0].dtype) == torch.float16 else None

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1


def _features(pooled: Tensor, dtype: torch.dtype) -> Tensor:
    return pooled.to(dtype).contiguous().flatten(1)  # (b, C, h, w) -> (b, C·h·w), in the public code's order


def _pixels(features: Tensor, like: Tensor) -> Tensor:
    return features.view(like.shape).to(like.dtype, memory_format=torch.channels_last)


def _assign(targets: Tensors, values: list[Tensor] | Tensors, scale: Tensor | None = None) -> None:
    """Copy `values` to `targets`, without the factor `scale` that they were computed with."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value if scale is None else value / scale)
