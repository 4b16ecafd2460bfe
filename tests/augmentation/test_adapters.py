"""Test other people's augmentations: the same draws in both sweeps, and gradients as by whole-graph autograd."""

from __future__ import annotations

from typing import Any, cast

import kornia.augmentation as K
import pytest
import torch
from kornia.augmentation.auto import RandAugment
from torch import Tensor, nn

from mtt_fast import Augmentation, ConvNet, FlatModule, InputError, KorniaAugment, SiameseAugment, matching_loss, unroll
from mtt_fast.augmentation.protocol import Augment
from mtt_fast.testing import assert_close, module_function, reference_convnet, whole_graph

SEED = torch.Generator().manual_seed(1)
CASE: dict[str, Any] = {
    "start": 0.5 * torch.randn(ConvNet(3, 4, 8, 5, 2).num_parameters, dtype=torch.float64, generator=SEED),
    "images": torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=SEED),
    "labels": torch.tensor([0, 1, 2, 3, 0, 1]),
    "lr": torch.tensor(0.2, dtype=torch.float64),
    "batches": [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4, 1]), torch.tensor([0, 0, 2, 5])],
}
TARGET = CASE["start"] + 0.1 * torch.randn(len(CASE["start"]), dtype=torch.float64, generator=SEED)


def gradient(augment: Augment, seed: int = 1, microbatch: int | None = None) -> Tensor:
    images: Tensor = CASE["images"].clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    net, start = ConvNet(3, 4, 8, 5, 2), CASE["start"]
    labels, lr, batches = (CASE[name] for name in ("labels", "lr", "batches"))
    rows = unroll(net, start, images, labels, lr, batches, augment, microbatch, generator=generator)
    (to_images,) = torch.autograd.grad(matching_loss(rows[-1], start, TARGET), images)
    return to_images


def expected_gradient(augment: Augment) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    draws = [augment.draw(CASE["images"][index], generator) for index in CASE["batches"]]
    network = module_function(reference_convnet(3, 4, 8, 5, 2))
    return whole_graph(network, target=TARGET, augment=lambda images, n: augment(images, draws[n]), **CASE).images


def draw_noise(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return torch.rand(len(images), generator=generator), torch.randn(images.shape[1:], generator=generator)


def noisy(images: Tensor, draws: tuple[Tensor, Tensor]) -> Tensor:
    strength, noise = draws
    return (images * (1 + strength.view(-1, 1, 1, 1)) + 0.1 * noise).sin()


def list_of(images: Tensor, _: None) -> Any:
    return [images]


AUGMENTATIONS: dict[str, Augment] = {
    "two functions": Augmentation(draw_noise, noisy),
    "one of kornia": KorniaAugment(K.RandomAffine(20.0, scale=(0.8, 1.2), p=0.7)),
    "several of kornia": KorniaAugment(
        K.AugmentationSequential(
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.2, 0.2, 0.2, 0.1, p=0.8),
            K.RandomGaussianNoise(std=0.1, p=0.5),
            K.RandomErasing(p=0.5),
            data_keys=["input"],
            random_apply=3,
        )
    ),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_meta_gradient_goes_through_an_augmentation(name: str, microbatch: int | None) -> None:
    result = gradient(AUGMENTATIONS[name], microbatch=microbatch)
    assert_close("images", result, expected_gradient(AUGMENTATIONS[name]), 1e-9)
    assert (result - gradient(AUGMENTATIONS[name], seed=2)).norm() > 1e-3 * result.norm()


def test_augmentations_are_composed_of_others() -> None:
    """Compose two augmentations as a user would, each with draws of its own."""
    first, second = SiameseAugment("crop_flip"), AUGMENTATIONS["several of kornia"]
    both = Augmentation(
        lambda images, generator: (first.draw(images, generator), second.draw(images, generator)),
        lambda images, draws: second(first(images, draws[0]), draws[1]),
    )
    assert_close("images", gradient(both), expected_gradient(both), 1e-9)


def test_an_augmentation_may_change_the_size_of_images() -> None:
    def halves(images: Tensor, draws: None) -> Tensor:
        return nn.functional.avg_pool2d(images, 2)

    net, images = ConvNet(3, 4, 4, 5, 2), CASE["images"].clone().requires_grad_()
    start = net.init().double()
    rows = unroll(
        net, start, images, CASE["labels"], 0.2, CASE["batches"], augment=Augmentation(lambda *_: None, halves)
    )
    plain = unroll(net, start, halves(images, None), CASE["labels"], 0.2, CASE["batches"])
    result, expected = (torch.autograd.grad(path[-1].square().sum(), images)[0] for path in (rows, plain))
    assert_close("images", result, expected, 1e-12)
    # memory is planned for what the network sees, which is too small for the images themselves
    other = FlatModule(reference_convnet(3, 4, 4, 5, 2))
    planned = unroll(
        other, start, images, CASE["labels"], 0.2, CASE["batches"], Augmentation(lambda *_: None, halves),
        memory_budget="1GiB",
    )  # fmt: skip
    assert_close("path", planned.detach(), rows.detach(), 1e-12)


def test_kornia_draws_from_the_generator_and_leaves_torchs_own_alone() -> None:
    augment, images = AUGMENTATIONS["several of kornia"], CASE["images"]
    before = torch.random.get_rng_state()
    first, second, other = (augment.draw(images, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    seen = augment(images, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(seen, augment(images, second))
    assert not torch.equal(seen, augment(images, other))
    generator = torch.Generator().manual_seed(4)
    assert not torch.equal(
        augment(images, augment.draw(images, generator)), augment(images, augment.draw(images, generator))
    )


def test_kornias_policies_repeat_too() -> None:
    augment, images = KorniaAugment(RandAugment(n=2, m=10)), CASE["images"].float()
    draws = augment.draw(images, torch.Generator().manual_seed(1))
    assert torch.equal(augment(images, draws), augment(images, draws))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda: KorniaAugment(nn.Sequential(K.RandomHorizontalFlip())), "found Sequential, which cannot repeat"),
        (
            lambda: KorniaAugment(K.RandomClahe(grid_size=(2, 2), p=1.0)),
            "RandomClahe: expected a differentiable function",
        ),
        (lambda: Augmentation(lambda *_: None, lambda images, _: images[:1]), "tensor of 4 images, found .1, 3, 8, 8"),
        (lambda: Augmentation(lambda *_: None, list_of), "tensor of 4 images, found list"),
        (lambda: Augmentation(lambda *_: None, lambda images, _: images.sum()), r"tensor of 4 images, found \(\)"),
        (
            lambda: Augmentation(lambda *_: None, lambda images, _: images.to("meta")),
            "on the device cpu, found them on meta",
        ),
        (
            lambda: Augmentation(lambda *_: None, cast(Any, None)),
            "Augmentation apply: expected a function, found NoneType",
        ),
        (lambda: Augmentation(lambda *_: None, lambda images, _: images.detach()), "cuts the gradient off"),
    ],
)
def test_errors_name_the_cause(augment: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gradient(augment())
