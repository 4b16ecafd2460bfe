"""Compute ConvNet's blocks (convolution, norm or bias, ReLU, pool) and their derivatives by `mtt_fast.kernels`.

A name with `_dot` is the derivative in the direction of the parameters, one with `_bar` the gradient of the loss. `PlaneBlock` stores
the planes between convolution and pool. `ImageBlock`, a first block that some back ends have, does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.kernels import Affine, Convolved, Folded, Patches, PlaneStats, Precision, Weight, planes_of, weight_of
from mtt_fast.networks.convnet import NORM_EPS, Norm

Tensors = tuple[Tensor, ...]


class Parameters(NamedTuple):
    """A block's weight (K, C, 3, 3), and either γ and β of its norm, or the convolution's bias."""

    weight: Weight
    affine: Tensors


class Block(Protocol):
    """One block with its parameters, and with their direction for `dual`. The format of its activations is private.

    Its input x is planes (B, C, H, W), or the patches of images.
    """

    def forward(self, x: Any) -> tuple[Tensor, Any]:
        """Return p (B, K, H'//2, W'//2), channels_last, and the activations."""
        ...

    def to_save(self, activations: Any) -> Any:
        """Return the part of the activations of `forward` that `dual` takes as `saved`, and does not compute again."""
        ...

    def backward(self, activations: Any, p_bar: Convolved, *, reuse: bool) -> tuple[Convolved | None, Tensors]:
        """Return x̄ (None for images), and summands of the parameters' gradients. With `reuse`, ȳ may overwrite y.

        The activations are consumed: each tensor is freed after its last use. x̄ may be partial sums (`kernels.PartialPlanes`).
        If `p_bar` is partial sums, they are added up and stored in `p_bar.planes`. In `dual_backward` the same holds for p̄, p̄̇,
        x̄ and x̄̇.
        """
        ...

    def dual(self, x: Any, x_dot: Tensor | None, saved: Any) -> tuple[Tensor, Tensor, Any]:
        """Return p, ṗ and the activations. `x_dot` is None for images, `saved` is None or the result of `to_save`."""
        ...

    def dual_backward(
        self, activations: Any, p_bar: Convolved, p_bar_dot: Convolved, *, needs_x_bar: bool, divisors: Tensors = ()
    ) -> tuple[Convolved | None, Convolved, Tensors]:
        """Return x̄ (None for images, and unless `needs_x_bar`), x̄̇, and summands of the derivatives of the parameters' gradients.

        x̄̇ of images is contiguous, of the parameters' dtype, and divided by the `divisors`, powers of two ().
        """
        ...


@dataclass(repr=False, eq=False)
class Activations:
    """Tensors that a `PlaneBlock` keeps from its forward for its backward."""

    x: Tensor  # (B, C, H, W)
    x_dot: Tensor | None  # None for images, which do not depend on the parameters
    y: Tensor  # (B, K, H', W')
    y_dot: Tensor | None  # None if the backward does not need it
    stats: Tensors

    def take(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensors]:
        """Return the fields and delete them here, so that the caller holds the only references and can free them."""
        fields = (self.x, self.x_dot, self.y, self.y_dot, self.stats)
        del self.x, self.x_dot, self.y, self.y_dot, self.stats
        return fields


class Epilogue(NamedTuple):
    """The four functions that compute norm or bias, ReLU and pool after a convolution with output y (B, K, H', W').

    y, p̄ and their derivatives may be partial sums (`kernels.PartialPlanes`); the functions add them up in their `planes`.
    """

    forward: Callable[[Convolved, Tensors], tuple[Tensor, Tensors]]
    """(y, affine) -> (p, stats)"""
    backward: Callable[[Tensor, Tensors, Tensors, Convolved, bool], tuple[Tensor, Tensors]]
    """(y, stats, affine, p̄, reuse) -> (ȳ, gradients of affine); with `reuse`, ȳ overwrites y"""
    dual: Callable[[Convolved, Convolved, Tensors, Tensors], tuple[Tensor, Tensor, Tensor | None, Tensors]]
    """(y, ẏ, affine, affine_dot) -> (p, ṗ, ẏ or None if the backward does not need it, stats)"""
    dual_backward: Callable[
        [Tensor, Tensor | None, Tensors, Tensors, Tensors, Convolved, Convolved], tuple[Tensor, Tensor, Tensors]
    ]
    """(y, ẏ, stats, affine, affine_dot, p̄, p̄̇) -> (ȳ, ȳ̇, derivatives of the gradients of affine); ȳ and ȳ̇ overwrite y and ẏ"""


def _norm_forward(y: Convolved, affine: Tensors) -> tuple[Tensor, Tensors]:
    p, *stats = kernels.norm_relu_pool(y, Affine(*affine), NORM_EPS)
    return p, tuple(stats)


def _norm_backward(y: Tensor, stats: Tensors, affine: Tensors, p_bar: Convolved, reuse: bool) -> tuple[Tensor, Tensors]:
    mean, rstd = stats
    y_bar, *affine_bar = kernels.norm_relu_pool_backward(y, mean, rstd, Affine(*affine), p_bar, reuse=reuse)
    return y_bar, tuple(affine_bar)


def _norm_dual(
    y: Convolved, y_dot: Convolved, affine: Tensors, affine_dot: Tensors
) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
    p, p_dot, stats = kernels.norm_relu_pool_dual(y, y_dot, Affine(*affine), Affine(*affine_dot), NORM_EPS)
    return p, p_dot, planes_of(y_dot), stats


def _norm_dual_backward(
    y: Tensor,
    y_dot: Tensor | None,
    stats: Tensors,
    affine: Tensors,
    affine_dot: Tensors,
    p_bar: Convolved,
    p_bar_dot: Convolved,
) -> tuple[Tensor, Tensor, Tensors]:
    assert y_dot is not None
    y_bar, y_bar_dot, *affine_bar_dot = kernels.norm_relu_pool_dual_backward(
        y, y_dot, PlaneStats(*stats), Affine(*affine), Affine(*affine_dot), p_bar, p_bar_dot, reuse=True
    )
    return y_bar, y_bar_dot, tuple(affine_bar_dot)


def _bias_forward(y: Convolved, affine: Tensors) -> tuple[Tensor, Tensors]:
    return kernels.bias_relu_pool(y, *affine), ()


def _bias_backward(y: Tensor, stats: Tensors, affine: Tensors, p_bar: Convolved, reuse: bool) -> tuple[Tensor, Tensors]:
    y_bar, beta_bar = kernels.bias_relu_pool_backward(y, *affine, p_bar, reuse=reuse)
    return y_bar, (beta_bar,)


def _bias_dual(
    y: Convolved, y_dot: Convolved, affine: Tensors, affine_dot: Tensors
) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
    p, p_dot = kernels.bias_relu_pool_dual(y, y_dot, *affine, *affine_dot)
    return p, p_dot, None, ()  # without a norm the block is piecewise linear, so the backward does not need ẏ


def _bias_dual_backward(
    y: Tensor,
    y_dot: Tensor | None,
    stats: Tensors,
    affine: Tensors,
    affine_dot: Tensors,
    p_bar: Convolved,
    p_bar_dot: Convolved,
) -> tuple[Tensor, Tensor, Tensors]:
    y_bar, y_bar_dot, beta_bar_dot = kernels.bias_relu_pool_dual_backward(y, *affine, p_bar, p_bar_dot, reuse=True)
    return y_bar, y_bar_dot, (beta_bar_dot,)


EPILOGUES: dict[Norm, Epilogue] = {
    "instance": Epilogue(_norm_forward, _norm_backward, _norm_dual, _norm_dual_backward),
    "none": Epilogue(_bias_forward, _bias_backward, _bias_dual, _bias_dual_backward),
}


@dataclass(frozen=True)
class PlaneBlock:
    """A block that stores the planes between its convolution and its pool."""

    epilogue: Epilogue
    parameters: Parameters
    direction: Parameters | None
    padding: int
    precision: Precision
    is_first: bool  # its input is the images

    def forward(self, x: Tensor) -> tuple[Tensor, Activations]:
        """See `Block.forward`."""
        y = kernels.conv3x3(x, self.parameters.weight, self.padding, self.precision)
        p, stats = self.epilogue.forward(y, self.parameters.affine)
        return p, Activations(x, None, planes_of(y), None, stats)

    def to_save(self, activations: Activations) -> Tensor:
        """See `Block.to_save`."""
        return activations.y

    def backward(self, activations: Activations, p_bar: Convolved, *, reuse: bool) -> tuple[Convolved | None, Tensors]:
        """See `Block.backward`."""
        x, _, y, _, stats = activations.take()
        y_bar, affine_bar = self.epilogue.backward(y, stats, self.parameters.affine, p_bar, reuse)
        del y
        weight_bar = kernels.conv3x3_weight_gradient(x, y_bar, self.padding, self.precision)
        del x
        x_bar = None
        if not self.is_first:
            x_bar = kernels.conv3x3_input_gradient(y_bar, self.parameters.weight, self.padding, self.precision)
        return x_bar, (weight_bar, *affine_bar)

    def dual(self, x: Tensor, x_dot: Tensor | None, saved: Tensor | None) -> tuple[Tensor, Tensor, Activations]:
        """See `Block.dual`."""
        assert self.direction is not None
        operands = (x, x_dot, self.parameters.weight, self.direction.weight, self.padding, self.precision)
        y, y_dot = kernels.conv3x3_dual(*operands) if saved is None else (saved, kernels.conv3x3_tangent(*operands))
        p, p_dot, needed, stats = self.epilogue.dual(y, y_dot, self.parameters.affine, self.direction.affine)
        return p, p_dot, Activations(x, x_dot, planes_of(y), needed, stats)

    def dual_backward(
        self,
        activations: Activations,
        p_bar: Convolved,
        p_bar_dot: Convolved,
        *,
        needs_x_bar: bool,
        divisors: Tensors = (),
    ) -> tuple[Convolved | None, Convolved, Tensors]:
        """See `Block.dual_backward`."""
        assert self.direction is not None
        x, x_dot, y, y_dot, stats = activations.take()
        affine = (self.parameters.affine, self.direction.affine)
        y_bar, y_bar_dot, affine_bar_dot = self.epilogue.dual_backward(y, y_dot, stats, *affine, p_bar, p_bar_dot)
        del y, y_dot
        bars = (y_bar, y_bar_dot)
        weight_bar_dot = kernels.conv3x3_dual_weight_gradient(x, x_dot, *bars, self.padding, self.precision)
        del x, x_dot
        operands = (*bars, self.parameters.weight, self.direction.weight, self.padding, self.precision)
        parameters_bar_dot = (weight_bar_dot, *affine_bar_dot)
        if self.is_first:
            (x_bar_dot,) = kernels.add_planes(kernels.conv3x3_input_gradient_tangent(*operands))
            x_bar_dot = x_bar_dot.to(weight_of(self.parameters.weight).dtype).contiguous()
            for divisor in divisors:
                x_bar_dot.div_(divisor)
            return None, x_bar_dot, parameters_bar_dot
        if needs_x_bar:
            return *kernels.conv3x3_dual_input_gradient(*operands), parameters_bar_dot
        return None, kernels.conv3x3_input_gradient_tangent(*operands), parameters_bar_dot


class ImageActivations(NamedTuple):
    """The tensors that an `ImageBlock` keeps from its forward for its backward, none as large as the planes."""

    patches: Patches
    folded: Folded | None


@dataclass(frozen=True)
class ImageBlock:
    """A first block with instance norm that a back end computes without storing planes (`kernels.has_image_block`)."""

    parameters: Parameters
    direction: Parameters | None
    precision: Precision

    def forward(self, x: Patches) -> tuple[Tensor, ImageActivations]:
        """See `Block.forward`."""
        weight, affine = weight_of(self.parameters.weight), Affine(*self.parameters.affine)
        p, folded = kernels.conv_norm_relu_pool(x, weight, affine, NORM_EPS, self.precision)
        return p, ImageActivations(x, folded)

    def to_save(self, activations: ImageActivations) -> Patches:
        """See `Block.to_save`."""
        return activations.patches

    def backward(self, activations: ImageActivations, p_bar: Convolved, *, reuse: bool) -> tuple[None, Tensors]:
        """See `Block.backward`."""
        weight, affine = weight_of(self.parameters.weight), Affine(*self.parameters.affine)
        patches, folded = activations
        parameters_bar = kernels.conv_norm_relu_pool_backward(
            patches, weight, affine, p_bar, folded, NORM_EPS, self.precision
        )
        return None, parameters_bar

    def dual(self, x: Patches, x_dot: Tensor | None, saved: Patches | None) -> tuple[Tensor, Tensor, ImageActivations]:
        """See `Block.dual`. `saved` is x itself."""
        p, p_dot, folded = kernels.conv_norm_relu_pool_dual(x, *self._directions, NORM_EPS, self.precision)
        return p, p_dot, ImageActivations(x, folded)

    def dual_backward(
        self,
        activations: ImageActivations,
        p_bar: Convolved,
        p_bar_dot: Convolved,
        *,
        needs_x_bar: bool,
        divisors: Tensors = (),
    ) -> tuple[None, Tensor, Tensors]:
        """See `Block.dual_backward`."""
        patches, folded = activations
        arguments = (*self._directions, p_bar, p_bar_dot, folded, NORM_EPS, self.precision, divisors)
        x_bar_dot, *parameters = kernels.conv_norm_relu_pool_dual_backward(patches, *arguments)
        return None, x_bar_dot, tuple(parameters)

    @property
    def _directions(self) -> tuple[Tensor, Tensor, Affine, Affine]:
        assert self.direction is not None
        weights = (weight_of(self.parameters.weight), weight_of(self.direction.weight))
        return *weights, Affine(*self.parameters.affine), Affine(*self.direction.affine)
