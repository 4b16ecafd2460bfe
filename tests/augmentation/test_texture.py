"""Test textures: crops of canvases as the public code takes them, their gradients, draws, and pictures put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mtt_fast import (
    Augmentation,
    ConvNet,
    FlatModule,
    InputError,
    SiameseAugment,
    SyntheticDataset,
    TrajectoryStore,
    matching_loss,
    plan,
    unroll,
)
from mtt_fast.analysis.__main__ import main as analysis
from mtt_fast.augmentation.texture import Canvas, CanvasCrops, canvases_of, crop, tiled
from mtt_fast.commands import cli
from mtt_fast.distill.command import main as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.segments import augmentation
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.evaluate import main as evaluate_command
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.evaluation import training_job
from mtt_fast.training.images import Images, as_training_images, real_images
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.protocols import EvaluationProtocol
from mtt_fast.training.subsets import random_subset
from tests.training.jobs import finished

pytestmark = pytest.mark.usefixtures("no_curves")

ODD = (3, 2, 7, 10)


def rolled(image: torch.Tensor, corner: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return one crop (C, height, width) of one canvas, by rolling the canvas."""
    return torch.roll(image, (-int(corner[0]), -int(corner[1])), (1, 2))[:, :height, :width]


def test_crops_are_those_of_rolled_canvases() -> None:
    images = torch.rand(ODD, dtype=torch.float64)
    corners = torch.tensor([[0, 0], [6, 9], [3, 8]])
    for height, width in ((3, 5), (7, 10), (1, 1)):
        crops = crop(images, corners.float(), height, width)
        expected = [rolled(image, corner, height, width) for image, corner in zip(images, corners, strict=True)]
        assert crops.equal(torch.stack(expected))


