"""Whatever a caller's augmentation does, `unroll` gives the right gradient or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import Augmentation, ConvNet, FlatModule, InputError, SiameseAugment, unroll
from mtt_fast.testing import assert_close
from tests.engine.trial_cases import BATCHES, LABELS, gradient, with_layer


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("entry", ["a tensor", "a tuple"])
@pytest.mark.parametrize("source", ["given", "drawn"])
def test_learned_draws_are_refused_in_every_step(step: int, entry: str, source: str) -> None:
    """Check what would leave the strength of an augmentation without a gradient, where only one step's numbers are learned."""
    net, augment = FlatModule(with_layer(nn.Identity())), SiameseAugment("brightness")
    draw = augment.draw if entry == "a tuple" else lambda images: augment.draw_parameters([images])
    draws: list[Any] = [draw(torch.zeros(len(index), 2, 6, 6)) for index in BATCHES]
    (draws[step].numbers[0] if entry == "a tuple" else draws[step]).requires_grad_()

    def options() -> dict[str, Any]:
        if source == "given":
            return {"augment": augment, "draws": draws}
        drawn = iter(draws)
        return {
            "augment": Augmentation(
                lambda *_: {"of a step": next(drawn)}, lambda images, of_step: augment(images, of_step["of a step"])
            )
        }

    with pytest.raises(InputError, match="`draws`: expected no tensor that requires a gradient"):
        gradient(net, net.init(), **options())
    with torch.no_grad():  # a training of which no gradient is asked for
        unroll(net, net.init(), torch.zeros(6, 2, 6, 6).double(), LABELS, 0.3, BATCHES, **options())


def noisy(images: Tensor, _: Any) -> Tensor:
    return images + torch.randn_like(images)


@pytest.mark.parametrize("network", ["ConvNet", "FlatModule"])
def test_an_augmentation_that_draws_as_it_applies_is_refused(network: str) -> None:
    net: Any = ConvNet(2, 3, 6, 4, 1) if network == "ConvNet" else FlatModule(with_layer(nn.Identity()))
    start = net.init().double()
    with pytest.raises(InputError, match=r"same images for the same draws, .* take all random numbers in its draw"):
        gradient(net, start, augment=Augmentation(lambda images, generator: None, noisy))

    def hardly_noisy(images: Tensor, _: Any) -> Tensor:
        return images + torch.randn_like(images) / 255

    augment, images = Augmentation(lambda images, generator: None, hardly_noisy), torch.randn(6, 2, 6, 6)
    with pytest.raises(InputError, match="same images for the same draws, found random numbers"):
        unroll(net, net.init(), images, LABELS, 0.1, BATCHES, augment=augment)

    def seeded(images: Tensor, seed: int) -> Tensor:  # as the public code's DiffAugment
        torch.manual_seed(seed)
        return noisy(images, None)

    assert gradient(net, start, augment=Augmentation(lambda images, generator: 3, seeded)).isfinite().all()


def test_an_augmentation_that_is_another_where_images_are_learned_is_refused() -> None:
    augment = Augmentation(lambda *_: None, lambda rows, _: 1.5 * rows if rows.requires_grad else rows)
    for net in (ConvNet(2, 3, 6, 4, 1), FlatModule(with_layer(nn.Identity()))):
        start = net.init(torch.Generator().manual_seed(0)).double()
        with pytest.raises(InputError, match="in the backward pass"):
            gradient(net, start, augment=augment)


def test_an_augmentation_may_write_into_its_images() -> None:
    def cut_out(images: Tensor, rows: int) -> Tensor:
        images[:, :, :rows] = 0
        return images

    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    net = ConvNet(2, 3, 6, 4, 1)
    start = net.init(torch.Generator().manual_seed(0)).double()

    def gradient(apply: Callable[[Tensor, Any], Tensor]) -> Tensor:
        path = unroll(net, start, images, LABELS, 0.3, BATCHES, augment=Augmentation(lambda *_: 2, apply))
        return torch.autograd.grad(path[-1].square().sum(), images)[0]

    def masked(images: Tensor, rows: int) -> Tensor:
        return images * (torch.arange(6) >= rows)[:, None]

    assert_close("images", gradient(cut_out), gradient(masked), 1e-12)


@pytest.mark.parametrize("result", [lambda images: images.repeat(2, 1, 1, 1), torch.mean, lambda _: None])
def test_an_augmentation_of_another_number_of_images_is_refused(result: Callable[[Tensor], Any]) -> None:
    class Other:
        def draw(self, images: Tensor, generator: torch.Generator | None, /) -> None:
            pass

        def __call__(self, images: Tensor, draws: None) -> Tensor:
            return cast(Tensor, result(images))

    net = ConvNet(2, 3, 6, 4, 1)
    with pytest.raises(InputError, match="`augment`: expected one image for each of the 4 of a step, found "):
        unroll(net, net.init(), torch.randn(6, 2, 6, 6), LABELS, 0.3, BATCHES, augment=Other())


class Dropping:
    """An augmentation whose second step leaves the images out."""

    def draw(self, images: Tensor, generator: torch.Generator | None, /) -> bool:
        return len(images) == 2

    def __call__(self, images: Tensor, draws: bool) -> Tensor:
        return torch.zeros_like(images) if draws else 2 * images


@pytest.mark.parametrize("microbatch", [None, 1])
def test_an_augmentation_that_cuts_the_gradient_off_is_refused(microbatch: int | None) -> None:
    net, images = ConvNet(2, 3, 6, 4, 1), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    start = net.init(torch.Generator().manual_seed(0)).double()
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    path = unroll(net, start, images, LABELS, 0.3, batches, augment=Dropping(), microbatch=microbatch)
    with pytest.raises(
        InputError, match=r"`augment`: expected a differentiable .* cuts the gradient off; .* multiply them by zero"
    ):
        path[-1].sum().backward()
