"""Learn images through a random window of a training (RaT-BPTT: Feng, Vedantam & Kempe, ICLR 2024).

The first step of the window is drawn once for each epoch of the real images. Defaults are those of the public code's command for CIFAR-10,
whose 60,000 epochs with --batch_real 5000 are 600,000 iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.truncated_bptt import TruncatedBptt, TruncatedBpttOptions, Window
from mtt_fast.commands.options import Count, CountFromZero
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import RealImages


@dataclass(frozen=True)
class RatBpttOptions(TruncatedBpttOptions):
    """Learn images so that training on them lowers the loss on real images, through a random window of its steps."""

    window: Count = 60
    """number of steps that gradients are propagated through"""
    minwindow: CountFromZero = 0
    """least number of steps before the window"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if self.minwindow + self.window > self.totwindow:
            raise InputError(
                f"--totwindow {self.totwindow}: expected at least --minwindow {self.minwindow} + --window {self.window}"
            )


def ratbptt(options: RatBpttOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class."""
    bptt = TruncatedBptt("ratbptt", options, real, network)

    def step(iteration: int) -> float:
        return float(bptt.update_set(iteration, random_window(options, iteration // bptt.iterations_per_epoch)).loss)

    return bptt.learned_set(step)


def random_window(options: RatBpttOptions, epoch: int) -> Window:
    """Return the window of an epoch of the real images."""
    generator = generator_for(options.seed, "ratbptt window", epoch)
    most = options.totwindow - options.window
    return Window(int(torch.randint(options.minwindow, most + 1, (), generator=generator)), options.window)
