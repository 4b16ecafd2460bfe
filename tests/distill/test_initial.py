"""Test the images with which a distillation begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.data import load
from mtt_fast.distill.initial import initial_images
from mtt_fast.distill.options import DistillOptions
from mtt_fast.parametrisations.parametrisation import images_at, learned_values
from mtt_fast.training.images import RealImages, real_images


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    folder: Path = tmp_path_factory.mktemp("data")
    return real_images(load("digits", data_path=str(folder), progress=False), torch.device("cpu"), zca=False)


@pytest.mark.parametrize("pix_init", ["noise", "real"])
def test_the_seed_decides_the_first_images(real: RealImages, pix_init: Any) -> None:
    def first(seed: int) -> Tensor:
        options, unasked = DistillOptions(dataset="digits", ipc=2, pix_init=pix_init, seed=seed), Any
        initial = initial_images(options, real, unasked, unasked)  # type: ignore[arg-type]
        assert (initial.num_misclassified, initial.frequencies, initial.parametrisation) == (0, None, None)
        assert initial.images.labels.tolist() == [label for label in range(10) for _ in range(2)]
        return initial.images.pixels

    torch.manual_seed(0)
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_the_first_images_are_drawn_as_they_are_evaluated(real: RealImages) -> None:
    setting = "num_saet=4 dim_saet=6 num_head=2 decoder_depth=1 top_k=3 l1_weight=0"  # of SPEED, which evaluates others
    options = DistillOptions(dataset="digits", parametrisation="speed", parametrisation_options=setting)
    unasked: Any = None
    initial = initial_images(options, real, unasked, unasked)
    module, matched = initial.parametrisation, initial.images.pixels
    assert module is not None
    evaluated = images_at(module, learned_values(module), torch.empty_like(matched), evaluated=True)
    assert torch.equal(initial.pictures, evaluated)
    assert not torch.equal(matched, evaluated)
