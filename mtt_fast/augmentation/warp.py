"""Apply a warp, which is affine in the pixels, as a function that autograd differentiates any number of times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.errors import InputError


def augment_with(images: Tensor, parameters: Tensor) -> Tensor:
    """Return `images` (b, C, H, W) augmented by the `parameters` (b, 13) of `mtt_fast.kernels.colour_warp_mask`.

    Differentiable in the images, forward and backward, any number of times, and under `torch.func`. For parameters in
    float32 (float64 for float64 images) on the images' device there is no copy and no synchronisation, so a CUDA graph can capture it.
    Raises `InputError` for parameters that require grad and for derivatives with is_grads_batched=True, and `ValueError` as
    `mtt_fast.kernels.colour_warp_mask` does.
    """
    if parameters.requires_grad:
        raise InputError("augment_with parameters: not differentiable, found parameters that require grad; detach them")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    result: Tensor = _Affine.apply(images, parameters.to(images.device, dtype))
    return result


class _OfSamples(torch.autograd.Function):
    """A function of samples, which are independent of each other, and of parameters, which its derivatives need too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @classmethod
    def vmap(cls, info: Any, dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        """Compute several batches at once, as one batch."""
        batches = [
            argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        result: Any = cls.apply(*(batch.flatten(0, 1) for batch in batches))
        return result.unflatten(0, batches[0].shape[:2]), 0


class _Affine(_OfSamples):
    """y = A x + b, with A and b fixed by the parameters."""

    @staticmethod
    def forward(images: Tensor, parameters: Tensor) -> Tensor:
        y: Tensor = kernels.colour_warp_mask(_plain(images), parameters)
        return y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor, None]:
        return _Transpose.apply(y_bar, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, images_dot: Tensor, _: None) -> Tensor:
        return _linear(images_dot, *ctx.saved_tensors)


class _Transpose(_OfSamples):
    """x̄ = Aᵀ ȳ."""

    @staticmethod
    def forward(y_bar: Tensor, parameters: Tensor) -> Tensor:
        x_bar: Tensor = kernels.colour_warp_mask_transpose(_plain(y_bar), parameters)
        return x_bar

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:
        return _linear(x, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, y_bar_dot: Tensor, _: None) -> Tensor:
        return _Transpose.apply(y_bar_dot, *ctx.saved_tensors)  # type: ignore[no-any-return]


def _linear(images: Tensor, parameters: Tensor) -> Tensor:
    """Return A x: without the brightness, in column 0, nothing is added."""
    return _Affine.apply(images, F.pad(parameters[:, 1:], (1, 0)))  # type: ignore[no-any-return]


def _plain(images: Tensor) -> Tensor:
    """Return `images` as the kernels take them. Raises `InputError` for several batches in one tensor of torch.autograd's own vmap."""
    if torch._C._functorch.is_legacy_batchedtensor(images):
        raise InputError(
            "SiameseAugment: expected a derivative along one vector, found several at once, as of is_grads_batched=True or "
            "vectorize=True; take one after the other, or torch.func.vmap"
        )
    return images.detach().contiguous()
