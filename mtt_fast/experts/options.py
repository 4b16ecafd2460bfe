"""Define the options of the experts' training."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch

from mtt_fast.commands.option_fields import Group, Needs, Role
from mtt_fast.commands.options import (
    Count,
    CountFromZero,
    Networks,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    StoreDtype,
    TrainingOptions,
    TrueOrFalse,
)
from mtt_fast.errors import InputError
from mtt_fast.interop.order import read_order
from mtt_fast.training.curriculum import Curriculum
from mtt_fast.training.experts import ExpertTraining

STORE_DTYPES: dict[StoreDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExpertTrainingOptions(TrainingOptions):
    """Options of the experts' training in every command that trains experts."""

    GROUP: ClassVar[Group] = Group.EXPERTS

    IGNORED: ClassVar[dict[str, str]] = {
        "load_all": "trajectories are memory-mapped; nothing is loaded whole",
        "max_files": "there is one file an expert; limit them with --max_experts",
        "save_interval": "every expert is saved as soon as it is trained",
        "force_save": "pictures are always drawn",
        "lr_init": "the public code does not use it either; the learned learning rate starts at --lr_teacher in both (SelMatch's code starts "
        "it at --lr_init: give that value as --lr_teacher)",
    }
    """Flags of the public code that do nothing here, with the reasons: accepted, and named in the log."""

    train_epochs: Annotated[Count, Role.EXTENT] = 50
    """epochs of each expert"""
    mom: Share = 0.0
    """momentum of the experts"""
    l2: NonNegative = 0.0
    """weight decay of the experts"""
    decay: bool = False
    """divide the experts' learning rate by ten after --train_epochs / 2 + 2 epochs, as the public code does"""
    rho_max: NonNegative = 0.0
    """radius of SAM for the experts at the full learning rate; 0: plain SGD. FTD and DATM use 0.01"""
    rho_min: Annotated[NonNegative | None, Needs("rho_max")] = None
    """radius of SAM after --decay has divided the learning rate; if not given, --rho_max"""
    alpha: Annotated[NonNegative, Needs("rho_max")] = 0.0
    """weight of GSAM: subtract this much of the experts' plain gradient, orthogonal to SAM's gradient. FTD uses 0.3 or 1"""
    adaptive: Annotated[TrueOrFalse, Needs("rho_max")] = True
    """scale SAM's radius by the size of each parameter (ASAM), as FTD's code does"""

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks = super().remarks(given)
        if "dsa" in given and not self.dsa:
            remarks.append(
                "--dsa False leaves images as they are; the public code's buffer.py then crops, scales or rotates them"
            )
        if self.decay and self.train_epochs // 2 + 2 >= self.train_epochs:
            remarks.append(
                f"--decay has no effect at --train_epochs {self.train_epochs}, as in the public code: the rate falls after --train_epochs / 2 + 2 epochs"
            )
        return remarks

    def training_at(self, lr: float, batch_size: int) -> ExpertTraining:
        """Return the hyperparameters of an expert's training. Raises `InputError` for values that do not go together."""
        rho_min = self.rho_max if self.rho_min is None else self.rho_min
        if rho_min > self.rho_max or (rho_min != self.rho_max and not self.decay):
            raise InputError(
                f"--rho_max {self.rho_max}, --rho_min {rho_min}: expected the same value for both, or --decay with a smaller "
                "--rho_min, since the radius falls when the learning rate does"
            )
        if not self.rho_max and self.alpha:
            raise InputError(f"--alpha {self.alpha}: expected --rho_max above 0 with it")
        return ExpertTraining(
            train_epochs=self.train_epochs,
            lr=lr,
            mom=self.mom,
            l2=self.l2,
            decay=self.decay,
            batch_size=batch_size,
            augment=self.strategy,
            rho_max=self.rho_max,
            rho_min=rho_min,
            alpha=self.alpha,
            adaptive=self.adaptive and self.rho_max > 0,
        )


@dataclass(frozen=True)
class ExpertOptions(ExpertTrainingOptions):
    """Train experts, networks on the real images, and save their trajectories: the parameters after every epoch."""

    IGNORED: ClassVar[dict[str, str]] = ExpertTrainingOptions.IGNORED | {
        "batch_real": "it changes no expert in the public code either; --batch_train is the batch size of their training",
    }

    num_experts: Annotated[Networks, Role.EXTENT] = 100
    """number of experts; missing ones are trained"""
    lr_teacher: Positive = 0.01
    """learning rate of the experts"""
    batch_train: Count = 256
    """batch size of the experts' training"""
    buffer_path: Annotated[str, Role.LOCATION, Group.OUTPUT] = "buffers"
    """folder for the trajectories: PATH/DATASET/MODEL/expert_NNNN.safetensors"""
    store_dtype: Annotated[StoreDtype, Group.OUTPUT] = "float32"
    """number format of the saved parameters; bfloat16 takes half the disk space"""

    sort_method: Annotated[str | None, Role.LOCATION] = None
    """file with the training images of each class in the order of their difficulty, for PAD's curriculum: the indices, the easiest
    first, as in PAD's data_indices/CIFAR10_GraNd.pt"""
    init_ratio: Annotated[PositiveShare, Needs("sort_method")] = 0.75
    """share of each class's images, the easiest, in the first epoch"""
    add_end_epoch: Annotated[CountFromZero, Needs("sort_method")] = 20
    """first epoch with all images; the share rises until then. Epochs count from 0"""
    rm_epoch_first: Annotated[CountFromZero, Needs("sort_method")] = 40
    """last epoch with all images"""
    rm_epoch_second: Annotated[CountFromZero, Needs("sort_method")] = 60
    """last epoch that leaves out --rm_easy_ratio_first"""
    rm_easy_ratio_first: Annotated[Share, Needs("sort_method")] = 0.1
    """share of each class's images, the easiest, that epochs after --rm_epoch_first leave out"""
    rm_easy_ratio_second: Annotated[Share, Needs("sort_method")] = 0.2
    """share of each class's images, the easiest, that epochs after --rm_epoch_second leave out"""

    def training(self) -> ExpertTraining:
        """Return the hyperparameters of an expert's training, with the curriculum's file read.

        Raises `InputError` for values that do not go together, and a file that is broken.
        """
        plain = self.training_at(self.lr_teacher, self.batch_train)
        if self.sort_method is None:
            return plain
        if not Path(self.sort_method).is_file():
            raise InputError(
                f"--sort_method {self.sort_method}: expected a file such as data_indices/CIFAR10_GraNd.pt of PAD's code, found none; "
                "check the path"
            )
        curriculum = Curriculum(
            read_order(self.sort_method),
            init_ratio=self.init_ratio,
            add_end_epoch=self.add_end_epoch,
            rm_epoch_first=self.rm_epoch_first,
            rm_epoch_second=self.rm_epoch_second,
            rm_easy_ratio_first=self.rm_easy_ratio_first,
            rm_easy_ratio_second=self.rm_easy_ratio_second,
        )
        return replace(plain, curriculum=curriculum)
