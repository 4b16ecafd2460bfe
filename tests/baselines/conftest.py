"""Offer the digits as real images, and a folder that the runs of a file share; leave the curves out of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtt_fast.data import load
from mtt_fast.training.images import RealImages, real_images


@pytest.fixture(autouse=True, scope="module")
def _without_curves(no_curves: None) -> None:
    pass


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    data = load("digits", data_path=tmp_path_factory.mktemp("data"))
    return real_images(data, torch.device("cpu"), zca=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for the packed data and the expert, which is trained once; own trainings are short meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtt_fast.baselines.truncated_bptt._OWN_STEPS", 10)  # a thousand take seconds
        yield tmp_path_factory.mktemp("shared")
