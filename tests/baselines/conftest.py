"""Offer the digits as real images."""

from __future__ import annotations

import pytest
import torch

from mtt_fast.data import load
from mtt_fast.training.images import RealImages, real_images


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    data = load("digits", data_path=tmp_path_factory.mktemp("data"))
    return real_images(data, torch.device("cpu"), zca=False)
