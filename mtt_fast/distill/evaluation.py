"""Evaluate the distilled set by training networks on it, draw its images, and write the summary at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import tiled
from mtt_fast.commands.accuracies import accuracy_fields, accuracy_record, format_accuracy
from mtt_fast.commands.evaluated_set import REAL_IMAGES_LR
from mtt_fast.commands.run_loop import (
    SET_NAMES,
    Record,
    best_accuracy,
    draw_curves,
    draw_set,
    evaluate_and_save,
    evaluate_network,
    format_iterations,
    set_to_save,
    write_summary,
)
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.gradients import DESCRIPTIONS
from mtt_fast.distill.labels import experts_at, has_soft_baseline, mean_teacher_labels
from mtt_fast.distill.run import DistillRun
from mtt_fast.errors import Diverged
from mtt_fast.kernels import LabelKind
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.identity import describe_other_data
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import Images
from mtt_fast.training.subsets import random_subset

log = logging.getLogger(__name__)

_TILES = 2  # a texture is shown side by side with itself, so that its borders can be judged
_INITIAL_IMAGES = {
    "real": "real images",
    "noise": "noise",
    "samples_predicted_correctly": "real images that experts classify correctly",
    "window": "real images of a window of difficulty",
}


def evaluate_sets(run: DistillRun, state: State, stop: StopRequest) -> None:
    """Train and test new networks on the current images, and on their moving average; write both sets, and pictures.

    A set that an earlier process evaluated at this iteration is only drawn. Raises `Diverged` if images, labels or learning rates
    are no longer finite.
    """
    _check_finite(run, state)
    evaluated = run.evaluated_images(state)
    for kind, images in {"evaluation": evaluated, "ema_evaluation": state.ema}.items():
        if images is None or run.metrics.find(kind, state.iteration):
            continue
        synthetic, words = _distilled_set(run, state, images, stop), SET_NAMES[kind].words
        results = evaluate_and_save(run, state, kind, synthetic, stop, words=f"{words}, ")
        for name, accuracy in results.items():
            log.info("iteration %d: %s, %s %s", state.iteration, words, name, accuracy)
        if kind == "evaluation" and run.options.teacher_label:
            log_recognised(state, synthetic.labels)
    _draw(run, state, evaluated)


def log_recognised(state: State, labels: Tensor) -> None:
    """Log how many images keep their class in the experts' `labels` (n, classes); warn if all images get one class.

    TESLA's gradient ignores that the labels change with the images, so an image may drift into another class.
    """
    predicted = labels.argmax(dim=1)
    num_correct = int((predicted == state.labels).sum())
    log.info(
        "iteration %d: the experts give %d of the %d images its own class", state.iteration, num_correct, len(labels)
    )
    if bool((predicted == predicted[0]).all()):
        log.warning(
            "iteration %d: the experts give all images one class, so networks learn nothing from this set; start again without "
            "--teacher_label, with another --out",
            state.iteration,
        )  # fmt: skip


def _check_finite(run: DistillRun, state: State) -> None:
    for name, values in (("images", state.images), ("labels", state.labels), ("learning rates", state.lr)):
        if not bool(values.isfinite().all()):
            raise Diverged(
                f"{run.folder}: iteration {state.iteration}: the {name} are no longer finite; start again with a smaller --lr_img, "
                "--lr_y or --lr_lr and another --out"
            )


def _distilled_set(run: DistillRun, state: State, images: Tensor, stop: StopRequest) -> SyntheticDataset:
    """Return the distilled set: `images` (n, C, H, W) with labels, and the learning rate to train networks with.

    With --teacher_label the labels are the mean predictions of all matched experts after max_start_epoch epochs.
    """
    options, labels = run.options, state.labels
    if options.teacher_label:
        experts = experts_at(run.experts, options.max_start_epoch, images.device, stop)
        labels = mean_teacher_labels(run.network, experts, images)
    return _set_with_labels(run, state, images, labels, options.label_kind)


def _set_with_labels(
    run: DistillRun, state: State, images: Tensor, labels: Tensor, label_kind: LabelKind
) -> SyntheticDataset:
    order = run.experts.metadata(0).hyperparameters.get("sort_method")  # the digest of that of a curriculum (PAD)
    recipe = {"iterations": state.iteration} | ({"sort_method": order} if order else {})
    return set_to_save(
        run, images, labels, state.lr.mean(), label_kind=label_kind, recipe=recipe,
        lr_per_step=state.lr if run.options.lr_per_step else None, canvas=run.options.canvas,
        parameters=state.parameters or {},
    )  # fmt: skip


def _draw(run: DistillRun, state: State, images: Tensor) -> None:
    """Draw the initial images above the current `images`."""
    # class indices are enough for a picture, so the experts need not label the images
    kind: LabelKind = "indices" if run.options.teacher_label else run.options.label_kind
    synthetic = _set_with_labels(run, state, images, state.labels, kind)
    first = dataclasses.replace(synthetic, images=run.initial().pictures)
    panels = []
    for iteration, pictures in {0: first.pictures(), state.iteration: synthetic.pictures()}.items():
        title = f"distilled, {format_iterations(iteration)}" if iteration else _INITIAL_IMAGES[run.options.pix_init]
        if not iteration and run.options.parametrisation:
            title = "initial images"
        if not iteration and run.options.msz_per_channel:
            title = f"{title}, {run.options.msz_per_channel} frequencies of each channel"
        if synthetic.canvas:
            title, pictures = f"textures, {title}, each tiled {_TILES} by {_TILES}", tiled(pictures, _TILES)
        panels.append((title, pictures, run.metrics.find("evaluation", iteration)))
    draw_set(run, synthetic, state.iteration, panels)


def summarise(run: DistillRun, state: State, stop: StopRequest) -> None:
    """Write summary.json, with the accuracies of the set, of random real images and of the experts. The run is then finished."""
    baseline = _evaluate_random_images(run, state, stop)
    soft_baseline = (
        _evaluate_random_images(run, state, stop, soft=True) if has_soft_baseline(run.options, run.network) else None
    )
    draw_curves(run, float(baseline["accuracy_mean"]))
    records = {names: lines for kind, names in SET_NAMES.items() if (lines := run.records(kind))}
    last = [run.experts.metadata(expert).accuracy[-1] for expert in range(len(run.experts))]
    final = Accuracy(tuple(value for value in last if not math.isnan(value)))  # of those that were measured
    name_of_experts, experts_in_words = "experts", "experts on all the data"
    if describe_other_data(run.experts.metadata(0).identity, run.real.identity):
        # their accuracy is that on the test images of their own data
        name_of_experts, experts_in_words = "experts_on_their_own_data", "experts on their own data"
    results = ", ".join(f"{names.words} {_format_result(lines[-1])}" for names, lines in records.items())
    text = (
        f"{results}, random real images {_format_result(baseline)}"
        + (f", with labels of the experts {_format_result(soft_baseline)}" if soft_baseline else "")
        + (f", {experts_in_words} {100 * final.mean:.2f} % ± {100 * final.std:.2f}" if final.values else "")
    )
    lr = {"lr": run.options.evaluation_protocol().initial_lr(REAL_IMAGES_LR)}
    accuracies = {
        "random_real_images": accuracy_record(baseline) | lr,
        **({"random_real_images_labelled_by_experts": accuracy_record(soft_baseline) | lr} if soft_baseline else {}),
        **({name_of_experts: {"mean": final.mean, "std": final.std, "n": len(final.values)}} if final.values else {}),
        **{names.best_name: best_accuracy(lines) for names, lines in records.items()},
    }
    write_summary(
        run, state, state.mean_lr, text=text, evaluations={names.name: lines[-1] for names, lines in records.items()},
        accuracies=accuracies, others=_own_fields(run, state),
    )  # fmt: skip


def _own_fields(run: DistillRun, state: State) -> dict[str, Any]:
    """Return the fields of the summary that only a distillation has, those of its experts included."""
    options, first = run.options, run.experts.metadata(0)
    return {
        "skipped_iterations": state.skipped,
        "iterations_repeated_in_tf32": state.repeated,
        "iterations_above_threshold": state.above_threshold,
        "learning_rate_kept": state.lr_kept,
        "scores_digest": state.scores_digest or None,
        "code_digest": state.code_digest or None,
        "learning_rate_per_step": state.lr.tolist() if options.lr_per_step else None,
        "gradient": {
            "kind": DESCRIPTIONS[options.gradient],
            "cosines_to_exact": [record["cosine"] for record in run.records("gradient")],
        },
        "experts": {
            "folder": str(run.experts.folder),
            "number": len(run.experts),
            "hyperparameters": first.hyperparameters,
            "digest": hashlib.sha256(" ".join(state.digests).encode()).hexdigest(),
            "data": first.identity.record(),
        },
    }


def _evaluate_random_images(run: DistillRun, state: State, stop: StopRequest, *, soft: bool = False) -> Record:
    """Evaluate as many random real images as there are distilled ones, drawn anew for each network; return the record.

    With `soft` their labels are the mean predictions of the matched experts after their last epoch. An evaluation by an earlier process
    is not repeated.
    """
    kind, title = ("soft_baseline", "labelled by experts") if soft else ("baseline", "random real images")
    if record := run.metrics.find(kind):
        return record

    def random_images(generator: torch.Generator) -> Images:
        images = random_subset(run.real, run.options.ipc, generator)
        if not soft:
            return images
        experts = experts_at(run.experts, None, images.pixels.device, stop)
        return dataclasses.replace(images, labels=mean_teacher_labels(run.network, experts, images.pixels))

    network, *_ = run.evaluated.values()
    accuracy = evaluate_network(run, network, random_images, REAL_IMAGES_LR, stop, name=title)
    run.metrics.write(kind, state.iteration, **accuracy_fields({"": accuracy}))
    return run.metrics.records[-1]


def _format_result(record: Record) -> str:
    return format_accuracy(record) + (" (best epoch)" if record.get("best_epoch") else "")
