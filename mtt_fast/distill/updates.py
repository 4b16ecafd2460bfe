"""Update the images, learned labels and the student's learning rate by an iteration's gradients."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mtt_fast.data.synthetic import real_mask
from mtt_fast.distill.options import HALVED_AFTER, DistillOptions
from mtt_fast.distill.run import DistillRun
from mtt_fast.distill.segments import Segment, log_fields
from mtt_fast.errors import Diverged
from mtt_fast.parametrisations.parametrisation import Parametrisation, gradients_at, images_at
from mtt_fast.storage.checkpoint import State

log = logging.getLogger(__name__)

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's defaults for Adam
_GIVE_UP_AFTER = 25  # iterations without a finite gradient


def apply_gradients(
    options: DistillOptions,
    state: State,
    segments: Sequence[Segment],
    loss: float,
    gradients: Sequence[Tensor] | None,
    parametrisation: Parametrisation | None = None,
) -> tuple[str, dict[str, float]]:
    """Update images, labels and learning rate by the `gradients` of an iteration that matched `segments`.

    With a `parametrisation` its parameters are updated. Nothing is updated if `gradients` is None (not finite), or if `loss` is above
    the threshold. Return the kind ("step", "skip" or "above_threshold") and the values of the iteration's record in metrics.jsonl.
    """
    state.iteration += 1
    if gradients is not None and options.threshold is not None and loss > options.threshold:
        _reject_above_threshold(state, loss, options.threshold)
        return "above_threshold", {"loss": loss, **log_fields(segments)}
    if gradients is None or not update(options, state, *gradients, parametrisation=parametrisation):
        _skip(state, loss)
        return "skip", {"skipped": state.skipped}
    return "step", {"loss": loss, "lr": state.mean_lr, **log_fields(segments)}


def mask_real_images(options: DistillOptions, gradients: list[Tensor]) -> list[Tensor]:
    """Return `gradients` with zeros for real images that are not distilled, and for their labels (SelMatch)."""
    images_gradient, lr_gradient, *labels_gradients = gradients
    real = real_mask(
        len(images_gradient), len(images_gradient) // options.ipc, options.distilled_share, images_gradient.device
    )
    if real is None:
        return gradients
    images_gradient, *labels_gradients = (
        each.masked_fill(real.view(-1, *[1] * (each.dim() - 1)), 0) for each in (images_gradient, *labels_gradients)
    )
    return [images_gradient, lr_gradient, *labels_gradients]


def update(
    options: DistillOptions,
    state: State,
    images_gradient: Tensor,
    lr_gradient: Tensor,
    labels_gradient: Tensor | None = None,
    *,
    parametrisation: Parametrisation | None = None,
) -> bool:
    """Update images, learned labels and learning rate by the gradients of iteration `state.iteration`.

    With a `parametrisation` its parameters are updated in place of the pixels. Return False, and update nothing, if a gradient of these
    is not finite. A learning rate that would become negative keeps its value.
    """
    if parametrisation is None:
        _update_images(options, state, images_gradient)
    elif not _update_parameters(options, state, images_gradient, parametrisation):
        return False
    if options.lr_y is not None and state.labels_velocity is not None and labels_gradient is not None:
        _sgd_step(state.labels, state.labels_velocity, labels_gradient, options.lr_y, options.mom_y)
    _update_lr(options, state, lr_gradient)
    return True


def _update_images(options: DistillOptions, state: State, gradient: Tensor) -> None:
    """Update the pixels, and the moving average of the images if there is one (FTD)."""
    assert state.images_velocity is not None
    _sgd_step(state.images, state.images_velocity, gradient, _lr_img(options, state), options.mom_img)
    if options.ema_decay is not None and state.ema is not None:
        state.ema.lerp_(state.images, 1 - options.ema_decay)


def _update_parameters(
    options: DistillOptions, state: State, images_gradient: Tensor, parametrisation: Parametrisation
) -> bool:
    """Update the parameters of the images, and the images. Return False, and update nothing, if a gradient is not finite."""
    assert state.parameters is not None
    assert state.parameters_velocity is not None
    gradients = gradients_at(parametrisation, state.parameters, images_gradient)
    if not bool(torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()):
        return False
    for name, values in state.parameters.items():
        lr, velocity = parametrisation.relative_rate(name) * _lr_img(options, state), state.parameters_velocity[name]
        if state.parameters_square is None:
            _sgd_step(values, velocity, gradients[name], lr, options.mom_img)
        else:
            _adam_step(values, velocity, state.parameters_square[name], gradients[name], lr, state.updates)
    images_at(parametrisation, state.parameters, state.images)
    return True


def _lr_img(options: DistillOptions, state: State) -> float:
    """Return the learning rate of the images in iteration `state.iteration`."""
    return options.lr_img * (0.5 ** ((state.iteration - 1) // HALVED_AFTER) if options.lr_decay else 1)


def _update_lr(options: DistillOptions, state: State, gradient: Tensor) -> None:
    """Update the student's learning rate; a rate that would become negative keeps its value."""
    state.lr_velocity.mul_(options.mom_img).add_(gradient)
    proposed = state.lr - options.lr_lr * state.lr_velocity
    positive = proposed > 0
    before, state.lr = state.lr, torch.where(positive, proposed, state.lr)
    if positive.all():
        return
    if not state.lr_kept:
        log.warning(
            "iteration %d: the update would make the student's learning rate negative (%.3g); it is kept at %.3g. "
            "If this continues, lower --lr_lr",
            state.iteration, float(proposed.min()), float(before.view(-1)[proposed.argmin()]),
        )  # fmt: skip
    state.lr_kept += 1
    state.lr_velocity.masked_fill_(~positive, 0)


