"""Check how an iteration without a finite gradient ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.updates import apply_gradients, check_converges
from mtt_fast.errors import Diverged
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.metrics import MetricsLog


def apply_all(folder: Path, finite: Sequence[bool]) -> State:
    """Return the state after iterations of which each has finite gradients or none."""
    images, lr = torch.zeros(2, 1, 4, 4), torch.tensor(0.5)
    state = State(0, 1, images, torch.arange(2), lr, torch.zeros_like(images), torch.zeros_like(lr))
    run: Any = SimpleNamespace(options=DistillOptions(), metrics=MetricsLog(folder, 0), folder=folder)
    try:
        for is_finite in finite:
            gradients = [torch.ones_like(images), torch.zeros(())] if is_finite else None
            kind, values = apply_gradients(run.options, state, [], 1.0, gradients)
            run.metrics.write(kind, state.iteration, **values)
            check_converges(run, state)
    finally:
        run.metrics.close()
    return state


def test_a_run_is_given_up_after_25_iterations_in_a_row_without_a_finite_gradient(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"25 iterations in a row diverged at a student's learning rate of 0\.5"):
        apply_all(tmp_path, [False] * 25)


def test_a_run_goes_on_where_an_iteration_in_between_has_a_finite_gradient(tmp_path: Path) -> None:
    state = apply_all(tmp_path, [False] * 24 + [True] + [False] * 24)
    assert (state.iteration, state.skipped) == (49, 48)
    assert state.images.unique().tolist() == [-DistillOptions().lr_img]
