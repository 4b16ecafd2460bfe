"""Test DSA against golden cases and plain torch, draw for draw; its draws; its derivatives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast import ConvNet, InputError, SiameseAugment, unroll
from mtt_fast.augmentation.operations import Draws, parameters_of_steps
from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.testing import assert_close

NAMES = ["brightness", "saturation", "contrast", "crop", "cutout", "flip", "scale", "rotate"]

# What the golden values of scale and rotate are off by, since they were computed in float32. A coordinate is rounded on
# its way to pixels. Shifted to [0, 2], and as a pixel's number, it is off by up to half a unit in the last place, that is
# 16 px · 2⁻²⁴ at 32 pixels; before, as a number mostly below 1 (grid and matrix, two each, two products, their sum), by
# half of it. In squares that is 2 + 7/4 < 4 of these, and in the mean square a third. The two axes double it. Between
# independent pixels, which these are, linear interpolation has a slope of √3 times its value per pixel, in the root mean
# square: 2 · ⅔ against ⅔ · ⅔. So √(4/3) · √2 · √3 = √8. The transpose is the same sum, over the cotangents.
ROUNDED_COORDINATES = 8**0.5 * 16 * 2**-24
TOLERANCES = {"scale": ROUNDED_COORDINATES, "rotate": ROUNDED_COORDINATES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_golden(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = load_file(golden / "dsa-32.safetensors")
    images = case["images"].to(dtype).requires_grad_()
    draws = [case[key] for key in sorted(case) if key.startswith(f"{name}.draw")]
    output = augment_with(images, parameters_of_steps([Draws(name, tuple(draws))], images.shape))
    (gradient,) = torch.autograd.grad(output, images, case["cotangent"].to(dtype))
    tolerance = TOLERANCES.get(name, 1e-7)  # the values are stored in float32
    assert_close("output", output, case[f"{name}.output"], tolerance)
    assert_close("gradient", gradient, case[f"{name}.grad_images"], tolerance)


def plain(images: Tensor, draws: Draws) -> Tensor:
    """Apply the operations in plain torch, an image at a time."""
    return torch.stack([_PLAIN[draws.operation](x, *n) for x, *n in zip(images, *draws.numbers, strict=True)])


def plain_color(x: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return plain_contrast(plain_saturation(x + (u - 0.5), v), w)


def plain_saturation(x: Tensor, u: Tensor) -> Tensor:
    return (x - x.mean(0)) * (2 * u) + x.mean(0)


def plain_contrast(x: Tensor, u: Tensor) -> Tensor:
    return (x - x.mean()) * (u + 0.5) + x.mean()


def plain_crop(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    height, width = x.shape[1:]
    return F.pad(x, (width, width, height, height))[
        :, height + int(down) : 2 * height + int(down), width + int(right) : 2 * width + int(right)
    ]


def plain_cutout(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    hole = torch.ones_like(x[0])
    places = []
    for centre, side in zip((row, column), x.shape[1:], strict=True):
        size = int(side * 0.5 + 0.5)
        places.append((torch.arange(size) + centre - size // 2).clamp(0, side - 1))
    hole[places[0][:, None], places[1]] = 0
    return x * hole


def plain_warp(x: Tensor, matrix: list[list[Tensor]]) -> Tensor:
    affine = torch.stack([torch.stack(row) for row in matrix])[None].to(x.dtype)
    grid = F.affine_grid(affine, [1, *x.shape], align_corners=True)
    return F.grid_sample(x[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def plain_scale(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
    along_x, along_y = ((1 - number.double()) / 1.2 + number.double() * 1.2 for number in (u, w))
    zero = torch.zeros_like(along_x)
    return plain_warp(x, [[along_x, zero, zero], [zero, along_y, zero]])


def plain_rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = torch.deg2rad(-15 + 30 * u.double())
    return plain_warp(x, [[angle.cos(), -angle.sin(), 0 * angle], [angle.sin(), angle.cos(), 0 * angle]])


_PLAIN: dict[str, Any] = {
    "color": plain_color,
    "brightness": lambda x, u: x + (u - 0.5),
    "saturation": plain_saturation,
    "contrast": plain_contrast,
    "crop": plain_crop,
    "cutout": plain_cutout,
    "flip": lambda x, u: x.flip(2) if u < 0.5 else x,
    "scale": plain_scale,
    "rotate": plain_rotate,
}


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")  # it means lines of pixels, which stay lines
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 1, 9, 14), (3, 4, 1, 7), (3, 2, 6, 1)], ids=str)
@pytest.mark.parametrize("name", _PLAIN)
def test_values_and_gradients_are_those_of_plain_torch(name: str, shape: tuple[int, int, int, int]) -> None:
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    draws = SiameseAugment(name).draw(images, torch.Generator().manual_seed(2))
    y_bar = torch.randn(shape, dtype=torch.float64)
    result, expected = SiameseAugment(name)(images, draws), plain(images, draws)
    assert_close("output", result, expected, 1e-12)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(y, images, y_bar) for y in (result, expected))
    assert_close("gradient", gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("name", ["color", *NAMES])
def test_all_derivatives_are_right_and_repeat(name: str) -> None:
    augment = SiameseAugment(name)
    images = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    draws = augment.draw(images, torch.Generator().manual_seed(1))

    def augmented(images: Tensor) -> Tensor:
        return augment(images, draws)

    assert torch.equal(augmented(images), augmented(images))
    assert torch.autograd.gradcheck(augmented, (images,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(augmented, (images,), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_second_derivatives_through_the_augmentation() -> None:
    """Check that an affine map, which has no second derivatives, passes on those around it: forward over reverse, and twice reverse."""
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    along = torch.randn_like(images)
    draws = SiameseAugment("color").draw(images, torch.Generator().manual_seed(1))
    parameters = parameters_of_steps([draws], images.shape)
    parameters[:, 3:9] = 0.2 * torch.randn(2, 6)
    affine = torch.func.jacrev(lambda x: augment_with(x, parameters))(images)
    y = augment_with(images, parameters)
    hessian = torch.einsum("aijkbmno,aijk,aijkdefg->bmnodefg", affine, 6 * y, affine)  # of Σ y³

    def cubes(x: Tensor) -> Tensor:
        return augment_with(x, parameters).pow(3).sum()

    for of in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        assert_close("hessian", of(cubes)(images), hessian, 1e-12)
    jvp: Any = torch.func.jvp  # its type leaves out what it returns
    _, product = jvp(torch.func.grad(cubes), (images,), (along,))
    assert_close("product", product, torch.einsum("bmnodefg,defg->bmno", hessian, along), 1e-12)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_several_vectors_at_once_are_refused(strategy: str) -> None:
    """Check a Jacobian in one pass, which torch.autograd's own vmap cannot take through a custom function."""
    augment, images = SiameseAugment("color"), torch.randn(2, 2, 4, 3, dtype=torch.float64)
    draws = augment.draw(images)
    with pytest.raises(InputError, match=r"along one vector, found several at once, .*; take one after the other"):
        torch.autograd.functional.jacobian(lambda x: augment(x, draws), images, vectorize=True, strategy=strategy)


