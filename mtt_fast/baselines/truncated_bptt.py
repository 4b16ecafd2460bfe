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

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.baselines.adam_steps import AdamSteps, Draws, corrections, draw
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import starting_images
from mtt_fast.commands.option_fields import Group, Needs
from mtt_fast.commands.options import Count, Positive, Share, Strategy
from mtt_fast.engine.students.choice import precision_on, student_for
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.cuda_graphs import graphed
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.epochs import STEPS_AT_ONCE
from mtt_fast.training.images import Images, RealImages

_REAL_PIECE = 500  # real images in memory at once
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
    """The last steps of a training, through which gradients are propagated."""

    before: int  # number of steps before the window
    steps: int


class RealLoss(NamedTuple):
    """The loss () on real images at the end of a training, with the parameters (P,) there, and the draws of the images."""

    loss: Tensor
    theta: Tensor
    draws: Draws


class TruncatedBptt:
    """Learn images by truncated backpropagation, for the method called `method`.

    A ConvNet's steps are computed in fp32 unless --precision says otherwise: a step of Adam is much less exact in tf32. On CUDA
    all steps are replayed from CUDA graphs.
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
        precision: Precision = "fp32"
        if options.precision != "auto":
            precision = precision_on(self._device, network, options.precision)
        augment, self._augment_real = (
            augment_by_strategy(name) for name in (options.syn_strategy, options.real_strategy)
        )
        kind: LabelKind = "probabilities" if options.train_y else "indices"
        self._steps = AdamSteps(
            student_for(network, self._device, kind, precision=precision), augment,
            length=self._classes_per_step * min(options.batch_per_class, options.ipc),
            lr=self.images.new_tensor(options.inner_lr),
        )  # fmt: skip
        student_of_real = student_for(network, self._device, "indices", precision=precision)
        self._student_of_real = InMicrobatches(student_of_real, _REAL_PIECE)
        self._train = graphed(self._steps.train, self._device, kernels.compile_ahead)
        # windows of AT-BPTT have many lengths
        self._differentiate = graphed(
            self._real_loss, self._device, kernels.compile_ahead, max_captured=options.totwindow
        )

    @property
    def iterations_per_epoch(self) -> int:
        """Return the number of iterations in an epoch of the real images."""
        return math.ceil(len(self._real.train) / self._options.batch_real)

    def learned_set(self, step: Callable[[int], float], carried: Mapping[str, Tensor] | None = None) -> LearnedSet:
        """Return the set that `step` learns by calls of `update_set`, and the tensors `carried` with it."""
        return LearnedSet(
            self.images, self.labels, self._optimizer, step, lr=lambda: torch.tensor(self._options.lr_net),
            label_kind="weights" if self._options.train_y else "indices",
            carried={"gradient_norm": self._norm} | dict(carried or {}),
            own_training=lambda generator: self._trained(_OWN_STEPS, generator).theta,
        )  # fmt: skip

    def update_set(self, iteration: int, window: Window) -> RealLoss:
        """Update the set by the gradient, through `window`, of a training's loss on real images. Return that loss."""
        generator = generator_for(self._options.seed, self._method, iteration)
        trained, adam = self._trained(window.before, generator), corrections(*window, self._device)
        draws, real_draws = self._draws(window.steps, generator), self._real_draws(generator)
        loss, theta, to_images, *to_labels = self._differentiate(
            trained.theta, trained.moments, adam, self.images, self.labels, *draws, *real_draws
        )
        self.images.grad = clipped(to_images, self._norm, self._options.clip_coef)
        self.labels.grad = next(iter(to_labels), None)
        self._optimizer.step()
        self.labels.clamp_(min=0)
        return RealLoss(loss, theta, real_draws)

    def gradient_norms(self, steps: int, generator: torch.Generator) -> Tensor:
        """Return the norms (steps,) of the gradients in a training of a fresh network on the images."""
        return torch.cat(self._trained(steps, generator).norms)

    def real_images(self, draws: Draws) -> Images:
        """Return the real images of a loss, augmented."""
        inputs, targets = self._real.train.batch(draws.indices)
        return Images(inputs if self._augment_real is None else self._augment_real(inputs, draws.parameters), targets)

    def _real_loss(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return a loss () on real images, the parameters (P,) at the end of the training, and the gradients of images and labels.

        The arguments are those of `AdamSteps.train`, and the draws of the real images. The gradient of labels that are not learned
        is left out.
        """
        theta, moments, adam, images, labels, indices, parameters, *real_draws = tensors
        learned = [images, *([labels] if self._options.train_y else [])]
        with torch.enable_grad():
            images, *soft = (tensor.detach().requires_grad_() for tensor in learned)
            path = self._steps.path(theta, moments, adam, images, soft[0] if soft else labels, indices, parameters)
            end, real = path[-1].detach().clone(), self.real_images(Draws(*real_draws))
            at_end = self._student_of_real.gradient(end, real.pixels, real.labels)
            gradients = torch.autograd.grad(path[-1], (images, *soft), at_end.gradient)
        return at_end.loss, end, *gradients

    def _trained(self, steps: int, generator: torch.Generator) -> _Trained:
        """Return a fresh network after some steps on the images."""
        theta = upload(self._network.init(generator), self._device)
        trained = _Trained(theta, theta.new_zeros(2, len(theta)), [])
        if not steps:
            return trained
        length = self._steps.length
        per_image = (tensor.split(STEPS_AT_ONCE * length) for tensor in self._draws(steps, generator))
        for adam, *draws in zip(corrections(0, steps, self._device).split(STEPS_AT_ONCE), *per_image, strict=True):
            theta, moments, norms = self._train(trained.theta, trained.moments, adam, self.images, self.labels, *draws)
            trained = _Trained(theta, moments, [*trained.norms, norms])
        return trained

    @property
    def _classes_per_step(self) -> int:
        num_classes = self._real.data.num_classes
        return min(self._options.task_sampler_nc or num_classes, num_classes)

    def _draws(self, steps: int, generator: torch.Generator) -> Draws:
        batches = random_batches(
            self._real.data.num_classes, self._options.ipc, self._classes_per_step, self._options.batch_per_class, steps,
            generator,
        )  # fmt: skip
        return draw(batches, self.images.shape[1:], self.images.dtype, self._steps.augment, generator, self._device)

    def _real_draws(self, generator: torch.Generator) -> Draws:
        order = torch.randperm(len(self._real.train), generator=generator)[: self._options.batch_real]
        return draw([order], self.images.shape[1:], self.images.dtype, self._augment_real, generator, self._device)


class _Trained(NamedTuple):
    """A network after some steps."""

    theta: Tensor  # (P,)
    moments: Tensor  # (2, P), of Adam
    norms: list[Tensor]  # of the gradients of its steps, each (steps of a chunk,)


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
