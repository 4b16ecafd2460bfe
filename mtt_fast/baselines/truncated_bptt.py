"""Learn images by the loss on real images, by truncated backpropagation through time.

Each iteration trains a fresh network on the images by Adam. The gradient of its loss on real images is propagated only through the
last steps, the window. The methods (ratbptt.py, atbptt.py) differ in the choice of the window. The options are those of their
public codes. Here the real images of each iteration are drawn again, and whitening (--zca) is that of MTT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.augmentation.siamese import SiameseAugment, augment_by_strategy, augment_with
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.commands.option_fields import Group, Needs
from mtt_fast.commands.options import Count, Positive, Share, Strategy
from mtt_fast.engine.optimizers import Adam
from mtt_fast.engine.student import InMicrobatches
from mtt_fast.engine.student_choice import precision_on, student_for
from mtt_fast.engine.unroll import unroll
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages

_REAL_PIECE = 500  # real images in memory at once
_PATH_STEPS = 50  # of training without gradients: its path is in memory
_OWN_STEPS = 1000  # of the method's own training; the public codes test after 300, 600, 1000 and 3000


@dataclass(frozen=True)
class TruncatedBpttOptions(LearnedImagesOptions):
    """Learn images so that training on them lowers the loss on real images, through a window of its steps."""

    lr_img: Positive = 0.001
    """learning rate of the pixels (Adam)"""
    pix_init: Literal["real", "noise"] = "noise"
    """initial images: real images, or noise in which each image has norm 1"""
    batch_real: Count = 5000
    """real images in the loss"""
    batch_per_class: Count = 10
    """synthetic images of each class in a step; all if there are fewer"""
    task_sampler_nc: Count | None = None
    """classes in a step, drawn anew for each; all if there are fewer, or if not given"""
    totwindow: Count = 200
    """largest number of steps, including the window"""
    inner_lr: Positive = 0.001
    """learning rate of the networks (Adam)"""
    syn_strategy: Strategy = "flip_rotate"
    """augmentation of the synthetic images: operations as in --dsa_strategy, or none"""
    real_strategy: Strategy = "flip_rotate"
    """augmentation of the real images: operations as in --dsa_strategy, or none"""
    clip_coef: Share = 0.9
    """decay of the running average of the images' gradient norm; these gradients are clipped to twice this average"""
    train_y: Annotated[bool, Group.LABELS] = False
    """learn the labels too: weights of the classes, which begin as 1 for the image's class and 0 for the others"""
    label_lr_scale: Annotated[Positive, Needs("train_y"), Group.LABELS] = 1.0
    """the labels' learning rate is --lr_img divided by this"""


class Window(NamedTuple):
    """The last steps of a training, which gradients are propagated through."""

    before: int  # number of steps before the window
    steps: int


class RealLoss(NamedTuple):
    """The loss () on real images at the end of a training, with the parameters (P,) there, and the images, augmented."""

    loss: Tensor
    theta: Tensor
    images: Images


