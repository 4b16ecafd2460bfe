"""Options that the commands share, with the names, meanings and defaults of the public MTT code."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.commands.option_fields import HARMLESS, Checked, Group, Needs, Range, Role
from mtt_fast.data import DatasetInfo, ImageData, load
from mtt_fast.data.catalogue import DOWNLOADED, OF_ONE_SIZE, name_of, published
from mtt_fast.engine.students.choice import PrecisionRequest
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.pools import eval_pool
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.provenance import check_device_name, choose_device
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.training.protocols import EvaluationProtocol, protocol_by_name, published_protocol

TrueOrFalse = Annotated[bool, tyro.conf.FlagConversionOff]
"""A flag that takes the word True or False, as some of the public code's do."""

Count = Annotated[int, Range(1, largest=10**9)]
CountFromZero = Annotated[int, Range(0, largest=10**9)]
AtLeastTwo = Annotated[int, Range(2, largest=10**9)]
Networks = Annotated[int, Range(1, largest=10**6)]  # each is listed, in memory or in a folder
Side = Annotated[int, Range(1, largest=2**14)]
Seed = Annotated[int, Range(0, largest=2**63 - 1)]  # for generators of torch and integers of TOML; below 0: unknown
Positive = Annotated[float, Range(0, exclude_low=True)]
PositiveOrInfinity = Annotated[float, Range(0, exclude_low=True, allow_infinity=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, exclude_high=True)]
PositiveShare = Annotated[float, Range(0, 1, exclude_low=True)]
Seconds = Annotated[float, Range(0, allow_infinity=True), Role.MACHINE, Group.OUTPUT]
Strategy = Annotated[str, Checked(augment_by_strategy)]
StoreDtype = Literal["float32", "bfloat16"]
"""Types of options with the range that holds for flags and files alike (mtt_fast/commands/option_fields.py)."""


@dataclass(frozen=True)
class CommonOptions:
    """Options of the images, the network, the device and the random numbers."""

    GROUP: ClassVar[Group] = Group.DATA

    dataset: str = "CIFAR10"
    """data set: digits, MNIST, FashionMNIST, CIFAR10, CIFAR100, Tiny, ImageNet, or an image folder (train/CLASS/…, test/CLASS/…)"""
    subset: str | None = None
    """subset of ImageNet: imagenette, imagewoof, imagefruit, imagemeow, imagesquawk or imageyellow; imagenet-a to imagenet-e, as in GLaD;
    if not given, all classes"""
    res: Side | None = None
    """resize the images to this side length in pixels (only data sets without a fixed size)"""
    data_path: Annotated[str, Role.LOCATION] = "data"
    """folder of the data sets"""
    packed_path: Annotated[str | None, Role.LOCATION] = None
    """folder for packed data sets, for example if DATA_PATH is read-only; if not given, DATA_PATH/packed"""
    download: Annotated[bool, Role.LOCATION, HARMLESS] = False
    """download the data set if it is missing (MNIST, FashionMNIST, CIFAR10, CIFAR100)"""
    zca: bool = False
    """whiten the images (ZCA, eps 0.1) instead of normalising them"""
    model: Annotated[str, Group.NETWORK] = "ConvNet"
    """network: ConvNet (depth 3, width 128), ConvNetD4, ConvNetD3W64, ConvNetNN (no norm), ConvNetBN, AlexNet, VGG11, ResNet18,
    ResNet18_AP, …; or FILE.py:NAME, a function or class of your own"""
    dsa: Annotated[TrueOrFalse, Group.AUGMENTATION] = True
    """augment images by differentiable siamese augmentation (DSA)"""
    dsa_strategy: Annotated[Strategy, Needs("dsa", " True"), Group.AUGMENTATION] = "color_crop_cutout_flip_scale_rotate"
    """operations of DSA, joined by underscores; each step draws one of them"""
    seed: Annotated[Seed, Group.RUN] = 0
    """seed of all random numbers"""
    device: Annotated[str, Role.MACHINE, Group.MACHINE, Checked(check_device_name)] = "auto"
    """device: auto, cpu, cuda, cuda:1, …"""
    precision: Annotated[PrecisionRequest, HARMLESS, Group.MACHINE] = "auto"
    """rounding of the factors of matrix products and convolutions on a GPU. fp32; tf32: as in the public code; fp16: about as exact as
    tf32, half the bytes, and an iteration that overflows is repeated in tf32; bf16. fp16 and bf16 need a ConvNet. auto: fp16 in
    the iterations of a distillation where Tensor cores support it, else tf32 (fp32 on GPUs without it). Sums are float32. No effect on a
    CPU, which uses float32"""

    def without_effect(self) -> dict[str, str]:
        """Return the options that have no effect with the others, with the reasons."""
        reasons, name = {}, name_of(self.dataset)
        if name != "ImageNet":
            reasons["subset"] = "without --dataset ImageNet"
        info = published(name) if name in OF_ONE_SIZE else None
        if info is not None and self.res != (side := info.image_shape[-1]):
            reasons["res"] = f"on {name}, whose images have {side} pixels a side"
        if name not in DOWNLOADED:
            reasons["download"] = f"on {self.dataset}: only {', '.join(DOWNLOADED)} are fetched"
        if self.precision != "auto" and choose_device(self.device).type == "cpu":
            reasons["precision"] = "on a CPU, which computes in float32"
        return reasons

    def remarks(self, given: Container[str]) -> list[str]:
        """Return remarks for the log on options in `given` that have another meaning in the public code."""
        if "dataset" in given and self.subset is None and name_of(self.dataset) == "ImageNet":
            return ["--dataset ImageNet without --subset is all of its classes; the public code takes imagenette"]
        return []

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

    def network(self, data: ImageData | DatasetInfo) -> Trainable:
        """Return the network that the options name, for `data`."""
        return network_by_name(self.model, data.image_shape, data.num_classes)

    @property
    def strategy(self) -> str:
        """Return the augmentation's operations, or "none"."""
        return self.dsa_strategy if self.dsa else "none"