@pytest.mark.parametrize("name", ["color", "crop", "rotate"])
def test_parameters_made_outside_do_the_same(name: str) -> None:
    """Take parameters as a CUDA graph does: from memory of its own, in the dtype that the images need."""
    augment, images = SiameseAugment(name), torch.randn(3, 3, 8, 8)
    draws = augment.draw(images, torch.Generator().manual_seed(1))
    held = torch.empty(3, 13)
    held.copy_(parameters_of_steps([draws], images.shape))
    assert torch.equal(augment_with(images, held), augment(images, draws))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_may_have_any_layout_and_precision(dtype: torch.dtype) -> None:
    images = torch.randn(3, 3, 8, 6).to(dtype)
    last = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    augment = SiameseAugment("rotate")
    draws = augment.draw(images, torch.Generator().manual_seed(1))
    augmented = augment(last, draws)
    assert augmented.dtype == dtype
    assert torch.equal(augmented, augment(images, draws))
    (gradient,) = torch.autograd.grad(augmented, last, torch.ones_like(augmented))
    assert_close("output", augmented, plain(images.double(), draws), 1e-6 if dtype == torch.float32 else 1e-2)
    assert gradient.dtype == dtype


def test_a_transpose_by_gathering_visits_nine_pixels_at_most() -> None:
    images = torch.zeros(2000, 3, 32, 32)
    for name in _PLAIN:
        draws = SiameseAugment(name).draw(images, torch.Generator().manual_seed(0))
        warp = parameters_of_steps([draws], images.shape)[:, [3, 4, 6, 7]].view(-1, 2, 2) + torch.eye(2)
        reach = float(torch.linalg.inv(warp).abs().sum(2).max())
        assert reach < (1.5 if name in ("scale", "rotate") else 1 + 1e-12)


