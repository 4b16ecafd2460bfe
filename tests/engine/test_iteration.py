"""Test one iteration as a function of tensors: equal to the engine called plainly, pure, and asking no tensor for its value."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet, matching_loss, plan, unroll
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.data import Normalisation
from mtt_fast.distill.segments import student_batches
from mtt_fast.engine.draws import Apply, draw_steps
from mtt_fast.engine.iteration import Iteration, iteration, planned_iteration
from mtt_fast.engine.students.batch import Batch
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import StepGradient, Student
from mtt_fast.engine.sweeps import StudentSteps, path_of
from mtt_fast.kernels import WARP_PARAMETERS
from mtt_fast.runtime.cuda_graphs import CapturedCall, GraphedFunction, graphed
from mtt_fast.testing import assert_close
from mtt_fast.training.epochs import training_steps
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from tests.engine.no_values import NoValues

NET = ConvNet(3, 4, 8, width=5, depth=2)
CPU = torch.device("cpu")


def tensors(kind: str = "indices", seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return all arguments of an iteration except the random ones of its steps."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    start, logits = 0.5 * randn(NET.num_parameters), randn(10, 4)
    return {
        "start": start,
        "target": start + 0.1 * randn(NET.num_parameters),
        "images": randn(10, 3, 8, 8),
        "labels": logits.argmax(1) if kind == "indices" else logits.softmax(1),
        "lr": torch.tensor(0.2, dtype=dtype),
    }


def lengths_of(batches: list[Tensor]) -> tuple[int, ...]:
    return tuple(len(index) for index in batches)


@pytest.mark.parametrize(
    ("augment", "applied"),
    [(None, None), (SiameseAugment(), SiameseAugment()), (SiameseAugment(), augment_with)],
    ids=["plain", "augmented", "by a function"],
)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_equals_the_engine_called_plainly(
    kind: str, augment: SiameseAugment | None, applied: Apply | None, microbatch: int | None
) -> None:
    given = tensors(kind)
    batches = student_batches(10, 4, 5, torch.Generator().manual_seed(1))
    assert len(set(lengths_of(batches))) == 2
    student = student_for(NET, CPU, "indices" if kind == "indices" else "probabilities")
    draws = draw_steps(
        batches,
        (3, 8, 8),
        torch.float64,
        augment.draw_parameters if augment else None,
        torch.Generator().manual_seed(2),
    )
    if microbatch is not None:
        student = InMicrobatches(student, microbatch)
    run = iteration(student, applied, lengths_of(batches))
    results = run(*given.values(), *draws.tensors())

    images, labels, lr = (given[name].clone() for name in ("images", "labels", "lr"))
    inputs = [images, lr, *([labels] if kind == "probabilities" else [])]
    for tensor in inputs:
        tensor.requires_grad_()
    path = unroll(
        NET, given["start"], images, labels, lr, batches, augment, microbatch,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    loss = matching_loss(path[-1], given["start"], given["target"])
    loss.backward()
    expected = [loss.detach(), *(tensor.grad for tensor in inputs)]
    for name, actual, wanted in zip(("loss", "images", "lr", "labels"), results, expected, strict=False):
        assert wanted is not None
        assert_close(name, actual, wanted, 1e-12)
    assert len(results) == len(expected)
    assert not any(tensor.requires_grad for tensor in results)


@pytest.mark.parametrize("student", [GenericStudent(NET), FusedConvNetStudent(NET)], ids=["generic", "fused"])
@pytest.mark.parametrize("augment", [SiameseAugment(), augment_with], ids=["augmented", "by a function"])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_nothing_waits_for_a_value(student: Student, augment: Apply, microbatch: int | None) -> None:
    """Use tensors without values, which take the same code path as on a GPU, down to the operations' reference."""
    batches = student_batches(10, 4, 4, torch.Generator())
    given = tensors()
    draws = draw_steps(batches, (3, 8, 8), torch.float64, SiameseAugment().draw_parameters, torch.Generator())
    inputs = [tensor.to("meta") for tensor in (*given.values(), *draws.tensors())]
    cut = student if microbatch is None else InMicrobatches(student, microbatch)
    with NoValues():
        actual = iteration(cut, augment, lengths_of(batches))(*inputs)
    assert [tensor.shape for tensor in actual] == [(), given["images"].shape, ()]


def test_nothing_waits_for_the_place_of_a_crop() -> None:
    crops = CanvasCrops(2, SiameseAugment())
    batches = student_batches(10, 4, 4, torch.Generator())
    given = tensors() | {"images": torch.empty(10, 3, 16, 16, dtype=torch.float64)}
    draws = draw_steps(batches, (3, 16, 16), torch.float64, crops.draw_parameters, torch.Generator())
    inputs = [tensor.to("meta") for tensor in (*given.values(), *draws.tensors())]
    with NoValues():
        actual = iteration(FusedConvNetStudent(NET), crops, lengths_of(batches))(*inputs)
    assert [tensor.shape for tensor in actual] == [(), (10, 3, 16, 16), ()]


