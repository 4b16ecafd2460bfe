"""DD-Ranking (arXiv 2505.13300): the call of its version 0.2.0 that takes a set of ours, and its score from accuracies.

That version cannot run as it is. What `ddranking_call` returns goes round these faults, and names each in a comment:

- tensors of random images go to the GPU, where no worker process of a data loader can read them;
- random images get their class from a dictionary that ZCA-whitened data asks with tensors, and soft labels do not pass;
- soft labels of random images come from a teacher under an attribute that is never set;
- networks without an entry in its table of training settings cannot be trained on all real images;
- its score takes per cent for fractions, and for hard labels comes twice from each run, so that no table can be saved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mtt_fast.errors import InputError
from mtt_fast.interop.tensor_set import TensorSet

VERSION = "0.2.0"
"""The version of DD-Ranking that the call is for."""


class _Data(NamedTuple):
    """A data set as DD-Ranking has it."""

    name: str
    classes: int
    size: int | None  # pixels; None where DD-Ranking resizes the real images
    folder: str  # below the --data_path, if it is as mtt_fast finds it
    about: str  # the content that the folder needs


_IMAGENET = "train/WNID/ and val/WNID/ of all 1,000 classes"
_DATA = {
    "cifar10": _Data("CIFAR10", 10, 32, "", "fetched if it is missing"),
    "cifar100": _Data("CIFAR100", 100, 32, "", "fetched if it is missing"),
    "tiny": _Data(
        "TinyImageNet", 200, 64, "tiny-imagenet-200", "train/WNID/ and val/WNID/, the latter sorted by class"
    ),
    "imagenet": _Data("ImageNet1K", 1000, None, "", _IMAGENET),
    **{
        f"image{kind}": _Data(f"Image{kind.capitalize()}", 10, None, "", _IMAGENET)
        for kind in ("nette", "woof", "meow", "squawk", "fruit", "yellow")
    },
}
"""By --dataset or --subset, in lower case."""

_TRAINED = {("CIFAR10", 3), ("CIFAR100", 3)}
"""Data sets and depths of ConvNet for which DD-Ranking knows how to train on all real images."""
_DSA = {
    "flip": 0.5, "rotate": 15.0, "saturation": 2.0, "brightness": 1.0, "contrast": 0.5, "scale": 1.2, "crop": 0.125,
    "cutout": 0.5,
}  # fmt: skip


def label_robust_score(hard_label_recovery: float, improvement_over_random: float, weight: float = 0.5) -> float:
    """Return DD-Ranking's label-robust score, (e^α − e⁻¹) / (e − e⁻¹) with α = w·IOR − (1 − w)·HLR, in [0, 1].

    `hard_label_recovery` (HLR) is the accuracy on all real images less that on the distilled set, both with hard labels;
    `improvement_over_random` (IOR) is the accuracy on the distilled set with the labels it brings less that on as many
    random images labelled in the same way. Both are fractions in [-1, 1]; `weight` is w, in [0, 1].
    Raises `InputError` for values outside.
    """
    for name, value, least in (
        ("hard_label_recovery", hard_label_recovery, -1), ("improvement_over_random", improvement_over_random, -1),
        ("weight", weight, 0),
    ):  # fmt: skip
        if not least <= value <= 1:
            raise InputError(f"{name} {value}: expected a fraction from {least} to 1; divide per cent by 100")
    alpha = weight * improvement_over_random - (1 - weight) * hard_label_recovery
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def ddranking_call(
    folder: str | os.PathLike[str],
    distilled: TensorSet,
    dataset: str | None,
    zca: bool | None,
    subset: str | None = None,
    data_path: str | os.PathLike[str] = "data",
) -> str:
    """Return the Python that gives a set written to `folder` by `write_ddranking` to DD-Ranking (`VERSION`).

    `dataset`, `subset` and `data_path` are those of the options; `zca` says whether the images are whitened, None that it
    is not known. Raises `InputError`, with the reason, for a set that DD-Ranking cannot take.
    """
    data = _data_of(distilled, dataset, subset, zca)
    soft = distilled.label_kind != "indices"
    depth = max(3, distilled.images.shape[-1].bit_length() - 3)  # the field's: 3 for 32 pixels, 4 for 64, 5 for 128
    kind = "soft" if soft else "hard"
    name = f"LabelRobustScore{kind.capitalize()}"
    lr = "load('lr.pt')" if distilled.lr is not None else "None"
    arguments = _arguments(distilled, data, f"ConvNet-{depth}", zca, Path(data_path) / data.folder, soft)
    lines = [
        "import torch",
        f"from ddranking.metrics import {name}, {kind}_label",
        *_settings(data.name, depth),
        "",
        f"load = lambda name: torch.load({f'{Path(folder)}/'!r} + name)",
        *(_classes_of_random_images(data.classes) if soft else _WITHOUT_THE_SCORE),
        f"metric = {name}(",
        *(f"    {argument}" for argument in arguments),
        ")",
        *_repairs(data.classes, soft, zca),
        "print(metric.compute_metrics(",
        f"    image_tensor=load('images.pt'), {kind}_labels=load('labels.pt'), syn_lr={lr},",
        "))",
        "# its label_robust_score takes per cent for fractions; from the HLR and IOR (in %) that it prints follows with",
        "# python -m mtt_fast.analysis score --hlr HLR --ior IOR the one that its paper defines",
    ]
    return "\n".join(lines)


def _data_of(distilled: TensorSet, dataset: str | None, subset: str | None, zca: bool | None) -> _Data:
    """Return the data set that a set was distilled from. Raises `InputError` if DD-Ranking lacks it, or cannot evaluate on it."""
    if dataset is None:
        raise InputError("the data set that the set was made from is not known; give `dataset`")
    data = _DATA.get((subset or dataset).casefold())
    if data is None:
        raise InputError(f"it has CIFAR10, CIFAR100, Tiny, ImageNet and six of its subsets, not {subset or dataset}")
    channels, height, width = distilled.images.shape[1:]
    size = data.size or height
    if (channels, height, width) != (3, size, size) or distilled.num_classes != data.classes:
        raise InputError(
            f"it expects images {(3, size, size)} of {data.classes} classes of {data.name}, found "
            f"{(channels, height, width)} of {distilled.num_classes}"
        )
    if zca and not data.name.startswith("CIFAR"):
        raise InputError(f"it whitens only CIFAR10 and CIFAR100, and the images of {data.name} are whitened")
    if distilled.label_kind != "indices" and data.classes == 10 and data.name.startswith("Image"):
        raise InputError(f"it takes no soft labels for {data.name}; `hard_labels` writes the set with classes")
    return data


def _arguments(
    distilled: TensorSet, data: _Data, model: str, zca: bool | None, real_data_path: Path, soft: bool
) -> Sequence[str]:
    """Return the lines of keyword arguments of the metric: all that its version needs, as for MTT on its board."""
    guessed = "" if zca is not None else "  # True if the images are whitened: their files do not say"
    lines = [
        f"dataset={data.name!r}, ipc={distilled.ipc('DD-Ranking')}, model_name={model!r}, im_size={tuple(distilled.images.shape[2:])},",
        f"real_data_path={str(real_data_path)!r},  # {data.about}",
        f"use_zca={bool(zca)},{guessed}",
        "data_aug_func='dsa',",
        f"aug_params={_DSA!r},",
        "optimizer='sgd', momentum=0.9, weight_decay=0.0005, lr_scheduler='step', step_size=500,",
        "num_epochs=1000, num_eval=5, syn_batch_size=256, real_batch_size=256,",
        "eval_full_data=True,  # it knows no accuracy of this network on all real images, and trains it in each run",
        "random_data_format='tensor',",
        "num_workers=0,  # the random images are on the device, where workers cannot read them",
        "device='cuda' if torch.cuda.is_available() else 'cpu', dist=False,",
    ]
    if soft:
        lines += [
            "soft_label_mode='S', soft_label_criterion='sce', loss_fn_kwargs={'temperature': 1.0, 'scale_loss': False},",
            "use_aug_for_hard=True,",
            f"teacher_dir='teacher_models', teacher_model_names=[{model!r}],"
            f"  # a state_dict in teacher_models/{data.name}/{model}/ckpt_best.pt",
        ]
    return lines


def _settings(name: str, depth: int) -> Sequence[str]:
    """Return the lines that add settings of training on all real images, where DD-Ranking has none for the network."""
    if (name, depth) in _TRAINED:
        return ()
    return (
        "from ddranking.utils import REAL_DATA_TRAINING_CONFIG",
        "",
        f"REAL_DATA_TRAINING_CONFIG[{f'{name}-ConvNet-{depth}'!r}] = REAL_DATA_TRAINING_CONFIG['CIFAR10-ConvNet-3']"
        "  # it has none",
    )


_WITHOUT_THE_SCORE = (
    "save = hard_label.save_results  # which cannot save two scores a run",
    "hard_label.save_results = lambda results, path: save(",
    "    {name: results[name] for name in ('hard_label_recovery', 'improvement_over_random')}, path)",
)


def _classes_of_random_images(classes: int) -> Sequence[str]:
    return (
        "draw = soft_label.get_random_data_tensors  # which is called without the classes' numbers",
        "soft_label.get_random_data_tensors = lambda name, real, members, ipc, run, path: draw(",
        f"    name, real, members, ipc, range({classes}), run, path)",
    )


def _repairs(classes: int, soft: bool, zca: bool | None) -> Sequence[str]:
    """Return the lines that fix the metric after it is made."""
    if soft:
        return ("metric.teacher_model = metric.teacher_models[0]  # the name by which it is asked",)
    if zca:
        return (f"metric.class_map = range({classes})  # in place of a dictionary, which is asked with tensors",)
    return ()