def test_parameters_are_not_differentiable() -> None:
    with pytest.raises(InputError, match="require grad; detach them"):
        augment_with(torch.zeros(1, 3, 4, 4), torch.zeros(1, 13, requires_grad=True))


def test_the_random_numbers_come_in_the_order_of_the_public_code() -> None:
    """Check that a run repeats from its seed: one number for the operation, then a vector for each of its numbers."""
    images = torch.zeros(4, 3, 8, 6)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for name, low, high in (("crop", (-1, -1), (2, 2)), ("cutout", (0, 0), (9, 6)), ("color", (), ())):
        drawn = SiameseAugment(name).draw(images, ours).numbers
        torch.randint(1, (), generator=theirs)
        expected = [torch.randint(*ends, (4,), generator=theirs) for ends in zip(low, high, strict=True)]
        for number, expected_number in zip(
            drawn, expected or [torch.rand(4, generator=theirs) for _ in range(3)], strict=True
        ):
            assert torch.equal(number, expected_number)


def test_the_operation_of_a_step_is_chosen_uniformly() -> None:
    augment, generator = SiameseAugment(), torch.Generator().manual_seed(0)
    images = torch.zeros(1, 3, 8, 8)
    counts = Counter(augment.draw(images, generator).operation for _ in range(1200))
    assert set(counts) == {"color", "crop", "cutout", "flip", "scale", "rotate"}
    assert all(150 < count < 250 for count in counts.values())


def test_draws_cover_the_ranges_of_the_public_code() -> None:
    images, generator = torch.zeros(4000, 3, 32, 32), torch.Generator().manual_seed(0)
    down, right = SiameseAugment("crop").draw(images, generator).numbers
    assert (int(down.min()), int(down.max()), int(right.min()), int(right.max())) == (-4, 4, -4, 4)
    row, column = SiameseAugment("cutout").draw(images, generator).numbers
    assert (int(row.min()), int(row.max()), int(column.min()), int(column.max())) == (0, 32, 0, 32)
    (u,) = SiameseAugment("rotate").draw(images, generator).numbers
    assert 0 <= float(u.min()) < 0.01 < 0.99 < float(u.max()) < 1


def test_the_same_generator_gives_the_same_draws() -> None:
    augment, images = SiameseAugment(), torch.zeros(4, 3, 8, 8)
    first, second = (augment.draw(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.operation == second.operation
    assert all(torch.equal(a, b) for a, b in zip(first.numbers, second.numbers, strict=True))


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(InputError, match="found 'blur'"):
        SiameseAugment("color_blur")
    assert augment_by_strategy("none") is None


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"torch\.uint8 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"torch\.float32 of shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8).numpy(), "ndarray"),
        (list(torch.zeros(2, 3, 8, 8)), "list"),
        (torch.zeros(2, 3, 0, 8), r"torch\.float32 of shape \(2, 3, 0, 8\)"),
    ],
    ids=["bytes", "one image", "an array", "a list", "no pixels"],
)
def test_what_are_no_images_is_refused(images: Any, found: str) -> None:
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate")
    draws = augment.draw(torch.zeros(2, 3, 8, 8))
    for call in (lambda: augment.draw(images), lambda: augment(images, draws)):
        with pytest.raises(InputError, match=f"expected floating-point images .b, C, H, W., found {found}"):
            call()


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (None, "expected what draw returned for these images, found NoneType"),
        (SiameseAugment("color").draw(torch.zeros(3, 3, 8, 8)), "expected those of 2 images, found those of 3"),
        (
            SiameseAugment("color").draw_parameters([torch.zeros(1, 3, 8, 8)]),
            "expected those of 2 images, found those of 1",
        ),
    ],
    ids=["none", "of more images", "parameters of fewer"],
)
def test_what_are_no_draws_for_the_images_is_refused(draws: Any, message: str) -> None:
    augment, images, net = SiameseAugment("color"), torch.zeros(2, 3, 8, 8), ConvNet(3, 2, 8, 4, 1)
    with pytest.raises(InputError, match=f"SiameseAugment draws: {message}"):
        augment(images, draws)
    with pytest.raises(InputError, match=f"SiameseAugment draws: {message}"):
        unroll(
            net, net.init(), images, torch.tensor([0, 1]), 0.1, torch.tensor([[0, 1]]), augment=augment, draws=[draws]
        )


def test_a_strategy_that_is_no_text_is_refused() -> None:
    strategy: Any = None
    with pytest.raises(InputError, match="found NoneType; without augmentation leave `augment` out"):
        SiameseAugment(strategy)
