"""ZCA whitening of images: the fit, and the two matrix products that use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.runtime.numerics import without_autocast
from mtt_fast.storage.files import load_tensors, save_tensors
from mtt_fast.storage.identity import WHITENING_TOLERANCE

# A covariance of 12,288 values an image (3x64x64) takes 1.2 GB, and its decomposition minutes; one of 3x128x128 takes
# 19 GB, and hours.
LARGEST_IMAGE = 12_288
_BLOCK = 4096  # images that are in memory as numbers at once


@dataclass(frozen=True)
class Whitening:
    """A fitted ZCA transform of images with D = C·H·W values. All fields are floating point and on one device.

    The public code of trajectory matching whitens with kornia's `ZCAWhitening(eps=0.1, compute_inv=True)`, fitted on
    the un-normalised training images in [0, 1]. `fit` returns the same matrices, so images made there can be used here.
    """

    mean: Tensor  # (D,)
    matrix: Tensor  # (D, D)
    inverse: Tensor  # (D, D)

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> Whitening:
        """Fit to `images` (n, C, H, W), floating point in [0, 1], on their device; needs about 5·D² float64 values besides.

        The fields are of the dtype of `images`, float32 at least.
        Raises `InputError` for fewer than two images, for images of more than `LARGEST_IMAGE` values or with values that are
        not finite, and for an `eps` that leaves nothing to divide by.
        """
        _check_floating(images)
        return cls._fit(images, images.device, torch.promote_types(images.dtype, torch.float32), eps)

    @classmethod
    def fit_bytes(cls, images: Tensor, device: torch.device, eps: float = 0.1) -> Whitening:
        """Fit to uint8 `images` (n, C, H, W), scaled to [0, 1], on `device`, block by block; the fields are float32 there.

        Raises `InputError` as `fit` does.
        """
        return cls._fit(images, device, torch.float32, eps, scale=255)

    @classmethod
    def _fit(cls, images: Tensor, device: torch.device, dtype: torch.dtype, eps: float, scale: int = 1) -> Whitening:
        """Fit to `images` / `scale` on `device`; the fields are of `dtype`.

        Blocks are multiplied in float32 on a CPU, summed and decomposed in float64. Of CIFAR-10, the products' rounding moves
        the matrix by 2e-7 of its norm, that of a decomposition in float32 would by 5e-5. In a run on CUDA float32 products
        are rounded to tf32, so there all is float64.
        """
        _check_fits(images)
        products = torch.float64 if device.type == "cuda" else dtype

        def blocks() -> Iterator[Tensor]:
            return (block.to(device, products).flatten(1).div(scale) for block in images.split(_BLOCK))

        with without_autocast(device):
            mean, covariance = _moments(blocks, len(images))
        if not covariance.isfinite().all():
            raise InputError("ZCA whitening: expected finite images, found infinite values or NaN in them")
        values, vectors = torch.linalg.eigh(covariance)
        deviations = (values.clamp_(min=0) + eps).sqrt_()  # rounding leaves what is zero a little below
        if not deviations.gt(0).all():
            raise InputError(
                f"ZCA whitening: expected an `eps` above 0 for images that do not vary in all directions, found {eps}"
            )
        with without_autocast(device):
            matrix, inverse = ((vectors * root) @ vectors.T for root in (1 / deviations, deviations))
        return cls(mean.to(dtype), matrix.to(dtype), inverse.to(dtype))

    def apply(self, images: Tensor) -> Tensor:
        """Whiten `images` (n, C, H, W), in [0, 1]; the result has their shape, dtype and device."""
        rows = self._rows(images)
        with without_autocast(images.device):
            return ((rows - self.mean.to(rows)) @ self.matrix.to(rows)).to(images.dtype).reshape(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """Undo `apply`: whitened `images` (n, C, H, W) to pictures, [0, 1] where they came from such."""
        rows = self._rows(images)
        with without_autocast(images.device):
            return (rows @ self.inverse.to(rows) + self.mean.to(rows)).to(images.dtype).reshape(images.shape)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the transform, with text `metadata`, to a safetensors file, atomically."""
        save_tensors(path, {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Whitening:
        """Read what `save` wrote (memory-mapped, CPU). Raises `InputError` for a missing, broken or other file."""
        tensors, _ = load_tensors(path)
        try:
            whitening = cls(tensors["mean"], tensors["matrix"], tensors["inverse"])
        except KeyError as error:
            raise InputError(
                f"{path}: expected a whitening (mean, matrix, inverse), found {sorted(tensors)}; name the right file"
            ) from error
        values = whitening.mean.numel()
        if not whitening.matrix.shape == whitening.inverse.shape == (values, values):
            raise InputError(
                f"{path}: expected matrices of {values}x{values}, found {tuple(whitening.matrix.shape)} and "
                f"{tuple(whitening.inverse.shape)}; delete it and fit again"
            )
        for name, tensor in vars(whitening).items():
            if not bool(tensor.isfinite().all()):
                raise InputError(
                    f"{path}: {name}: expected finite numbers, found NaN or infinity; delete it and fit again"
                )
        return whitening

    def to(self, device: torch.device | str) -> Whitening:
        """Return the transform with its matrices on `device`, so that it applies there without copies."""
        return Whitening(self.mean.to(device), self.matrix.to(device), self.inverse.to(device))

    def _rows(self, images: Tensor) -> Tensor:
        """Return `images` as rows (n, D), in at least the precision of the fit, as kornia computes."""
        _check_floating(images)
        rows = images.flatten(1)
        if rows.shape[1] != self.mean.numel():
            raise InputError(
                f"ZCA whitening: expected images of {self.mean.numel()} values, found {rows.shape[1]} "
                f"({_shape(images)}); "
                "use the data set and resolution it was fitted on"
            )
        return rows.to(torch.promote_types(images.dtype, self.matrix.dtype))


def _moments(blocks: Callable[[], Iterable[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D), in float64, of the `count` rows of `blocks` (k, D), read twice."""
    mean = torch.stack([block.sum(dim=0, dtype=torch.float64) for block in blocks()]).sum(dim=0).div_(count)
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in blocks():
        centred = block - mean.to(block)
        covariance += centred.T @ centred
    return mean, covariance.div_(count - 1)


def _check_fits(images: Tensor) -> None:
    """Raise `InputError` for fewer than two images, or for images whose covariance is too large."""
    if len(images) < 2:
        raise InputError(
            f"ZCA whitening: expected at least 2 training images, found {len(images)}; use more, or no `zca`"
        )
    if (values := images[0].numel()) > LARGEST_IMAGE:
        raise InputError(
            f"ZCA whitening: expected images of at most {LARGEST_IMAGE} values, found {values} ({_shape(images)}), "
            f"whose covariance alone takes {values**2 * 8 / 1e9:.0f} GB; use no `zca`, or a smaller `res`"
        )


def _check_floating(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise InputError(
            f"images: expected a tensor, found {type(images).__name__}; use torch.as_tensor or torch.stack"
        )
    if not images.is_floating_point():
        raise InputError(f"images: expected floating point in [0, 1], found {images.dtype}; use images.float() / 255")


def _shape(images: Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])


def check_same_whitening(whitening: Whitening, expected: Whitening, where: str | os.PathLike[str]) -> None:
    """Check that two whitenings do the same, up to what rounding makes of one fit on two machines.

    Raises `InputError` that names the file `where`, which holds `whitening`.
    """
    for name in ("mean", "matrix"):
        theirs, ours = (getattr(one, name).detach().to("cpu", torch.float32) for one in (whitening, expected))
        if ours.shape != theirs.shape or float((ours - theirs).norm()) > WHITENING_TOLERANCE * float(ours.norm()):
            raise InputError(
                f"{where}: whitened otherwise: expected the ZCA whitening that is fitted to these images with eps 0.1, found "
                f"another {name}; say `other_data` to test it on images that are whitened as its own were"
            )
