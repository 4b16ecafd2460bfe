"""Labelled images on a device, as networks see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data import ImageData, Normalisation, Split, transform_for
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening
from mtt_fast.storage.identity import DatasetIdentity


def as_training_images(synthetic: SyntheticDataset, device: torch.device) -> Images:
    """Return a distilled set as images to train on; label logits become probabilities."""
    moved = synthetic.to(device)
    labels = moved.labels.softmax(dim=1) if synthetic.label_kind == "logits" else moved.labels
    return Images(moved.images, labels, canvas=moved.canvas)


@dataclass(frozen=True)
class Images:
    """Labelled images on one device, made into what the network sees one batch at a time.

    `pixels` (n, C, H, W) are uint8 with `transform` from [0, 1] to the network's input, or floating point as the
    network sees them and `transform` None. `labels` are indices (n,) or probabilities (n, classes). With a `canvas` they
    are textures, of which each step of a training sees random crops.
    """

    pixels: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    canvas: Canvas | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def seen_shape(self) -> torch.Size:
        """The shape (C, H, W) of what the network sees."""
        shape = self.pixels.shape[1:]
        return shape if self.canvas is None else self.canvas.image_shape(shape)

    @property
    def crops(self) -> int:
        """How many crops of each image a step sees; 1 where it sees the images themselves."""
        return 1 if self.canvas is None else self.canvas.samples

    def seen_in(self, index: Tensor) -> Tensor:
        """Return, for each image that a step on those at `index` sees, which one it is, or is cut from."""
        return index if self.canvas is None else self.canvas.batch(index)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return (images (b, C, H, W) as the network sees them, labels)."""
        pixels = self.pixels[index]
        return (self.transform(pixels.float() / 255) if self.transform else pixels), self.labels[index]


@dataclass(frozen=True)
class RealImages:
    """A data set on the device, as networks see it, with the transform that makes it so."""

    data: ImageData
    transform: Normalisation | Whitening
    train: Images
    test: Images

    @property
    def identity(self) -> DatasetIdentity:
        """What tells them from others."""
        return self.data.identity(zca=isinstance(self.transform, Whitening))

    @property
    def whitening(self) -> str:
        """Which input space this is, as `DatasetIdentity.whitening`."""
        return self.identity.whitening


def real_images(
    data: ImageData, zca: bool, device: torch.device, transform: Normalisation | Whitening | None = None
) -> RealImages:
    """Put `data` on `device` as uint8; each batch is normalised or whitened when it is used, or put through `transform`."""
    transform = transform_for(data, zca) if transform is None else transform
    if isinstance(transform, Whitening):
        transform = transform.to(device)

    def on_device(split: Split) -> Images:
        return Images(split.images.to(device), split.labels.to(device), transform.apply)

    return RealImages(data, transform, on_device(data.train), on_device(data.test))