def test_crops_have_every_derivative() -> None:
    images = torch.rand(ODD, dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[5, 9], [0, 0], [6, 1]])

    def function(images: torch.Tensor) -> torch.Tensor:
        return crop(images, corners, 3, 5) ** 2

    assert torch.autograd.gradcheck(function, (images,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (images,))


def test_draws_cover_the_canvas_and_repeat() -> None:
    images = torch.empty(2000, 1, 4, 6)
    crops = CanvasCrops(2)
    drawn = crops.draw_parameters([images], generator_for(0, "crops"))
    assert drawn.equal(crops.draw_parameters([images], generator_for(0, "crops")))
    assert drawn.shape == (2000, 2)
    corners, counts = drawn.unique(dim=0, return_counts=True)
    assert len(corners) == 4 * 6
    assert float((counts / 2000 - 1 / 24).abs().max()) < 0.02  # four standard deviations


def test_the_augmentation_that_follows_sees_crops() -> None:
    images, then = torch.rand(5, 3, 8, 8, dtype=torch.float64), SiameseAugment()
    crops = CanvasCrops(2, then)
    drawn = crops.draw_parameters([images], generator_for(3, "crops"))
    assert drawn.dtype == torch.float64
    assert drawn.shape == (5, 15)
    generator = generator_for(3, "crops")
    corners = [torch.randint(8, (5,), generator=generator) for _ in range(2)]
    small = crop(images, torch.stack(corners, 1), 4, 4)
    expected = then(small, then.draw(small, generator))
    torch.testing.assert_close(crops(images, drawn), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_unroll_sends_gradients_to_the_canvases(samples: int) -> None:
    """Compare with the whole graph of steps that roll and cut, with labels repeated, as in the public code."""
    net = ConvNet(in_channels=1, num_classes=3, image_size=4, width=5, depth=1)
    theta = net.init(generator_for(0, "theta")).double()
    canvases = torch.rand(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    target = theta + 0.1 * torch.rand_like(theta)
    batches = [torch.tensor([1, 3]), torch.tensor([0, 2, 1])]
    crops, canvas = CanvasCrops(2), Canvas(2, samples)
    seen = [canvas.batch(index) for index in batches]
    draws = [crops.draw(canvases[index].detach(), generator_for(1, "draws", n)) for n, index in enumerate(seen)]

    path = unroll(net, theta, canvases, labels, lr, seen, crops, draws=draws, microbatch=2)
    gradients = torch.autograd.grad(matching_loss(path[-1], start=theta, target=target), (canvases, lr))

    student = theta.clone().requires_grad_()
    for index, corners in zip(batches, draws, strict=True):
        places = torch.cat([index] * samples).tolist()
        cut = [rolled(canvases[place], corner, 4, 4) for place, corner in zip(places, corners, strict=True)]
        loss = F.cross_entropy(net(student, torch.stack(cut)), torch.cat([labels[index]] * samples))
        student = student - lr * torch.autograd.grad(loss, student, create_graph=True)[0]
    loss = (student - target).square().sum() / (theta - target).square().sum()
    expected = torch.autograd.grad(loss, (canvases, lr))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_canvases_are_put_together_row_by_row() -> None:
    images = torch.arange(2 * 4 * 3 * 2 * 3.0).view(8, 3, 2, 3)
    canvases = canvases_of(images, 2)
    assert canvases.shape == (2, 3, 4, 6)
    for n in range(2):
        for row in range(2):
            for column in range(2):
                part = canvases[n, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                assert part.equal(images[4 * n + 2 * row + column])


def test_tiles_meet_as_crops_do() -> None:
    images = torch.rand(ODD)
    pattern = tiled(images)
    assert pattern.shape == (3, 2, 14, 20)
    corners = torch.tensor([[6, 9], [3, 2], [0, 5]])
    for image, corner, cropped in zip(pattern, corners.tolist(), crop(images, corners, 7, 10), strict=True):
        assert image[:, corner[0] : corner[0] + 7, corner[1] : corner[1] + 10].equal(cropped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`size`: expected at least 1, found 0"),
        ((2.0,), r"`size`: expected a whole number, found 2\.0"),
        ((2, SiameseAugment), "`augment`: expected a SiameseAugment or None, found the class SiameseAugment"),
        (
            (2, Augmentation(lambda *_: None, torch.mul)),
            "`augment`: expected a SiameseAugment or None, found Augmentation",
        ),
    ],
)
def test_what_are_no_crops_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CanvasCrops(*arguments)


@pytest.mark.parametrize("shape", [(6, 1, 3, 4), (6, 40)], ids=str)
def test_canvases_that_cannot_be_cut_are_refused(shape: tuple[int, ...]) -> None:
    net, crops = FlatModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40, 3))), CanvasCrops(4)
    message = r"`images`: expected canvases \(C, H, W\) of at least 4 pixels a side, found shape"
    with pytest.raises(InputError, match=message):
        unroll(net, net.init(), torch.zeros(shape), torch.arange(6) % 3, 0.1, [torch.arange(6)], crops)
    with pytest.raises(InputError, match=message):
        plan(net, images=shape, steps=1, augment=crops)


@pytest.mark.parametrize(("draws", "found"), [(torch.zeros(3, 2), "those of 3"), ([0, 0], "list")], ids=["few", "list"])
def test_draws_that_are_not_of_the_canvases_are_refused(draws: Any, found: str) -> None:
    """Check what would leave the last canvases of a step without a crop."""
    with pytest.raises(
        InputError, match=f"CanvasCrops draws: expected what draw returned for these 5 images, found {found}"
    ):
        CanvasCrops(2)(torch.zeros(5, 1, 8, 8), draws)


def test_crops_have_the_shape_of_an_image() -> None:
    assert Canvas(3, 2).image_shape(torch.Size((1, 12, 15))) == (1, 4, 5)
    assert Canvas(3, 2).batch(torch.tensor([4, 0])).tolist() == [4, 0, 4, 0]


# ------------------------------------------------------------------ a run


TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 1 --eval_it 1 --num_eval 1 --epoch_eval_train 2 --batch_real 512 --lr_img 10 "
    "--texture --canvas_size 2 --canvas_samples 3 --batch_syn 6 --no_aug --microbatch 4"
).split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a toy run of textures, with its data and buffers beside it."""
    folder = tmp_path_factory.mktemp("texture")
    assert cli.run(distill, [*TOY, *places(folder), "--out", str(folder / "run")]) == 0
    return folder / "run"


def places(folder: Path) -> list[str]:
    return ["--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers")]


def test_a_run_starts_from_tiles_and_updates_canvases(run_folder: Path) -> None:
    """Compare one iteration with steps that roll and cut, with the run's own draws."""
    options = parse_options([*TOY, *places(run_folder.parent)])
    real = real_images(options.load_data(), torch.device("cpu"), zca=False)
    start = random_subset(real, 4, generator_for(0, "initial images"))
    canvases = canvases_of(start.pixels, 2).double().requires_grad_()
    assert canvases.shape == (10, 1, 16, 16)

    experts = TrajectoryStore(run_folder.parent / "buffers" / "digits" / "ConvNetD1W4")
    theta, target = (experts.read(0, epoch).double() for epoch in (0, 1))
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    generator = generator_for(0, "iteration", 0)
    assert int(torch.randint(1, (), generator=generator)) == 0  # the start epoch
    order = torch.randperm(10, generator=generator)
    student = theta.clone().requires_grad_()
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    for index in (order[6:], order[:6]):  # a shorter last chunk comes first
        which = torch.cat([index] * 3)
        corners = torch.stack([torch.randint(16, (len(which),), generator=generator) for _ in range(2)], 1)
        cut = [rolled(canvases[place], corner, 8, 8) for place, corner in zip(which.tolist(), corners, strict=True)]
        loss = F.cross_entropy(net(student, torch.stack(cut)), which)
        student = student - lr * torch.autograd.grad(loss, student, create_graph=True)[0]
    matching = (student - target).square().sum() / (theta - target).square().sum()
    gradient, lr_gradient = torch.autograd.grad(matching, (canvases, lr))

    distilled = SyntheticDataset.load(run_folder / "synthetic.safetensors")
    torch.testing.assert_close(distilled.images, (canvases - 10 * gradient).float(), rtol=1e-4, atol=1e-4)
    assert float((10 * gradient).abs().max()) > 0.01
    assert float(distilled.lr) == pytest.approx(0.01 - 1e-5 * float(lr_gradient), abs=1e-8)
    assert distilled.labels.tolist() == list(range(10))
    assert distilled.canvas == Canvas(2, 3)


def test_textures_go_with_what_the_successors_added(run_folder: Path, tmp_path: Path) -> None:
    flags = [*TOY, *places(run_folder.parent), "--lr_y", "1", "--ema_decay", "0.9", "--num_trajectories", "2"]
    flags += ["--pix_init", "samples_predicted_correctly", "--gradient", "truncated", "--out", str(tmp_path / "run")]
    assert cli.run(distill, [*flags, "--Iteration", "0"]) == 0
    real = real_images(parse_options(flags).load_data(), torch.device("cpu"), zca=False)
    pixels, labels = real.train.batch(slice(None))
    begun = SyntheticDataset.load(tmp_path / "run" / "synthetic.safetensors").images
    for label, canvas in enumerate(begun):
        quarters = [canvas[:, row : row + 8, column : column + 8] for row in (0, 8) for column in (0, 8)]
        places_of = [(pixels == quarter).flatten(1).all(dim=1).nonzero()[0, 0] for quarter in quarters]
        assert labels[torch.stack(places_of)].tolist() == [label] * 4
        assert len(set(map(int, places_of))) == 4
    assert cli.run(distill, flags) == 0
    moved = SyntheticDataset.load(tmp_path / "run" / "ema.safetensors")
    assert moved.canvas == Canvas(2, 3)
    assert not moved.images.equal(begun)
    assert moved.labels.shape == (10, 10)


