"""What the images are worth: evaluations on fresh networks, pictures, and the summary at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from mtt_fast.arithmetic import describe_arithmetic
from mtt_fast.distillation.gradients import DESCRIPTIONS
from mtt_fast.distillation.initial import initial_state
from mtt_fast.distillation.job import Job
from mtt_fast.evaluate import REAL_IMAGES_LR, Accuracy, as_training_images, evaluate, random_subset
from mtt_fast.files import write_json
from mtt_fast.interrupts import StopRequest
from mtt_fast.pictures import save_curves, save_grid, save_snapshot
from mtt_fast.provenance import device_name, peak_memory_bytes, versions
from mtt_fast.recipes import recipe_about
from mtt_fast.run_folder import HISTORY, SUMMARY, State
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.whitening import Whitening

log = logging.getLogger(__name__)


def _distilled(job: Job, state: State) -> SyntheticDataset:
    data, transform = job.real.data, job.real.transform
    return SyntheticDataset(
        state.images.detach().clone(),
        state.labels,
        state.lr.mean(),
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        whitening=transform if isinstance(transform, Whitening) else None,
        recipe=dataclasses.asdict(job.options) | {"iterations": state.iteration},
        versions=versions(),
        lr_per_step=state.lr if job.options.lr_per_step else None,
    )


def assess(job: Job, state: State, stop: StopRequest) -> None:
    """Test fresh networks on the images as they are now, and write images and pictures."""
    began = time.monotonic()
    options, synthetic = job.options, _distilled(job, state)
    images = as_training_images(synthetic, state.lr.device)
    result = evaluate(
        job.network,
        lambda _: images,
        job.real.test,
        state.mean_lr,
        options.protocol(),
        networks=options.num_eval,
        seed=options.seed,
        place=(state.iteration,),
        stop=stop,
        precision=job.precision,
        at_once=options.networks_at_once,
        memory_budget=options.memory_budget,
    )
    state.seconds_evaluation += time.monotonic() - began
    log.info("iteration %d: %s", state.iteration, result)
    best = max(
        (record["accuracy_mean"] for record in job.metrics.records if record["kind"] == "evaluation"), default=-1.0
    )
    if result.mean > best:
        synthetic.save(job.folder / "best.safetensors")
    synthetic.save(job.folder / "synthetic.safetensors")
    job.metrics.write(
        "evaluation", state.iteration, accuracy_mean=result.mean, accuracy_std=result.std, networks=len(result.values)
    )
    _draw(job, state, synthetic)


def _draw(job: Job, state: State, synthetic: SyntheticDataset) -> None:
    """Write images.png (what the run began with, and the images as they are now), their snapshot, and curves.png."""
    options, metrics = job.options, job.metrics
    began = dataclasses.replace(synthetic, images=initial_state(options, job.real, state.experts).images)
    panels = []
    for iteration, pictures in {0: began.pictures(), state.iteration: synthetic.pictures()}.items():
        title = f"{options.pix_init} images" if iteration == 0 else f"distilled, {iteration} iterations"
        record = metrics.find("evaluation", iteration)
        accuracy = f": networks trained on them reach {_percent(record)}" if record else ""
        panels.append((f"{job.real.data.name}, {options.ipc} a class, {title}{accuracy}", pictures))
    save_grid(job.folder / "images.png", panels, state.labels, job.real.data.class_names)
    save_snapshot(job.folder / HISTORY / f"iteration_{state.iteration:06d}.png", synthetic.pictures(), state.labels)
    save_curves(job.folder / "curves.png", metrics.records)


def summarise(job: Job, state: State, command: str, stop: StopRequest) -> None:
    """Compare with random real images and the experts, and write summary.json: the run is finished."""
    options, metrics = job.options, job.metrics
    baseline = metrics.find("baseline") or _evaluate_baseline(job, state, stop)
    evaluations = [record for record in metrics.records if record["kind"] == "evaluation"]
    last, best = evaluations[-1], max(evaluations, key=lambda record: float(record["accuracy_mean"]))
    final = Accuracy(tuple(job.experts.metadata(expert).accuracy[-1] for expert in range(len(job.experts))))
    text = (
        f"distilled {_percent(last)}, random real images {_percent(baseline)}, "
        f"experts on all the data {100 * final.mean:.2f} % ± {100 * final.std:.2f}"
    )
    device = state.lr.device
    save_curves(job.folder / "curves.png", metrics.records, float(baseline["accuracy_mean"]))
    write_json(
        job.folder / SUMMARY,
        {
            "text": text,
            "method": recipe_about(options.recipe)["method"] if options.recipe else "MTT",
            "accuracy": {
                "distilled": _accuracy_record(last),
                "random_real_images": _accuracy_record(baseline) | {"lr": REAL_IMAGES_LR},
                "experts": {"mean": final.mean, "std": final.std, "n": len(final.values)},
                "best_evaluation_chosen_on_the_test_images": _accuracy_record(best) | {"iteration": best["iteration"]},
            },
            "iterations": state.iteration,
            "skipped_iterations": state.skipped,
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
            "arithmetic": describe_arithmetic(device, job.network, options.precision),
            "versions": versions(),
            "command": command,
            "options": dataclasses.asdict(options),
        },
    )
    log.info("%s: %s", job.folder, text)


def _evaluate_baseline(job: Job, state: State, stop: StopRequest) -> dict[str, Any]:
    """Measure random real images, as many as the synthetic ones and drawn anew for each network."""
    began = time.monotonic()
    options, real = job.options, job.real
    result = evaluate(
        job.network,
        lambda generator: random_subset(real.train, real.data.num_classes, options.ipc, generator),
        real.test,
        REAL_IMAGES_LR,
        options.protocol(),
        networks=options.num_eval,
        seed=options.seed,
        name="random real images",
        stop=stop,
        precision=job.precision,
        at_once=options.networks_at_once,
        memory_budget=options.memory_budget,
    )
    state.seconds_evaluation += time.monotonic() - began
    job.metrics.write(
        "baseline", state.iteration, accuracy_mean=result.mean, accuracy_std=result.std, networks=len(result.values)
    )
    return job.metrics.records[-1]


def _accuracy_record(record: dict[str, Any]) -> dict[str, Any]:
    return {"mean": record["accuracy_mean"], "std": record["accuracy_std"], "n": record["networks"]}


def _percent(record: dict[str, Any]) -> str:
    return f"{100 * record['accuracy_mean']:.2f} % ± {100 * record['accuracy_std']:.2f}"