class TruncatedBptt:
    """Learn images by truncated backpropagation, for the method called `method`.

    A ConvNet's steps are computed in fp32 unless --precision says otherwise: a step of Adam is much less exact in tf32.
    """

    def __init__(self, method: str, options: TruncatedBpttOptions, real: RealImages, network: Trainable) -> None:
        self._method, self._options, self._real, self._network = method, options, real, network
        start = _starting_images(options, real)
        self.images, self.labels, self._device = start.pixels, start.labels, start.labels.device
        learned: list[dict[str, Any]] = [{"params": [self.images]}]
        if options.train_y:
            self.labels = F.one_hot(start.labels, real.data.num_classes).to(self.images)
            learned.append({"params": [self.labels], "lr": options.lr_img / options.label_lr_scale})
        self._optimizer = torch.optim.Adam(learned, lr=options.lr_img)
        self._norm = self.images.new_zeros(())  # the running average of the gradient norm
        self._precision: Precision = "fp32"
        if options.precision != "auto":
            self._precision = precision_on(self._device, network, options.precision)
        self._augment, self._augment_real = (
            augment_by_strategy(name) for name in (options.syn_strategy, options.real_strategy)
        )
        self._everything = torch.arange(len(real.train))
        kind: LabelKind = "probabilities" if options.train_y else "indices"
        self._student = student_for(network, self._device, kind, precision=self._precision)
        self._student_of_real = student_for(network, self._device, "indices", precision=self._precision)
        if not network.mixes_samples:
            self._student_of_real = InMicrobatches(self._student_of_real, _REAL_PIECE)

    @property
    def iterations_per_epoch(self) -> int:
        """Return the number of iterations in an epoch of the real images."""
        return math.ceil(len(self._everything) / self._options.batch_real)

    def learned_set(self, step: Callable[[int], float], carried: Mapping[str, Tensor] | None = None) -> LearnedSet:
        """Return the set that `step` learns by calls of `update_set`, and the tensors `carried` with it."""
        return LearnedSet(
            self.images, self.labels, self._optimizer, step, lr=lambda: torch.tensor(self._options.lr_net),
            label_kind="weights" if self._options.train_y else "indices",
            carried={"gradient_norm": self._norm} | dict(carried or {}),
            own_training=lambda generator: self._trained(_OWN_STEPS, generator)[0],
        )  # fmt: skip

    def update_set(self, iteration: int, window: Window) -> RealLoss:
        """Update the set by the gradient, through `window`, of a training's loss on real images. Return that loss."""
        generator = generator_for(self._options.seed, self._method, iteration)
        theta, moments = self._trained(window.before, generator)
        learned = Images(self.images.detach().requires_grad_(), self.labels.detach())
        learned.labels.requires_grad_(self._options.train_y)
        path, _ = self._steps(theta, learned, window, moments, generator)
        end = path[-1].detach()
        inputs, targets = random_batch(self._real.train, self._everything, self._options.batch_real, generator)
        inputs = self._augmented(inputs, self._augment_real, generator)
        at_end = self._student_of_real.gradient(end, inputs, targets)
        path[-1].backward(at_end.gradient)
        assert learned.pixels.grad is not None
        self.images.grad = clipped(learned.pixels.grad, self._norm, self._options.clip_coef)
        self.labels.grad = learned.labels.grad
        self._optimizer.step()
        self.labels.clamp_(min=0)
        return RealLoss(at_end.loss, end, Images(inputs, targets))

    def gradient_norms(self, steps: int, generator: torch.Generator) -> Tensor:
        """Return the norms (steps,) of the gradients in a training of a fresh network on the images."""
        theta = upload(self._network.init(generator), self._device)
        adam, images, norms = (
            torch.optim.Adam([theta], lr=self._options.inner_lr),
            Images(self.images, self.labels),
            [],
        )
        for index in self._batches(steps, generator):
            inputs, targets = images.batch(upload(index, self._device))
            inputs = self._augmented(inputs, self._augment, generator)
            theta.grad = self._student.gradient(theta, inputs, targets).gradient
            norms.append(torch.linalg.vector_norm(theta.grad))
            adam.step()
        return torch.stack(norms)

    def _trained(self, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return the parameters and moments of a fresh network after some steps on the images."""
        theta, moments = upload(self._network.init(generator), self._device), None
        with torch.no_grad():
            for before in range(0, steps, _PATH_STEPS):
                stretch = Window(before, min(_PATH_STEPS, steps - before))
                path, moments = self._steps(theta, Images(self.images, self.labels), stretch, moments, generator)
                theta = path[-1].clone()
        return theta, moments

    def _steps(
        self, theta: Tensor, images: Images, window: Window, moments: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the path and the last moments of the steps of `window` on `images`; those before it left `moments`."""
        return unroll(
            self._network, theta, images.pixels, images.labels, self._options.inner_lr, self._batches(window.steps, generator),
            self._augment, optimizer=Adam(steps=window.before), velocity=moments, return_velocity=True,
            generator=generator, precision=self._precision,
        )  # fmt: skip

    def _batches(self, steps: int, generator: torch.Generator) -> list[Tensor]:
        options, num_classes = self._options, self._real.data.num_classes
        classes = min(options.task_sampler_nc or num_classes, num_classes)
        return random_batches(num_classes, options.ipc, classes, options.batch_per_class, steps, generator)

    def _augmented(self, inputs: Tensor, augment: SiameseAugment | None, generator: torch.Generator) -> Tensor:
        if augment is None:
            return inputs
        return augment_with(inputs, upload(augment.draw_parameters([inputs], generator), self._device))


def _starting_images(options: TruncatedBpttOptions, real: RealImages) -> Images:
    """Return real images, or noise in which each image has norm 1."""
    start = starting_images(real, options.ipc, options.pix_init, options.seed)
    if options.pix_init == "real":
        return start
    return Images(start.pixels / start.pixels.flatten(1).norm(dim=1)[:, None, None, None], start.labels)


def random_batches(
    num_classes: int, ipc: int, classes: int, batch_per_class: int, steps: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the indices of the images of some steps.

    A step takes `classes` random classes, and of each of them `batch_per_class` random ones of its `ipc` images, or all.
    """
    drawn = torch.arange(num_classes).expand(steps, -1)
    if classes < num_classes:
        drawn = torch.rand(steps, num_classes, generator=generator).argsort(-1)[:, :classes]
    order = torch.rand(steps, classes, ipc, generator=generator).argsort(-1)[..., :batch_per_class]
    return list((drawn[..., None] * ipc + order).flatten(1))


def clipped(gradient: Tensor, norm: Tensor, decay: float) -> Tensor:
    """Return the gradient, clipped to twice the running average `norm` (), which is updated in place first."""
    gradient_norm: Tensor = torch.linalg.vector_norm(gradient)
    norm.copy_(torch.where(norm == 0, gradient_norm, torch.lerp(gradient_norm, norm, decay)))
    scale: Tensor = (2 * norm / (gradient_norm + 1e-6)).clamp(max=1)
    return gradient * scale
