"""Compare whole iterations with those that the public codes of DATM and PAD computed (public_code/README.md)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast.distill.gradients import cached_iterations, finish_gradients, iteration_of, start_gradients
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_steps
from mtt_fast.distill.segments import Segment, start_epochs
from mtt_fast.distill.updates import apply_gradients
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.storage.checkpoint import State
from mtt_fast.testing import assert_close

RECORDED = load_file(Path(__file__).parent / "public_code" / "datm_pad.safetensors")
SETTINGS: dict[str, Any] = {
    "no_aug": True, "lr_teacher": 0.05, "lr_img": 20.0, "lr_lr": 1e-3, "lr_y": 3.0, "mom_y": 0.9, "syn_steps": 4, "batch_syn": 4,
    "expert_epochs": 2, "current_max_start_epoch": 1, "max_start_epoch": 4, "expansion_end_epoch": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "datm": {},
    "tesla": {"gradient": "truncated"},
    "pad": {"loss_ratio": 0.5},
    "pad_depth": {"depth_ratio": 0.25},
}


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_those_of_the_public_code(case: str) -> None:
    expected = {name.partition("/")[2]: value for name, value in RECORDED.items() if name.startswith(f"{case}/")}
    options = DistillOptions(**SETTINGS, **CASES[case], threshold=float(expected["threshold"]))
    images, labels = RECORDED["images"].double(), RECORDED["labels"].double()
    lr = torch.tensor(options.lr_teacher, dtype=torch.float64)
    state = State(0, 1, images, labels, lr, torch.zeros_like(images), torch.zeros_like(lr), torch.zeros_like(labels))
    first = {name: getattr(state, name).clone() for name in ("images", "labels", "lr")}
    network = network_by_name("ConvNetD1W4", (1, 8, 8), 10)
    plan = plan_steps(options, network, images.shape, torch.device("cpu"), "fp32")
    iteration_for = cached_iterations(partial(iteration_of, options, network))
    kinds = []
    for number, epoch in enumerate(RECORDED["starts"].tolist()):
        assert start_epochs(options, number) == range(int(RECORDED["uppers"][number]))
        start, target = RECORDED["expert"][epoch].double(), RECORDED["expert"][epoch + 2].double()
        segment = Segment(0, epoch, partial(tuple[Tensor, ...], (start, target, RECORDED["indices"][number])))
        loss, gradients, plan, _ = finish_gradients(state, start_gradients(state, [segment], plan, iteration_for))
        assert loss == pytest.approx(float(expected["losses"][number]), rel=1e-10)
        kind, _ = apply_gradients(options, state, [segment], loss, gradients)
        kinds.append(kind)
    assert kinds == ["step", "step", "step", "above_threshold", "step"]
    for name, value in first.items():
        assert_close(name, getattr(state, name) - value, expected[name] - value, 1e-9)
    for name in ("images_velocity", "labels_velocity", "lr_velocity"):
        assert_close(name, getattr(state, name), expected[name], 1e-9)
