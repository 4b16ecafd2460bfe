"""ConvNet's gradient and its directional derivative, scheduled by hand over `mtt_fast.kernels`: no autograd graph.

The formulas are derived in docs/adjoint.md. Of each block a step keeps the input x, the convolution's output y, their
tangents, and a few numbers a plane; nothing else that is as large as an image. A dot is the derivative in direction v, a
bar the gradient of the loss. What follows the convolution is in block_ends.py.

What `gradient` keeps for `gradient_jvp`, if it is asked to, are of each block y and the gradient of the loss to the
block's result p. With those the derivative needs no convolution of a primal: it costs 6 F in place of 8 F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.block_ends import BLOCK_ENDS, Tensors
from mtt_fast.convnet import ConvNet
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.student import GradientTangent, Kept, StepGradient

# Peak of a step over the tensors it holds: 1.13 measured at 32 to 128 pixels, for the convolutions' work space, and up
# to 1.44 with what glibc's allocator keeps between them.
_OVER_LIVE = 1.45


@dataclass(frozen=True)
class FusedConvNetStudent:
    """A `Student` for `ConvNet` under cross-entropy, with labels of one kind; float32 or float64.

    `precision` is that of the factors of float32 convolutions; the twins of a CPU know fp32 alone.
    """

    network: ConvNet
    label_kind: LabelKind = "indices"
    precision: Precision = "fp32"

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        end, (blocks, classifier) = BLOCK_ENDS[self.network.norm], self._parts(theta)
        gradient = torch.zeros_like(theta)
        block_gradients, classifier_gradient = self._parts(gradient)
        x = _channels_last(images)
        held = []
        for block, (weight, affine) in enumerate(blocks):
            y = kernels.conv3x3(x, weight, self._padding(block), self.precision)
            pooled, of_y = end.forward(y, affine)
            del y
            held.append((x, of_y))
            x = pooled

        loss, f_bar, *found = kernels.linear_cross_entropy(_features(x), *classifier, labels, self.label_kind)
        _assign(classifier_gradient, found)
        x_bar = _channels_last(f_bar.view(x.shape))

        # Tensors are let go before the next ones are allocated, which may then take their place.
        kept: Kept = []
        for block in reversed(range(len(blocks))):
            (weight, affine), padding = blocks[block], self._padding(block)
            x, of_y = held.pop()
            if keep:
                kept.append((of_y[0], x_bar))
            y_bar, affine_bar = end.backward(of_y, affine, x_bar, not keep)
            del of_y
            weight_bar = kernels.conv3x3_weight_gradient(x, y_bar, padding, self.precision)
            del x
            if block > 0:
                x_bar = kernels.conv3x3_input_gradient(y_bar, weight, padding, self.precision)
            del y_bar
            to_weight, to_affine = block_gradients[block]
            _assign((to_weight, *to_affine), (weight_bar, *affine_bar))
        return StepGradient(loss, gradient, kept if keep else None)

    def gradient_jvp(
        self, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor, kept: Kept | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        end, (blocks, classifier) = BLOCK_ENDS[self.network.norm], self._parts(theta)
        block_dots, classifier_dot = self._parts(v)
        hessian_v = torch.zeros_like(theta)
        block_results, classifier_result = self._parts(hessian_v)
        x, x_dot = _channels_last(images), None
        held: list[tuple[Tensor, Tensor | None, Tensors]] = []
        known_bars = []
        for block, ((weight, affine), (weight_dot, affine_dot)) in enumerate(zip(blocks, block_dots, strict=True)):
            forwards = (x, x_dot, weight, weight_dot, self._padding(block), self.precision)
            if kept:
                y, x_bar = kept.pop()
                known_bars.append(x_bar)
                y_dot = kernels.conv3x3_tangent(*forwards)
            else:
                y, y_dot = kernels.conv3x3_dual(*forwards)
            pooled, pooled_dot, of_y = end.dual(y, y_dot, affine, affine_dot)
            del y, y_dot, forwards
            held.append((x, x_dot, of_y))
            x, x_dot = pooled, pooled_dot

        assert x_dot is not None
        v_dot_g, f_bar, f_bar_dot, *found, labels_bar_dot = kernels.linear_cross_entropy_dual(
            _features(x), _features(x_dot), *classifier, *classifier_dot, labels, self.label_kind
        )
        _assign(classifier_result, found)
        x_bar, x_bar_dot = _channels_last(f_bar.view(x.shape)), _channels_last(f_bar_dot.view(x.shape))

        for block in reversed(range(len(blocks))):
            (weight, affine), (weight_dot, affine_dot), padding = blocks[block], block_dots[block], self._padding(block)
            x, x_dot, of_y = held.pop()
            if known_bars:
                x_bar = known_bars.pop()
            y_bar, y_bar_dot, affine_bar_dot = end.dual_backward(of_y, affine, affine_dot, x_bar, x_bar_dot)
            del of_y
            weight_bar_dot = kernels.conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, self.precision)
            del x, x_dot
            backwards = (y_bar, y_bar_dot, weight, weight_dot, padding, self.precision)
            if block == 0 or known_bars:
                x_bar_dot = kernels.conv3x3_input_gradient_tangent(*backwards)
            else:
                x_bar, x_bar_dot = kernels.conv3x3_dual_input_gradient(*backwards)
            del y_bar, y_bar_dot, backwards
            to_weight, to_affine = block_results[block]
            _assign((to_weight, *to_affine), (weight_bar_dot, *affine_bar_dot))
        return GradientTangent(v_dot_g, hessian_v, x_bar_dot.contiguous(), labels_bar_dot)

    def sample_bytes(self, image_shape: torch.Size, dtype: torch.dtype) -> int:
        """See `Student.sample_bytes`: what the blocks keep, and ȳ and ȳ̇ of the block whose backward is under way."""
        height, width = (side + 2 * (self.network.first_padding - 1) for side in image_shape[1:])
        inputs, kept, peak = image_shape.numel(), 0, 0
        for _ in range(self.network.depth):
            outputs = 2 * self.network.width * height * width  # y and ẏ
            kept += inputs + outputs
            height, width = height // 2, width // 2
            inputs = 2 * self.network.width * height * width
            peak = max(peak, kept + outputs + inputs)
        return int(_OVER_LIVE * peak * dtype.itemsize)

    def _parts(self, theta: Tensor) -> tuple[list[tuple[Tensor, Tensors]], Tensors]:
        """Views of the convolution's weight and the affine parameters of each block, and of the classifier's two.

        In front of an instance norm the convolution's bias has no effect, so its gradient is exactly zero.
        """
        *blocks, classifier = self.network.split(theta)
        affine = 2 if self.network.norm == "instance" else 1
        return [(block[0], block[affine:]) for block in blocks], classifier

    def _padding(self, block: int) -> int:
        return self.network.first_padding if block == 0 else 1


def _features(pooled: Tensor) -> Tensor:
    return pooled.contiguous().flatten(1)  # (b, C, h, w) -> (b, C·h·w), in the public code's order


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _assign(places: Tensors, values: list[Tensor] | Tensors) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