def test_a_set_of_textures_is_evaluated_by_its_crops(run_folder: Path, tmp_path: Path) -> None:
    """Compare with torch's own optimizer on rolled and cut canvases, with the evaluation's draws."""
    distilled = SyntheticDataset.load(run_folder / "synthetic.safetensors")
    options = parse_options([*TOY, *places(run_folder.parent)])
    real = real_images(options.load_data(), torch.device("cpu"), zca=False)
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    images = as_training_images(distilled, torch.device("cpu"))
    assert images.input_shape == (1, 8, 8)
    protocol = EvaluationProtocol(epochs=1, batch_size=4, augment="none")
    generator = generator_for(5, "evaluation", 0)
    trained = finished(training_job(net, net.init(generator), images, 0.1, protocol, generator))

    generator = generator_for(5, "evaluation", 0)
    theta = net.init(generator).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        order = torch.randperm(10, generator=generator)
        for index in order.split(4):
            which = torch.cat([index] * 3)
            corners = torch.stack([torch.randint(16, (len(which),), generator=generator) for _ in range(2)], 1)
            cut = [
                rolled(distilled.images[place], corner, 8, 8)
                for place, corner in zip(which.tolist(), corners, strict=True)
            ]
            optimizer.zero_grad()
            F.cross_entropy(net(theta, torch.stack(cut)), which).backward()
            optimizer.step()
    torch.testing.assert_close(trained, theta.detach(), rtol=1e-4, atol=1e-5)

    out = tmp_path / "result.json"
    flags = ["--data_path", str(run_folder.parent / "data"), "--epoch_eval_train", "2", "--num_eval", "1", "--out"]
    assert cli.run(evaluate_command, [str(run_folder), *flags, str(out)]) == 0
    of_run = json.loads(out.read_text())["accuracy"]
    assert 0 < of_run["mean"] <= 1
    distilled.export("mtt", tmp_path)
    exported = [str(tmp_path / "images_best.pt"), "--dataset", "digits", "--model", "ConvNetD1W4", *flags, str(out)]
    assert cli.run(evaluate_command, [*exported, "--texture", "--canvas_samples", "3"]) == 0
    assert json.loads(out.read_text())["accuracy"] == of_run
    assert real.data.image_shape == (1, 8, 8)


