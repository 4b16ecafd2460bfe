"""Time the training of experts on real images: mtt_fast beside an ordinary module and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from bench.training import TrainingOptions, compare
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.optimizers import Sgd


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Time an epoch of an expert's training."""


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    usual = ExpertTraining()
    compare(options, "experts", Sgd(usual.lr, usual.mom, usual.l2, options.batch_train), command)
