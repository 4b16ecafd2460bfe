"""Time training on distilled images, as in an evaluation: mtt_fast beside an ordinary module and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from bench.training import TrainingOptions, compare
from mtt_fast.commands.evaluated_set import REAL_IMAGES_LR
from mtt_fast.commands.options import Count
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.protocols import EvaluationProtocol


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Time an epoch of an evaluation's training."""

    images: Count = 100
    """images in the distilled set"""


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    usual = EvaluationProtocol()
    compare(options, "evaluate", Sgd(REAL_IMAGES_LR, usual.momentum, usual.weight_decay, options.batch_train), command)
