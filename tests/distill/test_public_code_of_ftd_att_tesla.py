"""Compare whole iterations with those that the public codes of FTD, ATT and TESLA computed (public_code/README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.augmentation.operations import Draws, parameters_of_steps
from mtt_fast.distill.gradients import finish_gradients, iteration_of, start_gradients
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_steps
from mtt_fast.distill.segments import Segment
from mtt_fast.distill.updates import apply_gradients
from mtt_fast.storage.checkpoint import State
from mtt_fast.testing import assert_close

CASES = load_file(Path(__file__).parent / "public_code" / "ftd_att_tesla.safetensors")
NET = ConvNet(num_classes=3, image_size=8, width=4, depth=2)
NUMBERS = {"color": 3, "crop": 2, "cutout": 2, "flip": 1, "scale": 2, "rotate": 1}
"""Random numbers that each operation draws for an image, in the order of the recorded operations."""

COMMON: dict[str, Any] = {"ipc": 2, "batch_syn": 4, "expert_epochs": 2, "lr_img": 20, "lr_lr": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "ftd": {"syn_steps": 5, "lr_teacher": 0.05, "ema_decay": 0.9},
    "att": {"syn_steps": 12, "lr_teacher": 0.06, "ema_decay": 0.999, "match_step": "nearest"},
    # half the rate, since TESLA's code computes half of its gradient of the images
    "tesla": {"syn_steps": 4, "lr_teacher": 0.05, "gradient": "truncated", "teacher_label": True, "lr_img": 10},
}


def segments(case: dict[str, Tensor], options: DistillOptions) -> Iterator[Segment]:
    """Yield the segments of the iterations of a case, with the random numbers that the public code was given."""
    rows, lengths = CASES["rows"].double(), case["lengths"].tolist()
    operations = [list(NUMBERS)[place] for place in case["operations"].tolist()]
    counts = [NUMBERS[operation] * length for operation, length in zip(operations, lengths, strict=True)]
    draws = [
        Draws(operation, numbers.split(length))
        for operation, numbers, length in zip(operations, case["numbers"].split(counts), lengths, strict=True)
    ]
    batches = case["batches"].split(lengths)
    for number, epoch in enumerate(CASES["starts"].tolist()):
        steps = slice(number * options.syn_steps, (number + 1) * options.syn_steps)
        tensors = (
            rows[epoch], rows[epoch + options.expert_epochs], torch.cat(batches[steps]),
            parameters_of_steps(draws[steps], CASES["images"].shape),
        )  # fmt: skip
        yield Segment(0, epoch, lambda tensors=tensors: tensors)  # type: ignore[misc]


@pytest.mark.parametrize("name", OPTIONS)
def test_iterations_are_those_of_the_public_code(name: str) -> None:
    case = {key.removeprefix(f"{name}."): value for key, value in CASES.items() if key.startswith(f"{name}.")}
    options = DistillOptions(**COMMON | OPTIONS[name])
    images, lr = CASES["images"].double(), torch.tensor(options.lr_teacher, dtype=torch.float64)
    state = State(0, 1, images.clone(), CASES["labels"], lr, torch.zeros_like(images), torch.zeros_like(lr))
    if options.ema_decay is not None:
        state.ema = images.clone()
    plan = plan_steps(options, NET, images.shape, images.device, "fp32")
    for segment, loss, rate in zip(segments(case, options), case["losses"], case["lrs"], strict=True):
        finished = finish_gradients(state, start_gradients(state, [segment], plan, partial(iteration_of, options, NET)))
        kind, _ = apply_gradients(options, state, [segment], finished.loss, finished.gradients)
        assert kind == "step"
        assert finished.loss == pytest.approx(float(loss), rel=1e-12)
        assert_close("learning rate", state.lr, rate, 1e-12)
    case["images_velocity"] *= COMMON["lr_img"] / options.lr_img
    for result in ("images", "images_velocity", "lr_velocity", *(["ema"] if "ema" in case else [])):
        assert_close(result, getattr(state, result), case[result], 1e-12)
