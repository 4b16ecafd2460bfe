"""Learn images through a window that follows the gradients of a training (AT-BPTT: Li et al., NeurIPS 2025).

A run has three stages. In the first, the window starts at a step with a large gradient norm, and is wider if the norm changes more
there. In the second, the window is wide, and starts at a random step. In the third, it is narrow, and starts at a step whose mirror
image, counted from the end, has a large gradient norm. The next stage begins when the accuracy on real images no longer rises.
Defaults are those of the public code's command for CIFAR-10, whose 60,000 epochs with --batch_real 5000 are 600,000 iterations.

Widths are counted from --window. The public code counts each from the last one (`model.module.window = shared_window.item()`), so
that in the second stage they grow until no window fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.truncated_bptt import RealLoss, TruncatedBptt, TruncatedBpttOptions, Window
from mtt_fast.commands.options import Count, CountFromZero
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.accuracy import count_correct
from mtt_fast.training.images import RealImages

_ENDS_OF_STAGES = {1: (0.015, 0.15), 2: (0.01, 0.125)}
"""a stage ends after epochs that each gain less than this accuracy, as many in a row as this share of --totwindow"""


@dataclass(frozen=True)
class AtBpttOptions(TruncatedBpttOptions):
    """Learn images so that training on them lowers the loss on real images, through a window that follows its gradients."""

    window: Count = 40
    """number of steps that gradients are propagated through, ± --d"""
    d: CountFromZero = 10
    """largest difference between the number of steps in the window and --window"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if self.d >= self.window:
            raise InputError(f"--d {self.d}: expected less than --window {self.window}")
        if self.window + self.d > self.totwindow:
            raise InputError(f"--totwindow {self.totwindow}: expected at least --window {self.window} + --d {self.d}")


@dataclass(frozen=True)
class Stages:
    """The stage of a run, and what decides when the next one begins. Its tensors change in place."""

    stage: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.long))  # 1, 2 or 3
    slow_epochs: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))  # in a row, up to now
    accuracy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # of the last epoch

    def end_epoch(self, accuracy: float, totwindow: int) -> None:
        """Count an epoch with this mean accuracy on real images, and begin the next stage after enough slow epochs.

        The public code requires exactly this number of epochs. With 300 steps it is 37.5, so its third stage never begins.
        """
        gain = accuracy - float(self.accuracy)
        self.accuracy.fill_(accuracy)
        # An epoch that ends a stage counts for the next one as well.
        for stage, (least_gain, share) in _ENDS_OF_STAGES.items():
            if int(self.stage) == stage:
                self.slow_epochs.fill_(int(self.slow_epochs) + 1 if gain < least_gain else 0)
                if int(self.slow_epochs) >= share * totwindow:
                    self.stage.fill_(stage + 1)
                    self.slow_epochs.zero_()


def atbptt(options: AtBpttOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class."""
    bptt, stages = TruncatedBptt("atbptt", options, real, network), Stages()
    iterations = bptt.iterations_per_epoch
    # Of the current epoch: the window, and the number of real images that were classified correctly.
    window, num_correct = torch.zeros(2, dtype=torch.long), torch.zeros((), dtype=torch.long, device=bptt.labels.device)

    def step(iteration: int) -> float:
        epoch, number = divmod(iteration, iterations)
        if number == 0:
            generator = generator_for(options.seed, "atbptt window", epoch)
            window.copy_(torch.tensor(window_of_stage(options, int(stages.stage), bptt.gradient_norms, generator)))
            num_correct.zero_()
        reached: RealLoss = bptt.update_set(iteration, Window(*window.tolist()))
        real_images = bptt.real_images(reached.draws)
        num_correct.add_(count_correct(network, reached.theta, real_images))
        if number == iterations - 1:
            stages.end_epoch(int(num_correct) / (iterations * len(real_images)), options.totwindow)
        return float(reached.loss)

    return bptt.learned_set(step, {"window": window, "right": num_correct, **vars(stages)})


def window_of_stage(
    options: AtBpttOptions,
    stage: int,
    gradient_norms: Callable[[int, torch.Generator], Tensor],
    generator: torch.Generator,
) -> Window:
    """Draw the window of an epoch in `stage`. `gradient_norms` returns the norms (n,) of the gradients in n steps of a training."""
    total, least = options.totwindow, options.window - options.d
    if stage == 2:
        steps = options.window + options.d
        return Window(int(torch.randint(total - steps + 1, (), generator=generator)), steps)
    norms = gradient_norms(total, generator).cpu().nan_to_num(0.0, 0.0)  # a diverged run ends by its loss
    drawn = int(torch.multinomial(norms.softmax(0), 1, generator=generator))
    if stage == 3:
        return Window(max(total - least - drawn, 0), least)
    changes = torch.cat([norms.new_zeros(1), norms.diff().abs()])
    rank = int((changes < changes[drawn]).sum())
    steps = least + 2 * options.d * rank // total
    return Window(min(drawn, total - steps), steps)
