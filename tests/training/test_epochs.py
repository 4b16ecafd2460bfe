"""Check that chunks of steps, and of epochs, are those steps one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import ConvNet, SiameseAugment
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.flat_module import FlatModule, statistics_of, track_of
from mtt_fast.networks.protocol import Network
from mtt_fast.training import evaluation
from mtt_fast.training.epochs import Epochs, chunk_sizes
from mtt_fast.training.evaluation import training_job
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.protocols import protocol_by_name
from tests.training.jobs import finished

NET = ConvNet(3, 5, 8, 3, 2)
AUGMENT = SiameseAugment()


@pytest.mark.parametrize(
    ("lengths", "full", "expected"),
    [
        ([256] * 195 + [80], 256, [2560] * 19 + [5 * 256 + 80]),  # an expert's epoch on CIFAR-10
        ([10] * 25, 10, [100, 100, 50]),  # epochs of one step
        ([4, 4, 2, 4, 4, 2], 4, [10, 10]),  # a short batch ends a chunk
        ([3], 3, [3]),
    ],
)
def test_chunks_are_cut_after_ten_steps_and_after_a_short_batch(
    lengths: list[int], full: int, expected: list[int]
) -> None:
    assert chunk_sizes(lengths, full, 10) == expected


@pytest.mark.parametrize("canvas", [None, Canvas(2, 3)], ids=["images", "canvases"])
@pytest.mark.parametrize("batch_size", [3, 4, 8, 20])
def test_epochs_in_a_row_are_epochs_one_by_one(batch_size: int, canvas: Canvas | None) -> None:
    side = 8 if canvas is None else 16
    images = Images(torch.randn(8, 3, side, side), torch.arange(8) % 5, canvas=canvas)
    start = NET.init(torch.Generator().manual_seed(0))
    arguments = (FusedConvNetStudent(NET), images, Sgd(0.1, 0.9, 5e-4, batch_size), AUGMENT)
    at_once = Epochs(*arguments)(start, torch.zeros_like(start), torch.Generator().manual_seed(7), epochs=5)
    theta, velocity, losses = start, torch.zeros_like(start), []
    epoch, generator = Epochs(*arguments), torch.Generator().manual_seed(7)
    for _ in range(5):
        theta, velocity, loss = epoch(theta, velocity, generator)
        losses.append(loss)
    assert torch.equal(at_once[0], theta)
    assert torch.equal(at_once[1], velocity)
    assert torch.equal(at_once[2], torch.cat(losses))


@pytest.mark.parametrize("canvas", [None, Canvas(2, 3)], ids=["images", "canvases"])
def test_an_epoch_is_one_in_plain_torch(canvas: Canvas | None) -> None:
    """Check it where the last batch is short. All crops of a canvas of one colour are the same image."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    net = FlatModule(module)
    pixels = torch.randn(8, 3, 2, 2, dtype=torch.float64) if canvas is None else torch.rand(8, 3, 1, 1).double()
    side = 2 if canvas is None else 4
    images = Images(pixels.expand(8, 3, side, side).contiguous(), torch.arange(8) % 5, canvas=canvas)
    theta = net.init()
    epoch = Epochs(GenericStudent(net), images, Sgd(0.5, batch_size=3), None)
    theta, _, loss = epoch(theta, torch.zeros_like(theta), torch.Generator().manual_seed(2))
    optimizer, total = torch.optim.SGD(module.parameters(), 0.5), 0.0
    for index in torch.randperm(8, generator=torch.Generator().manual_seed(2)).split(3):
        optimizer.zero_grad()
        of_batch = nn.functional.cross_entropy(module(pixels[index].expand(-1, 3, 2, 2)), images.labels[index])
        of_batch.backward()
        optimizer.step()
        total += len(index) * float(of_batch.detach())
    assert float(loss) == pytest.approx(total / 8, rel=1e-12)
    torch.testing.assert_close(theta, nn.utils.parameters_to_vector(module.parameters()).detach())


@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_running_statistics_go_through_a_chunk(at_once: int) -> None:
    net = FlatModule(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)))
    images = Images(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)
    arguments = (GenericStudent(net), images, Sgd(0.1, batch_size=3), AUGMENT, track_of(net))
    ends = []
    for number in (1, at_once):
        theta = net.init()
        velocity, generator = torch.zeros_like(theta), torch.Generator().manual_seed(3)
        run = Epochs(*arguments)
        *_, end = run.chunks(theta, velocity, generator, *statistics_of(net), epochs=2, at_once=number)
        ends.append((end.theta, *end.statistics))
    for one_by_one, together in zip(*ends, strict=True):
        assert torch.equal(one_by_one, together)


@pytest.mark.parametrize("best_epoch", [False, True])
@pytest.mark.parametrize(
    ("name", "together"), [("mtt", 4), ("mtt", 10), ("ddranking", 10), ("selmatch", 10), ("ncfm", 10)]
)
def test_an_evaluation_pauses_where_it_must(
    name: str, together: int, best_epoch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the rate drops and tests take place after the same epochs, however many follow without a pause."""
    net = network_by_name("ConvNetD1W4BN", (1, 6, 6), 3)
    images = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    protocol = protocol_by_name(name, epochs=27, batch_size=None, augment="color_flip", best_epoch=best_epoch)
    start, ends = net.init(), []
    tests: list[list[Tensor]] = []
    for most in (1, together):
        monkeypatch.setattr(evaluation, "_epochs_at_once", lambda *_, most=most: most)
        tests.append([])

        def test(_: Network, theta: Tensor, __: Tensor) -> None:
            tests[-1].append(theta)

        job = training_job(net, start, images, 0.05, protocol, torch.Generator().manual_seed(1), test=test)
        ends.append(finished(job))
    assert torch.equal(*ends)
    assert len(tests[0]) == len(tests[1]) > (1 if best_epoch else 0)
    assert all(torch.equal(*each) for each in zip(*tests, strict=True))
    trained = finished(training_job(net, start, images, 0.05, protocol, torch.Generator().manual_seed(1)))
    assert torch.equal(trained, ends[0])
