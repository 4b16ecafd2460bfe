"""ZCA whitening of images: kornia's fit, and the two matrix products that use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.storage.files import load_tensors, save_tensors
from mtt_fast.storage.identity import WHITENING_TOLERANCE

# A covariance of 12,288 values an image (3x64x64) takes 0.6 GB, and its decomposition minutes; one of 3x128x128 takes
# 10 GB, and hours.
LARGEST_IMAGE = 12_288


@dataclass(frozen=True)
class Whitening:
    """A fitted ZCA transform of images with D = C·H·W values. All fields are floating point and on one device.

    The public code of trajectory matching whitens with kornia's `ZCAWhitening(eps=0.1, compute_inv=True)`, fitted on
    the un-normalised training images in [0, 1]; `fit` calls exactly that, so images made there can be used here.
    """

    mean: Tensor  # (D,)
    matrix: Tensor  # (D, D)
    inverse: Tensor  # (D, D)

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> Whitening:
        """Fit to `images` (n, C, H, W), floating point, in [0, 1]; needs about twice their memory, and 4·D² values.

        Raises `InputError` for fewer than two images, or for images of more than `LARGEST_IMAGE` values.
        """
        values = images[0].numel() if len(images) else 0
        if len(images) < 2:
            raise InputError(
                f"ZCA whitening: expected at least 2 training images, found {len(images)}; use more, or no `zca`"
            )
        if values > LARGEST_IMAGE:
            raise InputError(
                f"ZCA whitening: expected images of at most {LARGEST_IMAGE} values, found {values} ({_shape(images)}), "
                f"whose covariance alone takes {values**2 * 4 / 1e9:.0f} GB; use no `zca`, or a smaller `res`"
            )
        _check_floating(images)
        from kornia.enhance import ZCAWhitening  # here, because importing kornia takes longer than all the rest

        zca = ZCAWhitening(eps=eps, compute_inv=True).fit(images)
        mean, matrix, inverse = zca.mean_vector, zca.transform_matrix, zca.transform_inv
        return cls(mean.flatten(), matrix, inverse)

    def apply(self, images: Tensor) -> Tensor:
        """Whiten `images` (n, C, H, W), in [0, 1]; the result has their shape, dtype and device."""
        rows = self._rows(images)
        return ((rows - self.mean.to(rows)) @ self.matrix.to(rows)).to(images.dtype).reshape(images.shape)

    def invert(self, images: Tensor) -> Tensor:
        """Undo `apply`: whitened `images` (n, C, H, W) to pictures, [0, 1] where they came from such."""
        rows = self._rows(images)
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


def _check_floating(images: Tensor) -> None:
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