@dataclass(frozen=True)
class TrainingOptions(CommonOptions):
    """Options of the training of several networks on one device."""

    GROUP: ClassVar[Group] = Group.MACHINE

    networks_at_once: Annotated[Networks | None, Role.MACHINE] = None
    """number of networks to train at the same time; if not given, as many as the device has room for. The result is the same"""


@dataclass(frozen=True)
class EvaluationOptions(TrainingOptions):
    """Options of an evaluation: the networks, and the protocol."""

    GROUP: ClassVar[Group] = Group.EVALUATION

    batch_train: Annotated[Count | None, Role.EVALUATION] = None
    """batch size of the networks that an evaluation trains; if not given, that of --protocol, or 256"""
    num_eval: Annotated[Networks, Role.EVALUATION] = 5
    """number of networks that an evaluation trains and tests"""
    epoch_eval_train: Annotated[CountFromZero | None, Role.EVALUATION] = None
    """training epochs of each network in an evaluation; if not given, those of --protocol: 2000 for ncfm, 1000 for the others"""
    eval_mode: Annotated[str, Role.EVALUATION, Checked(partial(eval_pool, model="ConvNet"))] = "S"
    """networks to evaluate. S: --model with instance norm instead of batch norm; SS: --model; C: --model and ConvNet; M: architectures;
    W: widths; D: depths; A: activations; P: poolings; N: norms; B, BN: batch norm"""
    protocol: Annotated[str, Role.EVALUATION, Checked(published_protocol)] = "mtt"
    """evaluation protocol: mtt, datm (batches of 128), ddranking (reports the best epoch), selmatch (learning rate 0.1, falling
    along a cosine) or ncfm (AdamW and CutMix, reports the best epoch)"""
    best_epoch: Annotated[bool, Role.EVALUATION, HARMLESS] = False
    """report the best epoch of each evaluated network, chosen on the test images, instead of the last"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons = super().without_effect()
        if published_protocol(self.protocol).best_epoch:
            reasons["best_epoch"] = f"with --protocol {self.protocol}, which reports the best epoch by itself"
        return reasons

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks = super().remarks(given)
        if self.eval_mode == "SS" and "eval_mode" in given and eval_pool("S", self.model) == (self.model,):
            remarks.append(f"--eval_mode SS is the same as S at --model {self.model}, which S does not change")
        if self.eval_mode == "S" and (pool := eval_pool("S", self.model)) != (self.model,):
            remarks.append(
                f"--model {self.model}, --eval_mode S: networks are evaluated with instance norm as {pool[0]}, as in the public code; "
                "--eval_mode SS evaluates --model"
            )
        return remarks

    def evaluated_networks(self, data: ImageData | DatasetInfo) -> dict[str, Trainable]:
        """Return the networks to evaluate for `data`, by name, the network of --model first if it is among them.

        Raises `InputError` for an unknown --eval_mode, or images that are too small for one of them.
        """
        own = self.network(data)
        pool = {
            name: own if name == self.model else network_by_name(name, data.image_shape, data.num_classes)
            for name in eval_pool(self.eval_mode, self.model)
        }
        first = [name for name, network in pool.items() if name == self.model or network == own][:1]
        return {name: pool[name] for name in [*first, *pool]}

    def evaluation_protocol(self) -> EvaluationProtocol:
        """Return the evaluation protocol. Raises `InputError` for a number of epochs that the protocol cannot have."""
        return protocol_by_name(
            self.protocol,
            epochs=self.epoch_eval_train,
            batch_size=self.batch_train,
            augment=self.strategy,
            best_epoch=self.best_epoch,
        )


def buffer_folder(buffer_path: str, data: ImageData | DatasetInfo | DatasetIdentity, model: str, *, zca: bool) -> Path:
    """Return the folder of the experts, such as PATH/CIFAR10_NO_ZCA/ConvNet, or PATH/imagenette-128/ConvNetD5 for an ImageNet subset."""
    if data.name.upper().startswith("CIFAR"):
        name = data.name if zca else f"{data.name}_NO_ZCA"
    else:
        name = f"{data.name}_ZCA" if zca else data.name
    return Path(buffer_path) / name / model.rpartition(":")[2]
