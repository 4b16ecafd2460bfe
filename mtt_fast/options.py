"""Options that the jobs share, with the names, meanings and defaults of the public MTT code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from mtt_fast.data import ImageData, Normalisation, Split, load, transform_for
from mtt_fast.data.facts import DataFacts
from mtt_fast.errors import InputError
from mtt_fast.identity import DatasetIdentity
from mtt_fast.kernels import Precision
from mtt_fast.models import Trainable, network_by_name
from mtt_fast.models.pools import eval_pool
from mtt_fast.protocols import EvaluationProtocol, protocol_by_name
from mtt_fast.training import Images
from mtt_fast.whitening import Whitening

TrueOrFalse = Annotated[bool, tyro.conf.FlagConversionOff]
"""A flag that takes the word True or False, as some of the public code's do."""


@dataclass(frozen=True)
class CommonOptions:
    """Which images, which network, where, and with which random numbers."""

    dataset: str = "CIFAR10"
    """digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, Tiny, ImageNet, or an image folder (train/CLASS/…, test/CLASS/…)"""
    subset: str | None = None
    """of ImageNet: imagenette, imagewoof, imagefruit, imagemeow, imagesquawk, imageyellow"""
    res: int | None = None
    """resolution in pixels, where the data set has no one size"""
    data_path: str = "data"
    """where the data sets lie"""
    packed_path: str | None = None
    """where they are kept packed, if not in DATA_PATH/packed (which may be read-only)"""
    download: bool = False
    """fetch the data set if it is missing (MNIST, FashionMNIST, CIFAR10, CIFAR100)"""
    zca: bool = False
    """whiten the images (ZCA, eps 0.1) instead of normalising them"""
    model: str = "ConvNet"
    """network: ConvNet (depth 3, width 128), ConvNetD4, ConvNetD3W64, ConvNetNN (no norm), ConvNetBN, AlexNet, VGG11, ResNet18,
    ResNet18_AP, …"""
    batch_train: int | None = None
    """batch size for training networks; without it 256, or what the evaluation's protocol says"""
    dsa: TrueOrFalse = True
    """differentiable siamese augmentation"""
    dsa_strategy: str = "color_crop_cutout_flip_scale_rotate"
    """its operations, one of which is drawn for each step"""
    seed: int = 0
    """every random number follows from it"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    precision: Precision = "tf32"
    """of the factors of a GPU's float32 products: fp32, tf32 (as the public code runs) or bf16 (ConvNet's fused step alone);
    sums are float32. A CPU computes in float32 whatever this says"""
    networks_at_once: int | None = None
    """networks to train at the same time; without it as many as the device has room for. The result is the same"""

    def load_data(self) -> ImageData:
        """Return the images that the options name."""
        return load(
            self.dataset,
            data_path=self.data_path,
            subset=self.subset,
            res=self.res,
            download=self.download,
            packed_path=self.packed_path,
        )

    def network(self, data: ImageData | DataFacts) -> Trainable:
        """Return the network that the options name, for `data`."""
        return network_by_name(self.model, data.image_shape, data.num_classes)

    @property
    def strategy(self) -> str:
        """The augmentation's operations, or "none"."""
        return self.dsa_strategy if self.dsa else "none"


@dataclass(frozen=True)
class EvaluationOptions(CommonOptions):
    """How networks are evaluated, and which."""

    num_eval: int = 5
    """networks in an evaluation"""
    epoch_eval_train: int = 1000
    """epochs of each"""
    eval_mode: str = "S"
    """networks to evaluate: S the model itself (instance norm in place of batch norm), SS the model as it is, C itself and ConvNet,
    M architectures, W widths, D depths, A activations, P poolings, N norms, B and BN batch norm"""
    protocol: str = "mtt"
    """how networks are trained and tested: mtt, datm (batches of 128) or ddranking (the best epoch)"""
    best_epoch: bool = False
    """report the best epoch, chosen on the test images, in place of the last"""

    def evaluated_networks(self, data: ImageData | DataFacts) -> dict[str, Trainable]:
        """Return the networks to evaluate for `data`, by name, the model itself first if it is among them.

        Raises `InputError` for an unknown --eval_mode, or images that are too small for one of them.
        """
        own = self.network(data)
        pool = {
            name: network_by_name(name, data.image_shape, data.num_classes)
            for name in eval_pool(self.eval_mode, self.model)
        }
        first = [name for name, network in pool.items() if name == self.model or network == own][:1]
        return {name: pool[name] for name in [*first, *pool]}

    def evaluation_protocol(self) -> EvaluationProtocol:
        """Return the protocol. Raises `InputError` for values that cannot be."""
        complaint = at_least(1, num_eval=self.num_eval, batch_train=self.batch_train) or at_least(
            0, epoch_eval_train=self.epoch_eval_train
        )
        if complaint:
            raise InputError(complaint)
        return protocol_by_name(
            self.protocol,
            epochs=self.epoch_eval_train,
            batch_size=self.batch_train,
            augment=self.strategy,
            best_epoch=self.best_epoch,
        )


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


def at_least(minimum: float, **values: float | None) -> str | None:
    """Return the first complaint about an option in `values` (None passes) below `minimum`, or None."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            return f"--{name} {value}: expected at least {minimum:g}"
    return None


def buffer_folder(buffer_path: str, data: ImageData | DataFacts, model: str, zca: bool) -> Path:
    """Return the folder of the experts, laid out as the public code does: PATH/CIFAR10_NO_ZCA/ConvNet."""
    if data.name.upper().startswith("CIFAR"):
        name = data.name if zca else f"{data.name}_NO_ZCA"
    else:
        name = f"{data.name}_ZCA" if zca else data.name
    return Path(buffer_path) / name / model
