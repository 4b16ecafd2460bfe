"""Test the images of a step: gathered by the student or augmented by autograd, the same to the bit on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import Augmentation, ConvNet, FlatModule, SiameseAugment, kernels, matching_loss, unroll
from mtt_fast.augmentation.operations import Draws
from mtt_fast.augmentation.protocol import warp_of
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.engine.students.batch import AugmentedBatch, Batch, gathered
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.sweeps import StudentSteps
from mtt_fast.testing import assert_close

NET = ConvNet(3, 4, 8, width=5, depth=2)
IMAGES, INDEX = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([4, 0, 4, 5])
OPERATIONS = ["color", "crop", "cutout", "flip", "scale", "rotate"]


def steps_of(augment: Any, draws: Any = None) -> StudentSteps:
    return StudentSteps(
        GenericStudent(NET), (INDEX,), saved_steps=0, path_on_host=False, augment=augment, draws=(draws,)
    )


def drawn(operation: str) -> tuple[Any, Draws]:
    augment = SiameseAugment(operation)
    return augment, augment.draw(IMAGES[INDEX], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_is_what_the_augmentation_makes_of_its_rows(operation: str) -> None:
    augment, draws = drawn(operation)
    batch = steps_of(augment, draws).batch(IMAGES, 0, torch.float64)
    assert isinstance(batch, Batch)
    expected = augment(IMAGES[INDEX], draws)
    assert (len(batch), batch.shape, batch.device) == (4, expected.shape, IMAGES.device)
    assert torch.equal(gathered(batch), expected)
    assert torch.equal(gathered(batch[1:3]), expected[1:3])
    assert gathered(expected) is expected


@pytest.mark.parametrize("operation", [None, *OPERATIONS])
def test_both_kinds_of_batches_take_gradients_back_alike(operation: str | None) -> None:
    augment, draws = (None, None) if operation is None else drawn(operation)
    bars, factor = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    batch = steps_of(augment, draws).batch(IMAGES, 0, torch.float64, tracked=True)
    assert isinstance(batch, Batch)
    by_autograd = AugmentedBatch.from_images(
        IMAGES, INDEX, lambda rows: rows if augment is None else augment(rows, draws), torch.float64, tracked=True
    )
    actual, expected = torch.zeros_like(IMAGES), torch.zeros_like(IMAGES)
    still_to_add = batch.gradient_to_add(actual, bars)
    assert not actual.any()
    vector, moved = torch.zeros(2, 1, dtype=torch.float64)
    kernels.adjoint_step(vector, vector, vector, factor, moved, batch=still_to_add)
    by_autograd.add_gradient(expected, bars, factor)
    assert torch.equal(actual, expected)
    assert actual[4].any()
    assert not actual[[1, 2, 3]].any()


def test_which_batches_a_student_gathers() -> None:
    warp, draws = drawn("rotate")
    flip = Augmentation(lambda images, generator: None, lambda images, drawn: images.flip(3))
    canvas, crops = torch.randn(6, 3, 16, 16), CanvasCrops(2, warp)
    corners = crops.draw_parameters([canvas[INDEX]], torch.Generator().manual_seed(0))
    for steps, images, dtype, is_gathered in (
        (steps_of(None), IMAGES, torch.float64, True),
        (steps_of(warp, draws), IMAGES.float(), torch.float32, True),
        (steps_of(warp, draws), IMAGES, torch.float32, False),  # augmented in the images' dtype
        (steps_of(None), IMAGES, torch.float32, False),
        (steps_of(warp, draws), IMAGES.transpose(2, 3), torch.float64, False),
        (steps_of(flip), IMAGES, torch.float64, False),
        (steps_of(crops, corners), canvas, torch.float32, False),
        (steps_of(lambda images, drawn: augment_with(images, warp.warp_parameters(draws, images.shape))), IMAGES, torch.float64, False),
    ):  # fmt: skip
        batch = steps.batch(images, 0, dtype)
        assert isinstance(batch, Batch) == is_gathered
        assert gathered(batch.inputs).dtype == dtype
        assert gathered(batch.inputs).is_contiguous()


def test_the_parameters_of_a_warp() -> None:
    augment, draws = drawn("scale")
    shape = IMAGES[INDEX].shape
    parameters = warp_of(augment, draws, shape)
    assert parameters is not None
    assert parameters.shape == (4, 13)
    assert warp_of(augment, parameters, shape) is parameters  # as drawn by draw_parameters
    assert torch.equal(augment(IMAGES[INDEX], parameters), augment(IMAGES[INDEX], draws))
    assert warp_of(CanvasCrops(2, augment), draws, shape) is None
    assert warp_of(None, None, shape) is None


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("net", [NET, FlatModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)))])
def test_an_unroll_gathers_and_augments_as_autograd_does(net: Any, microbatch: int | None) -> None:
    """Unroll with a gradient to the images, and without."""
    theta, labels = torch.randn(net.num_parameters, dtype=torch.float64) / 3, torch.arange(6) % 4
    batches, augment = [INDEX, torch.tensor([1, 1]), INDEX], SiameseAugment()
    draws = [augment.draw(IMAGES[index], torch.Generator().manual_seed(n)) for n, index in enumerate(batches)]

    def gradients(augment: Any, images: Tensor) -> list[Tensor]:
        start, rate = theta.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        path = unroll(net, start, images, labels, rate, batches, augment, microbatch, draws=draws)
        loss = matching_loss(path[-1], theta, theta + 1) + path[1].square().sum()
        inputs = [start, rate, *([images] if images.requires_grad else [])]
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    of_functions = Augmentation(augment.draw, augment)
    learned = IMAGES.clone().requires_grad_()
    for actual, expected in zip(gradients(augment, learned), gradients(of_functions, learned), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(gradients(augment, IMAGES), gradients(augment, learned), strict=False):
        assert_close("without a gradient to the images", actual, expected, 1e-15)