def test_the_distance_of_textures_is_that_of_students_on_crops(run_folder: Path, tmp_path: Path) -> None:
    flags = ["--steps", "2", "--deltas", "3,6", "--out", str(tmp_path)]  # the experts' epochs have three steps
    assert cli.run(analysis, ["distance", str(run_folder), *flags]) == 0
    distilled = SyntheticDataset.load(run_folder / "synthetic.safetensors")
    experts = TrajectoryStore(run_folder.parent / "buffers" / "digits" / "ConvNetD1W4")
    trajectory = [experts.read(0, epoch).double() for epoch in (0, 1, 2)]
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    generator = generator_for(0, "distance", 0)
    order = torch.randperm(10, generator=generator)
    path = trajectory[:1]
    for index in (order[6:], order[:6]):
        which = torch.cat([index] * 3)
        corners = torch.stack([torch.randint(16, (len(which),), generator=generator) for _ in range(2)], 1)
        images = distilled.images.double()
        cut = [rolled(images[place], corner, 8, 8) for place, corner in zip(which.tolist(), corners, strict=True)]
        theta = path[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(theta, torch.stack(cut)), which), theta)
        path.append(path[-1] - float(distilled.lr) * gradient)
    for point in json.loads((tmp_path / "distance.json").read_text())["curves"]["run"]:
        target = trajectory[point["real_steps"] // 3]
        nearest = min(float((theta - target).square().sum()) for theta in path)
        assert point["mean"] == pytest.approx(nearest / float((trajectory[0] - target).square().sum()), rel=1e-4)


def test_pictures_show_tiles(run_folder: Path) -> None:
    with Image.open(run_folder / "images.png") as picture:
        assert picture.width > 10 * 96  # ten patterns of 32 pixels, enlarged three times
    with Image.open(run_folder / "history" / "iteration_000001.png") as snapshot:
        assert snapshot.size == (160, 16)  # ten canvases, pixel for pixel


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zca"], "--texture, --zca: expected one of them, found both"),
        (["--teacher_label"], "--texture, --teacher_label: expected one of them, found both"),
        (
            ["--lr_y", "1", "--label_init", "experts"],
            "--texture, --label_init experts: expected one of them, found both",
        ),
        (["--canvas_size", "0"], "--canvas_size 0: expected at least 1"),
        (["--canvas_samples", "0"], "--canvas_samples 0: expected at least 1"),
    ],
)
def test_options_that_do_not_go_with_textures_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(distill, [*TOY, *places(tmp_path), *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_canvases_of_another_size_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SyntheticDataset.load(run_folder / "synthetic.safetensors").export("mtt", tmp_path)
    flags = ["--dataset", "digits", "--data_path", str(run_folder.parent / "data"), "--texture", "--canvas_size", "3"]
    assert cli.run(evaluate_command, [str(tmp_path / "images_best.pt"), *flags]) == 2
    error = capsys.readouterr().err
    assert "expected canvases (1, 24, 24) of digits, found (1, 16, 16)" in error
    assert "--canvas_size, or leave out --texture" in error


def test_the_plan_counts_crops_and_canvases() -> None:
    net = ConvNet(image_size=32, width=16)
    case: dict[str, Any] = {"steps": 5, "memory_budget": None, "augment": True}
    images = plan(net, images=(40, 3, 32, 32), batch=40, **case)
    crops = plan(net, images=(20, 3, 64, 64), batch=40, **case | {"augment": CanvasCrops(2, SiameseAugment())})
    assert crops.parts["step"] == images.parts["step"]
    assert crops.parts["augmentation"] > 2 * 40 * 3 * 64 * 64 * 4  # each crop's canvas and its gradient
    assert crops.parts["images"] - images.parts["images"] == (20 * 4 - 40) * 3 * 32 * 32 * 4
    assert images.parts["augmentation"] == 0


def test_crops_have_a_path_on_meta() -> None:
    net, crops = ConvNet(image_size=8, width=4, depth=1), CanvasCrops(2, SiameseAugment())
    theta, canvases = (torch.empty(shape, device="meta") for shape in (net.num_parameters, (6, 3, 16, 16)))
    labels = torch.empty(6, dtype=torch.long, device="meta")
    assert unroll(net, theta, canvases, labels, 0.1, [torch.arange(6)] * 2, augment=crops).shape == (3, *theta.shape)


def test_the_loss_of_an_epoch_is_the_mean_over_its_crops() -> None:
    """Use canvases of one colour each, whose crops are all alike, and no learning rate, so that all steps are alike."""
    colours = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    images = Images(colours.expand(5, 1, 8, 8).contiguous(), torch.arange(5) % 3, canvas=Canvas(2, 3))
    net = ConvNet(in_channels=1, num_classes=3, image_size=4, width=3, depth=1, norm="none")
    theta = net.init(torch.Generator().manual_seed(0)).double()
    epoch = Epochs(GenericStudent(net), images, Sgd(0.0, batch_size=2), None)
    *_, loss = epoch(theta, torch.zeros_like(theta), torch.Generator().manual_seed(1))
    expected = F.cross_entropy(net(theta, colours.expand(5, 1, 4, 4)), images.labels)
    torch.testing.assert_close(loss, expected[None])


def test_crops_are_augmented_for_students_and_in_evaluations() -> None:
    options = DistillOptions(texture=True, canvas_size=2, canvas_samples=3, dsa_strategy="flip")
    assert augmentation(options) == CanvasCrops(2, SiameseAugment("flip"))
    images = Images(torch.randn(6, 1, 12, 12), torch.arange(6) % 3, canvas=Canvas(2, 3))
    net = ConvNet(in_channels=1, num_classes=3, image_size=6, width=3, depth=1)
    start = net.init(torch.Generator().manual_seed(0))
    plain, flipped = (
        finished(
            training_job(net, start, images, 0.1, EvaluationProtocol(epochs=1, augment=strategy), torch.Generator())
        )
        for strategy in ("none", "flip")
    )
    assert not torch.equal(plain, flipped)
