"""Hold labelled images on a device, as inputs of networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data import ImageData, Normalisation, Split, transform_for
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.identity import DatasetIdentity


def as_training_images(synthetic: SyntheticDataset, device: torch.device) -> Images:
    """Return a distilled set as images to train on; label logits become probabilities."""
    moved = synthetic.to(device)
    labels = moved.labels.softmax(dim=1) if synthetic.label_kind == "logits" else moved.labels
    return Images(moved.images, labels, canvas=moved.canvas, real=synthetic.real)


@dataclass(frozen=True)
class Images:
    """Labelled images on one device, which become the network's inputs one batch at a time.

    `pixels` (n, C, H, W) are uint8, and `transform` maps them, divided by 255, to the network's inputs; or they are the floating-point
    inputs themselves, and `transform` is None. `labels` are indices (n,) or probabilities (n, classes). With a `canvas` the images
    are textures, and each training step uses random crops of them. `real` (n,) bool, on the CPU, marks the images of a distilled set
    that are real and were not distilled (SelMatch); it is None if there are none.
    """

    pixels: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    canvas: Canvas | None = None
    real: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> torch.Size:
        """Return the shape (C, H, W) of the network's inputs."""
        shape = self.pixels.shape[1:]
        return shape if self.canvas is None else self.canvas.image_shape(shape)

    @property
    def num_crops(self) -> int:
        """Return the number of crops of each image in a step; 1 without a canvas."""
        return 1 if self.canvas is None else self.canvas.samples

    def expand_crops(self, index: Tensor) -> Tensor:
        """Return `index` (b,), repeated for each crop of a canvas: (crops · b,)."""
        return index if self.canvas is None else self.canvas.batch(index)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return (inputs of the network (b, C, H, W), labels)."""
        pixels = self.pixels[index]
        return (self.transform(pixels.float() / 255) if self.transform else pixels), self.labels[index]

    def subset(self, index: Tensor) -> Images:
        """Return the images at `index`, which may be on another device, as inputs of networks (floating point)."""
        return Images(*self.batch(index.to(self.labels.device)))


def parts_of(images: Images, factor: int) -> Images:
    """Return the `factor` × `factor` parts of each image, scaled up to its size, with its label: the multi-formation of IDC and NCFM.

    Raises `InputError` for sides that are not multiples of `factor`, and for canvases.
    """
    if factor == 1:
        return images
    height, width = images.pixels.shape[2:]
    if images.canvas is not None or height % factor or width % factor:
        found, fix = f"images of {height} × {width}", "give a divisor of both, or 1"
        if images.canvas is not None:
            found, fix = "canvases of `texture`", "give `factor` 1, or no canvases"
        raise InputError(
            f"`factor` {factor}: expected images that can be cut into {factor} × {factor} parts, found {found}; {fix}"
        )
    rows = [part for band in images.pixels.chunk(factor, 2) for part in band.chunk(factor, 3)]
    pixels = interpolate(torch.cat(rows), size=(height, width), mode="bilinear")
    labels = images.labels.repeat(factor**2, *[1] * (images.labels.dim() - 1))
    real = None if images.real is None else images.real.repeat(factor**2)
    return dataclasses.replace(images, pixels=pixels, labels=labels, real=real)


@dataclass(frozen=True)
class RealImages:
    """A data set on the device, with the transform from its pixels to the network's inputs."""

    data: ImageData
    transform: Normalisation | Whitening
    train: Images
    test: Images

    @property
    def identity(self) -> DatasetIdentity:
        """Return the identity of the data set, normalised or whitened by this transform."""
        return self.data.identity(zca=isinstance(self.transform, Whitening))


def real_images(
    data: ImageData, device: torch.device, *, zca: bool, transform: Normalisation | Whitening | None = None
) -> RealImages:
    """Return `data` on `device` as uint8. Each batch is normalised or whitened (`zca`) on use, or transformed by `transform`."""
    transform = transform_for(data, zca=zca, device=device) if transform is None else transform
    if isinstance(transform, Whitening):
        transform = transform.to(device)

    def on_device(split: Split) -> Images:
        return Images(split.images.to(device), split.labels.to(device), transform.apply)

    return RealImages(data, transform, on_device(data.train), on_device(data.test))
