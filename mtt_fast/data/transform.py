"""The transform from images in [0, 1] to the inputs of networks: normalisation by channel, or ZCA whitening."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtt_fast.data.image_data import ImageData
from mtt_fast.data.whitening import Whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.tensor_files import read_header

_FORMAT = "mtt_fast whitening 2"  # files without checksums have no format field
_CPU = torch.device("cpu")
_EPS = 0.1  # as in the public code; distilled sets can only be compared at the same value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalisation:
    """Compute (x − mean) / std with one mean and std per channel. The interface is that of `Whitening`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: Tensor) -> Tensor:
        """Return `images` (n, C, H, W), floating point in [0, 1], normalised, in the same dtype and on the same device."""
        mean, std = self._columns(images)
        return (images - mean) / std

    def invert(self, images: Tensor) -> Tensor:
        """Return the images in [0, 1] of which `images` are the result of `apply`."""
        mean, std = self._columns(images)
        return images * std + mean

    def _columns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not images.is_floating_point() or images.shape[1] != len(self.mean):
            raise InputError(
                f"images: expected floating point in [0, 1] with {len(self.mean)} channels, found {images.dtype} "
                f"{tuple(images.shape)}; use images.float() / 255, of the data set that the normalisation belongs to"
            )
        # filled on the device: a copy from the host would synchronise, and cannot be captured in a CUDA graph
        mean, std = (
            torch.stack([images.new_full((1, 1), value) for value in values]) for values in (self.mean, self.std)
        )
        return mean, std


def transform_for(data: ImageData, *, zca: bool, device: torch.device | None = None) -> Normalisation | Whitening:
    """Return the transform from [0, 1] images of `data` to the inputs of its networks.

    With `zca` it is a whitening, fitted to the training images in [0, 1] on `device` (None: the CPU). The fit is saved beside the
    packed file, as NAME.zca.safetensors, and read the next time if data and eps are the same. Raises `InputError` for images that
    are too large to whiten.
    """
    if not zca:
        return Normalisation(data.mean, data.std)
    belongs_to = {"format": _FORMAT, "fingerprint": data.fingerprint, "eps": str(_EPS)}
    path = data.path.with_suffix(".zca.safetensors") if data.path else None
    if path and (fitted := _read(path, belongs_to)):
        return fitted
    log.info("%s: fitting the ZCA whitening to %d images", data.name, len(data.train.images))
    whitening = Whitening.fit_bytes(data.train.images, device or _CPU, _EPS).to(_CPU)
    if path:
        try:
            whitening.save(path, belongs_to)
        except InputError as error:  # the whitening is usable, only the next run has to fit it again
            log.warning("%s", error)
    return whitening


def _read(path: Path, belongs_to: dict[str, str]) -> Whitening | None:
    if not path.exists():
        return None
    try:
        _, metadata = read_header(path)
        if metadata == belongs_to:
            return Whitening.load(path)
        log.warning("%s: fitted on other data, or by another version; fitting it again", path)
    except InputError as error:
        log.warning("%s; fitting it again", error)
    return None
