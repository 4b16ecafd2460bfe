"""What a set is worth, and the files that say so: the set, its pictures, the summary."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.baselines.method import Method
from mtt_fast.commands.accuracies import accuracy_by_network, accuracy_record, measured, percent
from mtt_fast.commands.plots import save_grid
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening
from mtt_fast.engine.student_choice import describe_numerics, precision_on
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.runtime.provenance import device_name, peak_memory_bytes, versions
from mtt_fast.storage.records import write_record
from mtt_fast.storage.run_folder import SUMMARY
from mtt_fast.training.images import RealImages, as_training_images
from mtt_fast.training.protocols import evaluate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What stays the same while a set is made."""

    program: str  # how the method is run
    method: Method
    options: Any  # of the method's kind
    folder: Path
    real: RealImages
    network: Trainable
    evaluated: dict[str, Trainable]
    """the networks of an evaluation by name; the first decides which set is best"""
    command: str

    @property
    def classes(self) -> Tensor:
        """The class of each image, (n,): sets are class-major."""
        return torch.arange(self.real.data.num_classes).repeat_interleave(self.options.ipc)


def as_set(job: Job, images: Tensor, labels: Tensor, lr: Tensor, iterations: int) -> SyntheticDataset:
    """Return the set as it is saved; the labels are class indices (n,) or probabilities (n, classes)."""
    data, transform = job.real.data, job.real.transform
    return SyntheticDataset(
        images.detach().clone(),
        labels.detach().clone(),
        lr.detach().to(images.device),
        dataset=data.name,
        fingerprint=data.fingerprint,
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        whitening=transform if isinstance(transform, Whitening) else None,
        label_kind="probabilities" if labels.is_floating_point() else "indices",
        recipe=dataclasses.asdict(job.options) | {"method": job.method.title, "iterations": iterations},
        versions=versions(),
    )


def evaluated(
    job: Job, made: SyntheticDataset, iteration: int, stop: StopRequest, words: str
) -> dict[str, float | int]:
    """Train fresh networks on the set by the protocol of distilled sets; return what they reach as a line of metrics.jsonl.

    They are those that --eval_mode names; `words` say in the log what is evaluated.
    """
    options, test = job.options, job.real.test
    images = as_training_images(made, test.labels.device)
    results = {
        name: evaluate(
            network, lambda _: images, test, float(made.lr), options.evaluation_protocol(),
            networks=options.num_eval, seed=options.seed, place=(iteration,), name=name, stop=stop,
            precision=precision_on(test.labels.device, network, options.precision), at_once=options.networks_at_once,
        )
        for name, network in job.evaluated.items()
    }  # fmt: skip
    for name, result in results.items():
        log.info("%s, %s: %s", words, name, result)
    return measured(results)


def save_pictures(
    job: Job, panels: Mapping[str, SyntheticDataset], accuracies: Sequence[dict[str, Any] | None]
) -> None:
    """Write images.png: a panel for each set in `panels`, by its title, with its evaluation's record if there is one."""
    drawn = []
    for (title, made), record in zip(panels.items(), accuracies, strict=True):
        reached = f": networks trained on them reach {percent(record)}" if record else ""
        drawn.append((f"{job.real.data.name}, {job.options.ipc} a class, {title}{reached}", made.pictures()))
    save_grid(job.folder / "images.png", drawn, job.classes, job.real.data.class_names)


def write_summary(
    job: Job,
    made: SyntheticDataset,
    evaluation: dict[str, Any],
    others: Mapping[str, dict[str, Any]],
    iterations: int,
    seconds: Mapping[str, float],
) -> None:
    """Write summary.json, with the fields that a distillation's has: the run is finished.

    `evaluation` is a line of metrics.jsonl, the set's by the protocol of distilled sets; `others` are records of other
    accuracies by their names, and `seconds` are those of "iterations" and of "evaluations".
    """
    device = job.real.test.labels.device
    distilled, (first, *_) = accuracy_record(evaluation), job.evaluated
    text = f"{job.method.title} {percent(evaluation)}"
    write_record(
        job.folder / SUMMARY,
        {
            "text": text,
            "method": job.method.title,
            "accuracy": {"distilled": distilled, **others},
            "accuracy_by_network": {"distilled": accuracy_by_network(evaluation, first)},
            "protocol": job.options.evaluation_protocol().record(),
            "iterations": iterations,
            "learning_rate": float(made.lr),
            "seconds": dict(seconds),
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": device_name(device),
            "arithmetic": describe_numerics(device, job.network, job.options.precision),
            "versions": versions(),
            "command": job.command,
            "data": job.real.identity.record(),
            "options": dataclasses.asdict(job.options),
        },
    )
    log.info("%s: %s", job.folder, text)
