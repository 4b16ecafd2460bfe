"""Fit, apply and invert a ZCA whitening of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.checks import check_number, check_ordinary, shown
from mtt_fast.errors import InputError
from mtt_fast.runtime.numerics import without_autocast
from mtt_fast.storage.identity import WHITENING_TOLERANCE
from mtt_fast.storage.tensor_files import load_tensors, save_tensors

# The covariance of images of 12,288 values (3x64x64) takes 1.2 GB, and its decomposition minutes; with 3x128x128 19 GB, and hours.
LARGEST_IMAGE = 12_288
_BLOCK = 4096  # images in floating point at once


@dataclass(frozen=True)
class Whitening:
    """A fitted ZCA transform of images with D = C·H·W values. All fields are floating point and on one device.

    The public MTT code whitens with kornia's `ZCAWhitening(eps=0.1, compute_inv=True)`, fitted to the training images in [0, 1]
    before normalisation. `fit` returns the same matrices, so images of the public code can be used here.
    """

    mean: Tensor  # (D,)
    matrix: Tensor  # (D, D)
    inverse: Tensor  # (D, D)

    def __post_init__(self) -> None:
        """Raise `InputError` for a field with which torch cannot compute."""
        for name, value in vars(self).items():
            if not isinstance(value, Tensor):
                raise InputError(f"Whitening {name}: expected a tensor, found {type(value).__name__}")
            check_ordinary(f"Whitening {name}", value)

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> Whitening:
        """Fit to `images` (n, C, H, W), floating point in [0, 1], on their device. This takes about 5·D² float64 values of memory.

        The fields have the dtype of `images`, at least float32.
        Raises `InputError` for fewer than two images, for images of more than `LARGEST_IMAGE` values or with values that are
        not finite, and for an `eps` that would lead to a division by zero.
        """
        _check_images(images)
        return cls._fit(images, images.device, torch.promote_types(images.dtype, torch.float32), eps)

    @classmethod
    def fit_bytes(cls, images: Tensor, device: torch.device, eps: float = 0.1) -> Whitening:
        """Fit to uint8 `images` (n, C, H, W), scaled to [0, 1], block by block on `device`. The fields are float32, on `device`.

        Raises `InputError` as `fit` does.
        """
        _check_images(images, in_bytes=True)
        return cls._fit(images, device, torch.float32, eps, scale=255)

    @classmethod
    @torch.no_grad()
    def _fit(cls, images: Tensor, device: torch.device, dtype: torch.dtype, eps: float, scale: int = 1) -> Whitening:
        """Fit to `images` / `scale` on `device`; the fields are of `dtype`.

        On a CPU blocks are multiplied in float32; sums and decomposition are in float64. For CIFAR-10 the rounding of the products
        changes the matrix by 2e-7 of its norm; a decomposition in float32 would change it by 5e-5. On CUDA all is in float64, since
        float32 products may be rounded to tf32.
        """
        check_number("eps", eps)
        _check_fits(images)
        products = torch.float64 if device.type == "cuda" else dtype

        def blocks() -> Iterator[Tensor]:
            return (block.to(device, products).flatten(1).div(scale) for block in images.split(_BLOCK))

        with without_autocast(device):
            mean, covariance = _moments(blocks, len(images))
        if not covariance.isfinite().all():
            raise InputError("ZCA whitening: expected finite images, found infinite values or NaN in them")
        values, vectors = torch.linalg.eigh(covariance)
        deviations = (values.clamp_(min=0) + eps).sqrt_()  # rounding can make zero eigenvalues negative
        if not deviations.gt(0).all():
            raise InputError(
                f"ZCA whitening: expected an `eps` above 0 for images that do not vary in all directions, found {eps}"
            )
        with without_autocast(device):
            matrix, inverse = ((vectors * root) @ vectors.T for root in (1 / deviations, deviations))
        return cls(mean.to(dtype), matrix.to(dtype), inverse.to(dtype))

    def apply(self, images: Tensor) -> Tensor:
        """Return `images` (n, C, H, W), in [0, 1], whitened, in the same shape, dtype and device."""
        rows = self._rows(images)
        with without_autocast(images.device):
            return ((rows - self.mean.to(rows)) @ self.matrix.to(rows)).to(images.dtype).reshape(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """Return the images, in [0, 1], of which `images` (n, C, H, W) are the result of `apply`."""
        rows = self._rows(images)
        with without_autocast(images.device):
            return (rows @ self.inverse.to(rows) + self.mean.to(rows)).to(images.dtype).reshape(images.shape)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the transform, with text `metadata`, to a safetensors file, atomically."""
        save_tensors(path, {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Whitening:
        """Read a file of `save`, memory-mapped, on the CPU. Raises `InputError` for a file that is missing, damaged or not a whitening."""
        tensors, _ = load_tensors(path)
        try:
            whitening = cls(tensors["mean"], tensors["matrix"], tensors["inverse"])
        except KeyError as error:
            raise InputError(
                f"{path}: expected a whitening (mean, matrix, inverse), found {sorted(tensors)}; name the right file"
            ) from error
        values = whitening.mean.numel()
        for name, tensor in vars(whitening).items():
            shape = (values,) if name == "mean" else (values, values)
            if tensor.shape != shape or not tensor.is_floating_point():
                raise InputError(
                    f"{path}: {name}: expected floating point {shape}, found {shown(tensor)}; delete it and fit again"
                )
            if not bool(tensor.isfinite().all()):
                raise InputError(
                    f"{path}: {name}: expected finite numbers, found NaN or infinity; delete it and fit again"
                )
        return whitening

    def to(self, device: torch.device | str) -> Whitening:
        """Return the transform with its matrices on `device`, so that it applies there without copies."""
        return Whitening(self.mean.to(device), self.matrix.to(device), self.inverse.to(device))

    def _rows(self, images: Tensor) -> Tensor:
        """Return `images` as (n, D), in at least the dtype of the fit, as kornia does."""
        _check_images(images)
        rows = images.flatten(1)
        if rows.shape[1] != self.mean.numel():
            raise InputError(
                f"ZCA whitening: expected images of {self.mean.numel()} values, found {rows.shape[1]} "
                f"({_shape(images)}); "
                "use the data set and resolution it was fitted on"
            )
        return rows.to(torch.promote_types(images.dtype, self.matrix.dtype))


def _moments(blocks: Callable[[], Iterable[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D), in float64, of the `count` rows of `blocks` (k, D), which are read twice."""
    mean = torch.stack([block.sum(dim=0, dtype=torch.float64) for block in blocks()]).sum(dim=0).div_(count)
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in blocks():
        centred = block - mean.to(block)
        covariance += centred.T @ centred
    return mean, covariance.div_(count - 1)


def _check_fits(images: Tensor) -> None:
    """Raise `InputError` for images without numbers, fewer than two, or those whose covariance is too large."""
    if images.is_meta:
        raise InputError("ZCA whitening: expected images with numbers, found a tensor on the device meta")
    if len(images) < 2:
        raise InputError(
            f"ZCA whitening: expected at least 2 training images, found {len(images)}; use more, or no `zca`"
        )
    if (values := images[0].numel()) > LARGEST_IMAGE:
        raise InputError(
            f"ZCA whitening: expected images of at most {LARGEST_IMAGE} values, found {values} ({_shape(images)}), "
            f"whose covariance alone takes {values**2 * 8 / 1e9:.0f} GB; use no `zca`, or a smaller `res`"
        )


def _check_images(images: Tensor, *, in_bytes: bool = False) -> None:
    """Raise `InputError` unless `images` are a tensor (n, …), floating point or, with `in_bytes`, uint8."""
    if not isinstance(images, Tensor):
        raise InputError(
            f"images: expected a tensor, found {type(images).__name__}; use torch.as_tensor or torch.stack"
        )
    check_ordinary("images", images)
    if images.dim() < 2:
        raise InputError(f"images: expected (n, C, H, W), found shape {tuple(images.shape)}")
    if in_bytes and images.dtype != torch.uint8:
        raise InputError(f"images: expected uint8, found {images.dtype}; use Whitening.fit for images in [0, 1]")
    if not (in_bytes or images.is_floating_point()):
        raise InputError(f"images: expected floating point in [0, 1], found {images.dtype}; use images.float() / 255")


def _shape(images: Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])


def check_same_whitening(whitening: Whitening, expected: Whitening, where: str | os.PathLike[str]) -> None:
    """Raise `InputError` that names the file `where` of `whitening` unless it equals `expected` up to rounding."""
    for name in ("mean", "matrix"):
        theirs, ours = (getattr(one, name).detach().to("cpu", torch.float32) for one in (whitening, expected))
        if ours.shape != theirs.shape or float((ours - theirs).norm()) > WHITENING_TOLERANCE * float(ours.norm()):
            raise InputError(
                f"{where}: whitened in another way: expected the ZCA whitening that is fitted to these images with eps 0.1, found "
                f"another {name}; give `other_data` to test it on images that are whitened as its own were"
            )
