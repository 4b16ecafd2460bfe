"""The options that the methods share, under the names that public code gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.commands.evaluated_set import REAL_IMAGES_LR
from mtt_fast.commands.options import EvaluationOptions, at_least
from mtt_fast.errors import InputError
from mtt_fast.experts import ExpertTraining, checked
from mtt_fast.training.protocols import EvaluationProtocol


@dataclass(frozen=True)
class BaselineOptions(EvaluationOptions):
    """Make a small training set, and evaluate it."""

    out: str | None = None
    """run folder; default runs/METHOD-DATASET-ipcN"""
    resume: bool = False
    """continue the run in --out, with its own options; the same command without it continues as well"""

    ipc: int = 1
    """images a class"""
    lr_net: float = REAL_IMAGES_LR
    """learning rate of networks that train on the set"""

    def folder(self, method: str) -> Path:
        """Return the run folder."""
        return Path(self.out or Path("runs") / f"{method}-{Path(self.subset or self.dataset).name}-ipc{self.ipc}")

    @property
    def batch_size(self) -> int:
        """Batch size for training networks other than those of an evaluation."""
        return self.batch_train or EvaluationProtocol.batch_size

    def complaint(self) -> str | None:
        """Return what is wrong with the first option that cannot be, or None."""
        return at_least(1, ipc=self.ipc, networks_at_once=self.networks_at_once) or more_than_zero(lr_net=self.lr_net)

    def check(self) -> None:
        """Raise `InputError` for the first option that cannot be."""
        complaint = self.complaint()
        if complaint:
            raise InputError(complaint)
        self.evaluation_protocol()
        augment_by_strategy(self.strategy)


@dataclass(frozen=True)
class TrainedNetworkOptions(BaselineOptions):
    """Choose real images through a network that was trained on all of them, the first expert."""

    buffer_path: str = "buffers"
    """where the experts' trajectories are; the first one is trained if there is none"""
    train_epochs: int = 50
    """its epochs"""
    expert_lr: float = 0.01
    """its learning rate"""
    mom: float = 0.0
    """its momentum"""
    l2: float = 0.0
    """its weight decay"""
    decay: bool = False
    """divide its learning rate by ten after half of the epochs"""

    def expert(self) -> ExpertTraining:
        """Return how the expert is trained if there is none. Raises `InputError` for values that cannot be."""
        training = ExpertTraining(
            self.train_epochs, self.expert_lr, self.mom, self.l2, self.decay, self.batch_size, self.strategy
        )
        return checked(training)

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        self.expert()


@dataclass(frozen=True)
class IterativeOptions(BaselineOptions):
    """Learn a set in iterations."""

    Iteration: int = 20000
    """iterations (updates of the set)"""
    eval_it: int = 2000
    """iterations between evaluations"""
    batch_real: int = 256
    """real images in a batch"""
    save_seconds: float = 60.0
    """time between checkpoints"""

    def complaint(self) -> str | None:
        """See `BaselineOptions.complaint`."""
        return (
            super().complaint()
            or at_least(1, eval_it=self.eval_it, batch_real=self.batch_real)
            or at_least(0, Iteration=self.Iteration, save_seconds=self.save_seconds)
        )


@dataclass(frozen=True)
class LearnedImagesOptions(IterativeOptions):
    """Learn images in iterations."""

    lr_img: float = 1.0
    """learning rate of the pixels"""
    pix_init: Literal["real", "noise"] = "real"
    """start from real images or from noise"""

    def complaint(self) -> str | None:
        """See `BaselineOptions.complaint`."""
        return super().complaint() or more_than_zero(lr_img=self.lr_img)


def more_than_zero(**values: float) -> str | None:
    """Return the first complaint about an option in `values` that is not above zero and finite, or None."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            return f"--{name} {value}: expected more than 0"
    return None