def _sgd_step(values: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float) -> None:
    """Do one step of torch.optim.SGD in place."""
    velocity.mul_(momentum).add_(gradient)
    values.sub_(velocity, alpha=lr)


def _adam_step(values: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, lr: float, step: int) -> None:
    """Do step number `step`, from 1 on, of torch.optim.Adam with its defaults in place."""
    mean.lerp_(gradient, 1 - _BETAS[0])
    square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    first, second = (1 - beta**step for beta in _BETAS)
    values.addcdiv_(mean, (square / second).sqrt_().add_(_EPS), value=-lr / first)


def _reject_above_threshold(state: State, loss: float, threshold: float) -> None:
    """Count an iteration whose loss is above the threshold. As in DATM neither values nor velocities are updated."""
    state.above_threshold += 1
    if state.above_threshold == 1:
        log.warning(
            "iteration %d: the matching loss %.4g is above --threshold %g and no update is made. If most iterations are "
            "like that, raise it",
            state.iteration, loss, threshold,
        )  # fmt: skip


def _skip(state: State, loss: float) -> None:
    """Count an iteration whose gradient is not finite."""
    state.skipped += 1
    if state.skipped == 1:
        log.warning(
            "iteration %d: the student diverged (loss %s) and the step is skipped. If this continues, lower --lr_img, --lr_lr or "
            "--lr_teacher",
            state.iteration, loss,
        )  # fmt: skip


def check_converges(run: DistillRun, state: State) -> None:
    """Raise `Diverged` after many iterations in a row without a finite gradient."""
    kinds = [record["kind"] for record in run.metrics.records if record["kind"] in ("step", "above_threshold", "skip")]
    if kinds[-_GIVE_UP_AFTER:] == ["skip"] * _GIVE_UP_AFTER:
        raise Diverged(
            f"{run.folder}: {_GIVE_UP_AFTER} iterations in a row diverged at a student's learning rate of {state.mean_lr:.3g}; "
            "the last checkpoint is good; start again with a smaller --lr_lr, --lr_img or --lr_teacher and another --out"
        )
