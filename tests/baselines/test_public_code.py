"""Test that the methods compute what their public codes do: recorded results of these codes (public_code/README.md), in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.baselines.atbptt import AtBpttOptions, atbptt
from mtt_fast.baselines.dd import DdOptions, dd
from mtt_fast.baselines.dm import DmOptions, dm
from mtt_fast.baselines.gradient_matching import DcOptions, DsaOptions, dc, dsa
from mtt_fast.baselines.ld import LdOptions, ld
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.ratbptt import RatBpttOptions, ratbptt
from mtt_fast.data import Split
from mtt_fast.data.image_data import ImageData
from mtt_fast.data.transform import Normalisation
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.testing import assert_close
from mtt_fast.training.images import Images, RealImages
from tests.baselines.network import F64

RECORDS = Path(__file__).parent / "public_code" / "iterations.safetensors"
CLASSES, SIZE = 4, 8


class DoubleConvNet(ConvNet):
    """ConvNet that starts in float64."""

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        return super().init(generator).double()


NET = DoubleConvNet(3, CLASSES, SIZE, 4, 2)


class Case(NamedTuple):
    """A few iterations of a method, and the bound of its relative error."""

    method: Callable[[Any, RealImages, Any], LearnedSet]
    options: Any
    iterations: int
    tolerance: float


_WINDOWS: dict[str, Any] = {"lr_img": 0.02, "batch_per_class": 2, "totwindow": 10, "inner_lr": 0.01, "pix_init": "real"}
_REAL: dict[str, Any] = {"dataset": "digits", "batch_real": 6, "ipc": 2}

# The differentiable Adam of higher, which RaT-BPTT and AT-BPTT use, adds ε before it corrects the second moment.
CASES = {
    "dc": Case(dc, DcOptions(**_REAL, outer_loop=2, inner_loop=2, batch_train=6, lr_net=0.1, pix_init="real"), 2, 1e-6),
    "dsa": Case(dsa, DsaOptions(**_REAL, outer_loop=3, inner_loop=2, batch_train=6, lr_net=0.1), 2, 1e-6),
    "dm": Case(dm, DmOptions(**_REAL), 3, 1e-6),
    "dd": Case(dd, DdOptions(**_REAL, n_nets=2, train_nets_type="known_init", pix_init="real"), 3, 1e-6),
    "ld": Case(ld, LdOptions(**_REAL, inner_batch_size=5, inner_lr=0.1), 4, 1e-6),
    "ratbptt": Case(ratbptt, RatBpttOptions(**_REAL, **_WINDOWS, window=3, train_y=True), 5, 1e-4),
    "atbptt": Case(atbptt, AtBpttOptions(**_REAL, **_WINDOWS, window=4, d=2), 5, 1e-4),
}


def made_up_images() -> RealImages:
    """Return 24 images in float64, which no random numbers decide."""
    labels = torch.arange(24) % CLASSES
    pixels = torch.arange(24 * 3 * SIZE**2, dtype=F64).mul(math.sqrt(2)).sin().view(24, 3, SIZE, SIZE)
    pixels = pixels + labels[:, None, None, None].double().cos()
    zero, split = (0.0,) * 3, Split(torch.zeros(24, 3, SIZE, SIZE, dtype=torch.uint8), labels)
    data = ImageData("made up", tuple("abcd"), zero, (1.0,) * 3, split, split, "", None)
    return RealImages(data, Normalisation(zero, (1.0,) * 3), *2 * [Images(pixels, labels)])


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Make float64 the default, so that labels and learning rates are in it, too."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_iterations_are_those_of_the_public_code(name: str) -> None:
    case, (records, _) = CASES[name], load_tensors(RECORDS)
    learned = case.method(case.options, made_up_images(), NET)
    start, soft = learned.images.clone(), learned.labels.is_floating_point()
    for iteration in range(case.iterations):
        learned.step(iteration)
    if name != "ld":
        assert_close("images", learned.images - start, records[f"{name}.moved"].double(), case.tolerance)
    if soft:
        assert_close("labels", learned.labels.double(), records[f"{name}.labels"].double(), case.tolerance)
    if name == "dd":
        assert_close("rates", learned.carried["raw_rates"].double(), records["dd.rates"].double(), 1e-6)
