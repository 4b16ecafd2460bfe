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

from mtt_fast.arithmetic import describe_arithmetic
from mtt_fast.baselines.method import Method
from mtt_fast.convnet import ConvNet
from mtt_fast.evaluate import Accuracy, as_training_images, evaluate
from mtt_fast.files import write_json
from mtt_fast.interrupts import StopRequest
from mtt_fast.kernels import Precision
from mtt_fast.options import RealImages
from mtt_fast.pictures import save_grid
from mtt_fast.provenance import device_name, peak_memory_bytes, versions
from mtt_fast.run_folder import SUMMARY
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.whitening import Whitening

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What stays the same while a set is made."""

    program: str  # how the method is run
    method: Method
    options: Any  # of the method's kind
    folder: Path
    real: RealImages
    network: ConvNet
    precision: Precision
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
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        whitening=transform if isinstance(transform, Whitening) else None,
        label_kind="probabilities" if labels.is_floating_point() else "indices",
        recipe=dataclasses.asdict(job.options) | {"method": job.method.title, "iterations": iterations},
        versions=versions(),
    )


def accuracy_of(job: Job, made: SyntheticDataset, iteration: int, stop: StopRequest) -> Accuracy:
    """Test fresh networks that were trained on the set by the protocol of distilled sets."""
    images = as_training_images(made, job.real.test.labels.device)
    return evaluate(
        job.network, lambda _: images, job.real.test, float(made.lr), job.options.protocol(),
        networks=job.options.num_eval, seed=job.options.seed, place=(iteration,), stop=stop, precision=job.precision,
        at_once=job.options.networks_at_once,
    )  # fmt: skip


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
    accuracy: Mapping[str, dict[str, Any]],
    iterations: int,
    seconds: float,
    seconds_evaluation: float,
) -> None:
    """Write summary.json, with the fields that a distillation's has: the run is finished.

    `accuracy` has a record (mean, std, n) for "distilled", the set by the protocol of distilled sets, and others.
    """
    device = job.real.test.labels.device
    text = f"{job.method.title} {percent(accuracy['distilled'])}"
    write_json(
        job.folder / SUMMARY,
        {
            "text": text,
            "method": job.method.title,
            "accuracy": dict(accuracy),
            "iterations": iterations,
            "learning_rate": float(made.lr),
            "seconds": {"iterations": seconds, "evaluations": seconds_evaluation},
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": device_name(device),
            "arithmetic": describe_arithmetic(device, job.network, job.options.precision),
            "versions": versions(),
            "command": job.command,
            "options": dataclasses.asdict(job.options),
        },
    )
    log.info("%s: %s", job.folder, text)


def record_of(accuracy: Accuracy) -> dict[str, Any]:
    """Return mean, std and n."""
    return {"mean": accuracy.mean, "std": accuracy.std, "n": len(accuracy.values)}


def percent(record: Mapping[str, Any]) -> str:
    """Return an accuracy's record as text."""
    return f"{100 * record['mean']:.2f} % ± {100 * record['std']:.2f}"
