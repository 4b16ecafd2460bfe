"""What the images are worth: evaluations on fresh networks, pictures, and the summary at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import tiled
from mtt_fast.commands.accuracies import accuracy_by_network, accuracy_record, measured, percent
from mtt_fast.commands.evaluated_set import REAL_IMAGES_LR
from mtt_fast.commands.plots import save_curves, save_grid, save_snapshot
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening
from mtt_fast.distill.gradients import DESCRIPTIONS
from mtt_fast.distill.labels import experts_at, mean_teacher_labels
from mtt_fast.distill.run import Run
from mtt_fast.engine.student_choice import describe_numerics, precision_on
from mtt_fast.errors import Diverged
from mtt_fast.networks.protocol import Trainable
from mtt_fast.recipes import recipe_about
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.runtime.provenance import device_name, peak_memory_bytes, versions
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.records import write_record
from mtt_fast.storage.run_folder import BEST, BEST_EMA, EMA, HISTORY, SUMMARY, SYNTHETIC
from mtt_fast.training.images import Images, as_training_images
from mtt_fast.training.protocols import Accuracy, evaluate
from mtt_fast.training.subsets import random_subset

log = logging.getLogger(__name__)

_TILES = 2  # a texture is shown side by side with itself, so that its borders can be judged
_BEGUN_WITH = {
    "real": "real images",
    "noise": "noise",
    "samples_predicted_correctly": "real images that experts classify correctly",
}


class _Tested(NamedTuple):
    """A set that is evaluated, as it is last and as it is best: names in the summary, and files."""

    words: str
    name: str
    best_name: str
    last: str
    best: str


_TESTED = {
    "evaluation": _Tested("distilled", "distilled", "best_evaluation_chosen_on_the_test_images", SYNTHETIC, BEST),
    "ema_evaluation": _Tested(
        "average over the iterations", "ema", "best_ema_evaluation_chosen_on_the_test_images", EMA, BEST_EMA
    ),
}
"""By the kind of its evaluations in metrics.jsonl."""


def _sets(run: Run, state: State) -> dict[str, SyntheticDataset]:
    """Return what there is to evaluate, by the kind of its evaluations."""
    images = {"evaluation": state.images, "ema_evaluation": state.ema}
    return {kind: _distilled(run, state, found) for kind, found in images.items() if found is not None}


def _distilled(run: Run, state: State, images: Tensor) -> SyntheticDataset:
    """Return `images` (n, C, H, W) with the labels and the learning rate that networks are to be trained with.

    With --teacher_label, the labels are the mean of what the experts say after max_start_epoch epochs, the same whichever
    expert was matched last.
    """
    data, transform, options = run.real.data, run.real.transform, run.options
    labels = state.labels.clone()
    if options.teacher_label:
        experts = experts_at(run.experts, state.experts, options.max_start_epoch, images.device)
        labels = mean_teacher_labels(run.network, experts, images)
    return SyntheticDataset(
        images.clone(),
        labels,
        state.lr.mean(),
        dataset=data.name,
        fingerprint=data.fingerprint,
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        whitening=transform if isinstance(transform, Whitening) else None,
        label_kind=options.label_kind,
        recipe=dataclasses.asdict(options) | {"iterations": state.iteration},
        versions=versions(),
        lr_per_step=state.lr if options.lr_per_step else None,
        canvas=options.canvas,
    )


def is_evaluated(run: Run, state: State) -> bool:
    """Return whether all that there is to evaluate was evaluated at this iteration."""
    kinds = ["evaluation"] if state.ema is None else _TESTED
    return all(run.metrics.find(kind, state.iteration) for kind in kinds)


def evaluate_sets(run: Run, state: State, stop: StopRequest) -> None:
    """Test fresh networks on the images as they are now, others on their average, and write sets and pictures.

    Raises `Diverged` where images, labels or rates are no longer finite: no network can learn from them.
    """
    _check_finite(run, state)
    sets = _sets(run, state)
    for kind, synthetic in sets.items():
        if run.metrics.find(kind, state.iteration) is None:
            _measure(run, state, kind, synthetic, stop)
    _draw(run, state, sets["evaluation"])


def _check_finite(run: Run, state: State) -> None:
    for name, values in (("images", state.images), ("labels", state.labels), ("learning rate", state.lr)):
        if not bool(values.isfinite().all()):
            raise Diverged(
                f"{run.folder}: iteration {state.iteration}: the {name} are no longer finite; start again with a smaller --lr_img, "
                "--lr_y or --lr_lr and another --out"
            )


def _measure(run: Run, state: State, kind: str, synthetic: SyntheticDataset, stop: StopRequest) -> None:
    """Test fresh networks on a set, which begin alike whichever set it is, and keep the set."""
    began = time.monotonic()
    images, words = as_training_images(synthetic, state.lr.device), _TESTED[kind].words
    results = {
        name: _evaluate(
            run, network, lambda _: images, state.mean_lr, stop, name=f"{words}, {name}", place=(state.iteration,)
        )
        for name, network in run.evaluated.items()
    }
    state.seconds_evaluation += time.monotonic() - began
    for name, found in results.items():
        log.info("iteration %d: %s, %s %s", state.iteration, words, name, found)
    result, *_ = results.values()
    best = max((record["accuracy_mean"] for record in run.metrics.records if record["kind"] == kind), default=-1.0)
    if result.mean > best:
        synthetic.save(run.folder / _TESTED[kind].best)
    synthetic.save(run.folder / _TESTED[kind].last)
    run.metrics.write(kind, state.iteration, **measured(results))


def _draw(run: Run, state: State, synthetic: SyntheticDataset) -> None:
    """Write images.png (what the run began with, and the images as they are now), their snapshot, and curves.png."""
    options, metrics = run.options, run.metrics
    began = dataclasses.replace(synthetic, images=run.began())
    panels = []
    for iteration, pictures in {0: began.pictures(), state.iteration: synthetic.pictures()}.items():
        title = _BEGUN_WITH[options.pix_init] if iteration == 0 else f"distilled, {iteration} iterations"
        record = metrics.find("evaluation", iteration)
        accuracy = f": networks trained on them reach {percent(record)}" if record else ""
        if synthetic.canvas:
            title, pictures = f"textures, {title}, each tiled {_TILES} by {_TILES}", tiled(pictures, _TILES)
        panels.append((f"{run.real.data.name}, {options.ipc} a class, {title}{accuracy}", pictures))
    save_grid(run.folder / "images.png", panels, synthetic.classes, run.real.data.class_names)
    save_snapshot(
        run.folder / HISTORY / f"iteration_{state.iteration:06d}.png", synthetic.pictures(), synthetic.classes
    )
    save_curves(run.folder / "curves.png", metrics.records)


def summarise(run: Run, state: State, command: str, stop: StopRequest) -> None:
    """Compare with random real images and the experts, and write summary.json: the run is finished."""
    options, metrics = run.options, run.metrics
    baseline = metrics.find("baseline") or _evaluate_baseline(run, state, stop)
    of_kind = {kind: [record for record in metrics.records if record["kind"] == kind] for kind in _TESTED}
    evaluations = {_TESTED[kind]: records for kind, records in of_kind.items() if records}
    final = Accuracy(tuple(run.experts.metadata(expert).accuracy[-1] for expert in range(len(run.experts))))
    results = ", ".join(f"{tested.words} {_labelled(records[-1])}" for tested, records in evaluations.items())
    text = (
        f"{results}, random real images {_labelled(baseline)}, "
        f"experts on all the data {100 * final.mean:.2f} % ± {100 * final.std:.2f}"
    )
    device = state.lr.device
    save_curves(run.folder / "curves.png", metrics.records, float(baseline["accuracy_mean"]))
    write_record(
        run.folder / SUMMARY,
        {
            "text": text,
            "method": recipe_about(options.recipe)["method"] if options.recipe else "MTT",
            "accuracy": {
                **{tested.name: accuracy_record(records[-1]) for tested, records in evaluations.items()},
                "random_real_images": accuracy_record(baseline) | {"lr": REAL_IMAGES_LR},
                "experts": {"mean": final.mean, "std": final.std, "n": len(final.values)},
                **{tested.best_name: _best_record(records) for tested, records in evaluations.items()},
            },
            "accuracy_by_network": {
                tested.name: accuracy_by_network(records[-1], next(iter(run.evaluated)))
                for tested, records in evaluations.items()
            },
            "protocol": options.evaluation_protocol().record(),
            "iterations": state.iteration,
            "skipped_iterations": state.skipped,
            "iterations_above_threshold": state.above_threshold,
            "learning_rate_kept": state.lr_kept,
            "learning_rate": state.mean_lr,
            "learning_rate_per_step": state.lr.tolist() if options.lr_per_step else None,
            "gradient": {
                "kind": DESCRIPTIONS[options.gradient],
                "cosines_to_exact": [record["cosine"] for record in metrics.records if record["kind"] == "gradient"],
            },
            "seconds": {"iterations": state.seconds, "evaluations": state.seconds_evaluation},
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": device_name(device),
            "arithmetic": describe_numerics(device, run.network, options.precision),
            "versions": versions(),
            "command": command,
            "data": run.real.identity.record(),
            "experts": _of_experts(run, state),
            "options": dataclasses.asdict(options),
        },
    )
    log.info("%s: %s", run.folder, text)


def _of_experts(run: Run, state: State) -> dict[str, Any]:
    """Return what is known of the experts that take turns: how many, from where, trained how on which images."""
    first = run.experts.metadata(0)
    return {
        "folder": str(run.experts.folder),
        "number": state.experts,
        "hyperparameters": first.hyperparameters,
        "data": first.identity.record(),
    }


def _evaluate_baseline(run: Run, state: State, stop: StopRequest) -> dict[str, Any]:
    """Measure random real images, as many as the synthetic ones and drawn anew for each network."""
    began = time.monotonic()
    options, real = run.options, run.real
    result = _evaluate(
        run,
        next(iter(run.evaluated.values())),
        lambda generator: random_subset(real.train, real.data.num_classes, options.ipc, generator),
        REAL_IMAGES_LR,
        stop,
        name="random real images",
    )
    state.seconds_evaluation += time.monotonic() - began
    run.metrics.write("baseline", state.iteration, **measured({"": result}))
    return run.metrics.records[-1]


def _best_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    best = max(records, key=lambda record: float(record["accuracy_mean"]))
    return accuracy_record(best) | {"iteration": best["iteration"]}


def _evaluate(
    run: Run,
    network: Trainable,
    train: Callable[[torch.Generator], Images],
    lr: float,
    stop: StopRequest,
    *,
    name: str,
    place: Sequence[int] = (),
) -> Accuracy:
    """`mtt_fast.training.protocols.evaluate` with the job's options."""
    options, test = run.options, run.real.test
    return evaluate(
        network, train, test, lr, options.evaluation_protocol(), networks=options.num_eval, seed=options.seed,
        place=place, name=name, stop=stop,
        precision=precision_on(test.labels.device, network, options.precision),
        at_once=options.networks_at_once, memory_budget=options.memory_budget,
    )  # fmt: skip


def _labelled(record: dict[str, Any]) -> str:
    return percent(record) + (" (best epoch)" if record.get("best_epoch") else "")
