"""Compare whole iterations with those that the public codes of SelMatch, FreD and MCT computed (public_code/README.md)."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtt_fast.compress import compress
from mtt_fast.distill.frequencies import most_varying_frequencies, with_frequencies
from mtt_fast.distill.gradients import finish_gradients, gradients_to_apply, iteration_of, start_gradients
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_steps
from mtt_fast.distill.updates import apply_gradients
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.storage.checkpoint import State
from mtt_fast.testing import assert_close
from tests.distill.public_cases import CASES, IPC, experts, segment

OPTIONS: dict[str, dict[str, Any]] = {
    "selmatch": {"distilled_share": 0.5, "lr_img": 20.0, "lr_lr": 1e-3},
    "fred": {"msz_per_channel": 16, "lr_img": 600.0, "lr_lr": 5e-4},
    # half of the rate that the code was run with, which halves the gradient (docs/migrating.md)
    "mct": {"gradient": "truncated", "lr_img": 40.0 / 2, "lr_lr": 1e-3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_iterations_are_those_of_the_public_code(name: str, tmp_path: Path) -> None:
    case = load_file(CASES / f"{name}.safetensors")
    options = DistillOptions(ipc=IPC, syn_steps=6, batch_syn=5, **OPTIONS[name])
    network = network_by_name("ConvNetD1W4BN" if name == "selmatch" else "ConvNetD1W4", (3, 8, 8), 3)
    store = experts(case, tmp_path / "whole")
    if name == "mct":
        store = compress(store.folder, tmp_path / "few", 4)
    first, kept = case["images"].double(), None
    if options.msz_per_channel is not None:
        kept = most_varying_frequencies(first, IPC, options.msz_per_channel)
        assert torch.equal(kept, case["kept"])
        first = with_frequencies(first, kept)
    rate = torch.tensor(0.05, dtype=torch.float64)
    state = State(
        0, 1, first.clone(), torch.arange(3).repeat_interleave(IPC), rate, torch.zeros_like(first),
        torch.zeros_like(rate), frequencies=kept,
    )  # fmt: skip
    plan = plan_steps(options, network, first.shape, torch.device("cpu"), "fp32")
    plan = dataclasses.replace(plan, work=dataclasses.replace(plan.work, dtype=torch.float64))
    run: Any = SimpleNamespace(options=options, cam=None)
    # waypoints are float32, in which the experts are read
    exact = 1e-6 if name == "mct" else 1e-10
    for number in range(3):
        segments = [segment(case, number, store)]
        pending = start_gradients(state, segments, plan, partial(iteration_of, options, network))
        loss, gradients, *_ = finish_gradients(state, pending)
        apply_gradients(options, state, segments, loss, gradients_to_apply(run, state, gradients))
        assert loss == pytest.approx(case[f"loss_{number}"].item(), rel=exact)
        assert state.lr.item() == pytest.approx(case[f"lr_{number}"].item(), rel=exact)
    assert_close("change of the images", state.images - first, case["images_2"] - first, exact)


@pytest.mark.parametrize("count", [2, 4])
def test_compressed_experts_are_those_of_mcts_code(count: int, tmp_path: Path) -> None:
    case = load_file(CASES / "mct.safetensors")
    store = compress(experts(case, tmp_path).folder, tmp_path / "few", count)
    points = torch.stack([store.read(0, place) for place in case["places"].tolist()])
    torch.testing.assert_close(points, case[f"at_places_{count}"], rtol=1e-6, atol=1e-6)