def test_a_step_of_training_hands_the_student_what_it_can_gather() -> None:
    handed: list[Any] = []

    class Watched(GenericStudent):
        def gradient(self, theta: Tensor, images: Any, labels: Tensor, save: bool = False) -> StepGradient:
            handed.append(images)
            return super().gradient(theta, images, labels, save)

    augment, index, sgd = SiameseAugment("rotate"), torch.tensor([3, 0, 3]), Sgd(0.1)
    theta, rate = torch.randn(NET.num_parameters) / 3, torch.tensor(0.1)
    floats, bytes_ = torch.randn(10, 3, 8, 8), torch.randint(256, (10, 3, 8, 8)).byte()
    labels, scaled = torch.arange(10) % 4, Normalisation((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)).apply
    parameters = augment.draw_parameters([floats[index]], torch.Generator().manual_seed(0))
    for images, applied, rows in (
        (Images(floats, labels), None, (index,)),
        (Images(floats, labels), augment, (index, parameters)),
        (Images(floats, labels), augment_with, (index, parameters)),
        (Images(bytes_, labels, scaled), augment, (index, parameters)),
    ):
        expected = images.batch(index)[0]
        if applied is not None:
            expected = augment_with(expected, parameters)
        actual = training_steps(Watched(NET), images, sgd, applied, None, len(index), theta, theta, rate, *rows)[0]
        gradient = GenericStudent(NET).gradient(theta, expected, labels[index]).gradient
        assert_close("theta", actual, theta - 0.1 * gradient, 1e-6)
    assert [isinstance(images, Batch) for images in handed] == [True, True, False, False]


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_nothing_waits_in_a_step_of_training(pixels: str) -> None:
    shape = (10, 3, 8, 8)
    if pixels == "uint8":
        transform = Normalisation((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)).apply
        images = Images(torch.empty(shape, dtype=torch.uint8, device="meta"), labels_on_meta(), transform)
    else:
        images = Images(torch.empty(shape, device="meta"), labels_on_meta())
    theta, index = torch.empty(NET.num_parameters, device="meta"), torch.empty(7, dtype=torch.long, device="meta")
    parameters = torch.empty(7, len(WARP_PARAMETERS), device="meta")
    run = partial(training_steps, FusedConvNetStudent(NET), images, Sgd(0.1, 0.9, 5e-4), augment_with, None, 4)
    with NoValues():
        actual = run(theta, theta, theta.new_empty(()), index, parameters)
    assert [tensor.shape for tensor in actual] == [theta.shape, theta.shape, (2,)]


def labels_on_meta() -> Tensor:
    return torch.empty(10, dtype=torch.long, device="meta")


def test_the_loss_that_users_call_does_wait() -> None:
    """Check that the test above can fail."""
    with NoValues(), pytest.raises(AssertionError, match=r"is_nonzero|_local_scalar_dense"):
        matching_loss(*(torch.empty(3, device="meta") for _ in range(3)))


def repeating(run: Any) -> CapturedCall:
    """Capture as CUDA does, as far as that goes on a CPU: inputs and outputs stay where they are."""
    outputs = run()

    def graph() -> None:
        for place, value in zip(outputs, run(), strict=True):
            place.copy_(value)

    return CapturedCall(graph, outputs)


def inputs(seed: int, device: torch.device = CPU) -> list[Tensor]:
    """Return the arguments of an iteration, drawn from `seed`."""
    given, generator = tensors(seed=seed, dtype=torch.float32), torch.Generator().manual_seed(seed)
    batches = student_batches(10, 4, 3, generator)
    draws = draw_steps(batches, (3, 8, 8), torch.float32, SiameseAugment().draw_parameters, generator)
    return [tensor.to(device) for tensor in (*given.values(), *draws.tensors())]


def fresh(device: torch.device = CPU) -> Iteration:
    return iteration(student_for(NET, device), augment_with, (2, 4, 4))


def test_refilled_places_give_the_bits_of_a_fresh_call() -> None:
    run = GraphedFunction(fresh(), repeating)
    saved = [(seed, run(*inputs(seed))) for seed in (0, 1, 2, 0)]
    for seed, results in saved:  # what was returned is not written over by later calls
        for actual, expected in zip(results, fresh()(*inputs(seed)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("student", ["chosen", "generic"])
def test_a_replay_gives_the_bits_of_the_call_on_a_gpu(student: str) -> None:
    from mtt_fast.runtime.numerics import numerics

    device = torch.device("cuda")
    eager = iteration(student_for(NET, device) if student == "chosen" else GenericStudent(NET), augment_with, (2, 4, 4))
    with numerics(device, "tf32"):
        run = graphed(eager, device)
        for seed in (0, 1, 2, 0):
            given = inputs(seed, device=device)
            for actual, expected in zip(run(*given), eager(*given), strict=True):
                assert torch.equal(actual, expected)
    assert isinstance(run, GraphedFunction)
    assert run.problem is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # as torch says at its first use
def test_nothing_waits_on_a_gpu() -> None:
    device = torch.device("cuda")
    run, given = fresh(device), inputs(0, device=device)
    run(*given)
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_iteration_keeps_what_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StudentSteps] = []

    def watched(steps: StudentSteps, *tensors: Tensor) -> Any:
        seen.append(steps)
        return path_of(steps, *tensors)

    monkeypatch.setattr("mtt_fast.engine.iteration.path_of", watched)
    planned = replace(plan(NET, images=(10, 3, 8, 8), steps=3), saved_steps=2, path_on_host=True)
    planned_iteration(planned, None, (2, 4, 4))(*inputs(0)[:-1])
    (steps,) = seen
    assert (steps.student, steps.saved_steps, steps.path_on_host) == (planned.student, 2, True)
