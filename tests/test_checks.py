"""Test that tensors and generators of other kinds are refused in one line, wherever they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtt_fast import ConvNet, GraphedMatchingLoss, InputError, KorniaAugment, SiameseAugment, unroll
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.checks import check_ordinary
from mtt_fast.networks.by_name import network_by_name

NETWORK = ConvNet(in_channels=1, num_classes=2, image_size=8, width=4, depth=1)
START, IMAGES, LABELS, BATCHES = (
    torch.zeros(NETWORK.num_parameters),
    torch.zeros(2, 1, 8, 8),
    torch.arange(2),
    torch.arange(2)[None],
)
FLIP = SiameseAugment("flip")


class Kornia(nn.Module):
    """A module with the method that `KorniaAugment` asks for."""

    def forward_parameters(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape[0])


USES: dict[str, Callable[[Any], object]] = {
    "ConvNet.init": NETWORK.init,
    "init by name": network_by_name("MLP", (1, 8, 8), 2).init,
    "SiameseAugment.draw": lambda generator: FLIP.draw(IMAGES, generator),
    "SiameseAugment.draw_parameters": lambda generator: FLIP.draw_parameters([IMAGES], generator),
    "KorniaAugment.draw": lambda generator: KorniaAugment(Kornia()).draw(IMAGES, generator),
    "CanvasCrops.draw": lambda generator: Canvas(2).crops(None).draw(IMAGES, generator),
    "unroll": lambda generator: unroll(NETWORK, START, IMAGES, LABELS, 0.1, BATCHES, FLIP, generator=generator),
    "GraphedMatchingLoss": lambda generator: GraphedMatchingLoss(NETWORK, augment=FLIP)(
        START, START + 1, IMAGES, LABELS, 0.1, BATCHES, generator=generator
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_no_generator_is_refused(use: Callable[[Any], object]) -> None:
    use(torch.Generator())
    for other in (3, np.random.default_rng(0)):
        with pytest.raises(
            InputError, match=f"`generator`: expected a torch.Generator, found {type(other).__name__}; "
        ):
            use(other)


ODD = {
    "a tensor of layout torch.sparse_coo; use .to_dense()": IMAGES.to_sparse(),
    "a nested tensor; use torch.stack": torch.nested.nested_tensor([torch.zeros(1, 8, 8)] * 2, layout=torch.jagged),
    "a tensor of float8_e4m3fn; use .float()": IMAGES.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize(("found", "images"), ODD.items(), ids=["sparse", "nested", "float8"])
def test_a_tensor_that_torch_cannot_compute_with_is_refused(found: str, images: Tensor) -> None:
    draws = FLIP.draw(IMAGES)
    uses: dict[str, Callable[[], object]] = {
        "x": lambda: check_ordinary("x", images),
        "`images`": lambda: unroll(NETWORK, START, images, LABELS, 0.1, BATCHES),
        "SiameseAugment images": lambda: FLIP(images, draws),
    }
    for name, use in uses.items():
        with pytest.raises(InputError) as raised:
            use()
        assert str(raised.value) == f"{name}: expected an ordinary tensor, found {found}"
