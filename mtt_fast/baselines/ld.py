"""Learn soft labels for a few real images, which stay as they are: label distillation (LD: Bohdal et al., 2020).

The paper's second-order method. A network trains on the images with the current labels; at each of the network's steps
Adam moves the labels so that this step lowers the loss on a batch of real images. When the error has not fallen for a
while, a fresh network replaces it. Options and defaults are those of the public code, whose 400 epochs, at CIFAR-10, are
17,600 iterations. The method's own training takes as many steps of Adam as the last networks took to their lowest error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import IterativeOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.commands.option_fields import Group
from mtt_fast.commands.options import Count, Positive
from mtt_fast.engine.students.choice import precision_on, student_for
from mtt_fast.engine.unroll import unroll
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import RealImages

_MODEL_LR = 1e-3  # Adam's default, which the public code takes
_LAST_LIFETIMES = 3  # networks whose steps to the lowest error are averaged, as in the public code


@dataclass(frozen=True)
class LdOptions(IterativeOptions):
    """Learn soft labels for random real images."""

    batch_real: Count = 1024
    """real images in the loss"""
    inner_batch_size: Count = 50
    """images with learned labels per step of the network; all if there are fewer"""
    inner_lr: Positive = 0.01
    """learning rate of the network step through which the labels are learned"""
    lr_y: Annotated[Positive, Group.LABELS] = 1e-3
    """learning rate of the labels (Adam)"""


def ld(options: LdOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned: labels, probabilities (n, classes), for --ipc random images of each class."""
    images, classes = starting_images(real, options.ipc, "real", options.seed).pixels, real.data.num_classes
    device, count = images.device, len(images)
    labels = torch.full((count, classes), 1 / classes, device=device)
    theta = network.init(generator_for(options.seed, "ld network", 0)).to(device)
    errors = torch.empty(0)  # since the start of this network's training
    lifetimes = torch.empty(0)  # of the networks before: steps to the lowest mean error
    optimizer = torch.optim.Adam([{"params": [labels], "lr": options.lr_y}, {"params": [theta], "lr": _MODEL_LR}])
    precision = precision_on(device, network, options.precision)
    student = student_for(network, device, "probabilities", precision=precision)
    everything, lr = torch.arange(len(real.train)), torch.tensor(options.inner_lr, device=device)
    window = patience(count, classes)

    def step(iteration: int) -> float:
        generator = generator_for(options.seed, "ld", iteration)
        inputs, targets = random_batch(real.train, everything, options.batch_real, generator)
        index = upload(torch.randperm(count, generator=generator)[: options.inner_batch_size], device)
        soft = labels.detach().requires_grad_()
        logits = network(unroll(network, theta, images, soft, lr, [index], precision=precision)[-1], inputs)
        loss = F.cross_entropy(logits, targets)
        (labels.grad,) = torch.autograd.grad(loss, soft)
        theta.grad = student.gradient(theta, images[index], labels[index]).gradient
        optimizer.step()
        labels.clamp_(0, 1)
        labels.div_(labels.sum(dim=1, keepdim=True))
        errors.resize_(len(errors) + 1)[-1] = (logits.argmax(dim=1) != targets).float().mean().cpu()
        if stagnates(errors, window):
            lifetimes.resize_(len(lifetimes) + 1)[-1] = len(errors) - window - 1
            theta.copy_(network.init(generator_for(options.seed, "ld network", iteration + 1)))
            optimizer.state.pop(theta)
            errors.resize_(0)
        return float(loss.detach())

    def own_training(generator: torch.Generator) -> Tensor:
        trained = network.init(generator).to(device)
        adam = torch.optim.Adam([trained], lr=_MODEL_LR)
        for _ in range(steps_of_own_training(lifetimes, errors)):
            index = upload(torch.randperm(count, generator=generator)[: options.inner_batch_size], device)
            trained.grad = student.gradient(trained, images[index], labels[index]).gradient
            adam.step()
        return trained

    return LearnedSet(
        images, labels, optimizer, step, lr=lambda: torch.tensor(options.lr_net), label_kind="probabilities",
        carried={"theta": theta, "errors": errors, "lifetimes": lifetimes}, own_training=own_training,
    )  # fmt: skip


def steps_of_own_training(lifetimes: Tensor, errors: Tensor) -> int:
    """Return the mean of the last `lifetimes` (networks,), or else the number of steps of the first network, of `errors` (steps,)."""
    last = lifetimes[-_LAST_LIFETIMES:]
    return int(last.sum()) // len(last) if len(last) else len(errors)


def patience(images: int, classes: int) -> int:
    """Return the number of steps over which errors are averaged, and for which a network may go without a lower average."""
    if classes > 10:
        return 100
    return 200 if images > 100 else 50


def stagnates(errors: Tensor, window: int) -> bool:
    """Return whether the mean of `window` successive `errors` (steps,) was lowest more than `window` steps ago."""
    if len(errors) <= 2 * window:
        return False
    sums = errors.unfold(0, window, 1).sum(dim=1)
    lowest = int((sums == sums.min()).nonzero()[0])
    return len(sums) - 1 - lowest > window
