"""Declare the options that the methods share, under the names that public code gives them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mtt_fast.commands.evaluated_set import REAL_IMAGES_LR
from mtt_fast.commands.option_fields import Group, Role
from mtt_fast.commands.options import (
    Count,
    CountFromZero,
    EvaluationOptions,
    NonNegative,
    Positive,
    Seconds,
    Share,
)
from mtt_fast.storage.run_files import last_name
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.protocols import EvaluationProtocol


@dataclass(frozen=True)
class BaselineOptions(EvaluationOptions):
    """Make a small training set, and evaluate it."""

    batch_train: Count | None = None
    """batch size of networks that are trained on the set or on real images; if not given, 256, or in an evaluation that of --protocol"""
    out: Annotated[str | None, Role.LOCATION, Group.OUTPUT] = None
    """run folder; if not given, runs/METHOD-DATASET-ipcN"""
    resume: Annotated[bool, Role.LOCATION, Group.OUTPUT] = False
    """continue the run in --out with the options it started with; repeating the first command also continues it"""

    ipc: Annotated[Count, Group.SET] = 1
    """images per class"""
    lr_net: Positive = REAL_IMAGES_LR
    """learning rate of networks that are trained on the set"""

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks, lr = super().remarks(given), self.evaluation_protocol().lr
        if "lr_net" in given and lr not in (None, self.lr_net):
            remarks.append(
                f"--lr_net {self.lr_net:g}: evaluations use the learning rate of --protocol {self.protocol}, {lr:g}; to evaluate with "
                "another, give --lr_teacher to python -m mtt_fast.evaluate"
            )
        return remarks

    def folder(self, method: str) -> Path:
        """Return the run folder."""
        return Path(self.out or Path("runs") / f"{method}-{last_name(self.subset or self.dataset)}-ipc{self.ipc}")

    @property
    def uses_network(self) -> bool:
        """Return whether the method, with these options, makes the set by a network."""
        return True

    @property
    def batch_size(self) -> int:
        """Return the batch size for training networks other than those of an evaluation."""
        return EvaluationProtocol.batch_size if self.batch_train is None else self.batch_train

    def check(self) -> None:
        """Raise `InputError` for the first values that do not fit each other. Single values are checked when they are parsed."""
        self.evaluation_protocol()


@dataclass(frozen=True)
class TrainedNetworkOptions(BaselineOptions):
    """Choose real images by a network that was trained on all of them, the first expert."""

    GROUP: ClassVar[Group] = Group.EXPERTS

    labels: Annotated[Literal["classes", "experts"], Group.LABELS] = "classes"
    """labels of the images. classes: the class of each; experts: the mean prediction of the experts in --buffer_path, probabilities"""
    label_epoch: Annotated[Count | None, Group.LABELS] = None
    """epoch of the experts that predict the labels; if not given, their last"""
    buffer_path: Annotated[str, Role.LOCATION] = "buffers"
    """folder of the experts' trajectories; if it is empty, one expert is trained"""
    train_epochs: Annotated[Count, Role.EXTENT] = 50
    """epochs of the first expert"""
    expert_lr: Positive = 0.01
    """learning rate of the first expert"""
    mom: Share = 0.0
    """momentum of the first expert"""
    l2: NonNegative = 0.0
    """weight decay of the first expert"""
    decay: bool = False
    """divide the first expert's learning rate by ten after --train_epochs / 2 + 2 epochs, as the public code does"""

    @property
    def reason_without_network(self) -> str:
        """Return the reason, for a message, why the method chooses its images without a trained network; "" where it uses one."""
        return ""

    @property
    def uses_network(self) -> bool:
        """See `BaselineOptions.uses_network`: a trained one, to choose images or for their labels."""
        return self.labels == "experts" or not self.reason_without_network

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons = super().without_effect()
        if self.labels != "experts":
            reasons["label_epoch"] = "without --labels experts"
        if not self.uses_network:
            expert_options = ("buffer_path", "train_epochs", "expert_lr", "mom", "l2", "decay")
            reasons |= dict.fromkeys(expert_options, self.reason_without_network)
        return reasons

    def expert(self) -> ExpertTraining:
        """Return the hyperparameters of the expert that is trained if there is none."""
        return ExpertTraining(
            train_epochs=self.train_epochs,
            lr=self.expert_lr,
            mom=self.mom,
            l2=self.l2,
            decay=self.decay,
            batch_size=self.batch_size,
            augment=self.strategy,
        )


@dataclass(frozen=True)
class IterativeOptions(BaselineOptions):
    """Learn a set in iterations."""

    GROUP: ClassVar[Group] = Group.DISTILLATION

    Iteration: Annotated[CountFromZero, Role.EXTENT] = 20000
    """iterations (updates of the set)"""
    eval_it: Annotated[Count, Role.EXTENT, Group.EVALUATION] = 2000
    """iterations between evaluations"""
    batch_real: Count = 256
    """real images per update"""
    save_seconds: Seconds = 60.0
    """seconds between checkpoints; inf: save only at evaluations and at the end"""


@dataclass(frozen=True)
class LearnedImagesOptions(IterativeOptions):
    """Learn images in iterations."""

    lr_img: Positive = 1.0
    """learning rate of the pixels"""
    pix_init: Literal["real", "noise"] = "real"
    """initial images: real images or noise"""
