"""Test PAD's curriculum: the images of each epoch, the experts that are trained by it, the files with the order of the images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import InputError, SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.experts.command import main
from mtt_fast.interop.order import check_order, read_order
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.curriculum import Curriculum
from mtt_fast.training.experts import ExpertTraining, expert_job, expert_steps
from mtt_fast.training.images import RealImages
from tests.training.jobs import finished
from tests.training.toy import NET, toy_images

TOY = "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --batch_train 512 --data_path data".split()
SHORT: dict[str, Any] = {
    "init_ratio": 0.5,
    "add_end_epoch": 2,
    "rm_epoch_first": 3,
    "rm_epoch_second": 4,
    "rm_easy_ratio_first": 0.2,
    "rm_easy_ratio_second": 0.3,
}


def test_an_epoch_visits_the_images_of_pads_code() -> None:
    """Check the numbers of images that follow from the options in PAD's README, for CIFAR-10's 5,000 a class."""
    order = [torch.arange(5000), torch.arange(5000, 10000)]
    curriculum = Curriculum(order)
    first_and_last = {
        0: (0, 3749), 1: (0, 3811), 10: (0, 4374), 19: (0, 4936), 20: (0, 4999), 21: (0, 4999), 40: (0, 4999),
        41: (500, 4999), 60: (500, 4999), 61: (1000, 4999), 99: (1000, 4999),
    }  # fmt: skip
    for epoch, (first, last) in first_and_last.items():
        expected = torch.arange(first, last + 1)
        assert torch.equal(curriculum.between(*curriculum.shares(epoch)), torch.cat([expected, expected + 5000])), epoch
    of_a_class = Curriculum([torch.arange(1289)])  # 20 % are 257.8: rounded down, as in PAD's code
    assert torch.equal(of_a_class.between(*of_a_class.shares(61)), torch.arange(257, 1289))
    of_three = Curriculum([torch.arange(3)], init_ratio=0.4)  # 40 % are 1.2: one image is enough for epoch 0
    assert of_three.between(*of_three.shares(0)).tolist() == [0]
    without_a_rise = Curriculum(order, add_end_epoch=0)
    assert [without_a_rise.shares(epoch) for epoch in (0, 1)] == [(0.0, 1.0)] * 2
    of_one_epoch = Curriculum(order, init_ratio=0.5, add_end_epoch=1)
    assert [of_one_epoch.shares(epoch) for epoch in (0, 1)] == [(0.0, 0.5), (0.0, 1.0)]


@pytest.fixture
def images() -> RealImages:
    return toy_images()


def test_an_expert_is_that_of_a_plain_loop_on_part_of_the_images(images: RealImages) -> None:
    order = [torch.arange(29 - label, -1, -3) for label in range(3)]  # of the classes 2, 1 and 0
    order.reverse()
    training = ExpertTraining(6, 0.05, mom=0.9, batch_size=30, augment="none", curriculum=Curriculum(order, **SHORT))
    parameters, _ = finished(expert_job(images, NET, training, seed=3, index=1))
    module = reference_convnet(1, 3, 6, 4, 1)
    torch.nn.utils.vector_to_parameters(parameters[0].clone(), module.parameters())
    pixels, labels = images.train.batch(slice(None))
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    # of 10 images, whose order is that of falling indices
    of_each_class = [(0, 5), (0, 7), (0, 10), (0, 10), (2, 10), (3, 10)]
    for epoch, (first, last) in enumerate(of_each_class):
        rank = (29 - torch.arange(30)) // 3
        seen = (rank >= first) & (rank < last)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(pixels[seen]), labels[seen]).backward()
        optimizer.step()
        flat = torch.nn.utils.parameters_to_vector(module.parameters())
        assert_close(f"epoch {epoch + 1}", parameters[epoch + 1] - parameters[0], flat.detach() - parameters[0], 1e-4)


def test_the_steps_of_a_training_lead_to_its_rows(images: RealImages) -> None:
    order = [torch.arange(label, 30, 3) for label in range(3)]
    training = ExpertTraining(5, 0.05, mom=0.9, batch_size=7, curriculum=Curriculum(order, **SHORT))
    rows, _ = finished(expert_job(images, NET, training, seed=3, index=1))
    steps = list(itertools.islice(expert_steps(images, NET, training, seed=3, index=1), 24))
    after = list(itertools.accumulate([0, 3, 3, 5, 5, 4]))  # 15, 21, 30, 30 and 24 images in batches of 7
    assert torch.equal(torch.stack([steps[step] for step in after]), rows)


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def order_of_digits() -> list[Tensor]:
    labels = load("digits", data_path="data").train.labels
    return [(labels == label).nonzero()[:, 0].flip(0) for label in range(10)]


@pytest.mark.usefixtures("working_folder")
def test_experts_of_a_curriculum_and_others_are_not_mixed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    order = order_of_digits()
    torch.save(order, "order.pt")
    given = [*TOY, "--sort_method", "order.pt", "--add_end_epoch", "2"]
    assert cli.run(main, given) == 0
    store = TrajectoryStore("buffers/digits/ConvNetD1W4")
    recorded = store.metadata(0).hyperparameters
    assert recorded["add_end_epoch"] == 2
    digest = recorded["sort_method"]
    assert len(digest) == len("sha256:") + 64
    assert cli.run(main, [*given, "--num_experts", "3"]) == 0
    torch.save([members.flip(0) for members in order], "reversed.pt")
    mend = "; choose another --buffer_path, or train further ones by `python -m mtt_fast.experts` with the options of those there"
    for other, difference in (
        ([*given, "--sort_method", "reversed.pt"], f"trained with sort_method {digest}, not sha256:"),
        ([*given, "--rm_epoch_first", "30"], f"trained with rm_epoch_first 40, not 30{mend}"),
        (TOY, f"trained with sort_method {digest}, not None{mend}"),
    ):
        assert cli.run(main, [*other, "--num_experts", "4"]) == 2
        assert difference in capsys.readouterr().err
    matched = "--ipc 1 --syn_steps 2 --Iteration 1 --expert_epochs 1 --max_start_epoch 1 --num_eval 1 --epoch_eval_train 1".split()
    shared = [*TOY[:4], "--data_path", "data", "--num_experts", "3"]
    more = ["--num_experts", "5", "--batch_real", "512"]
    assert cli.run(distill, [*shared, *matched, "--train_epochs", "3", "--out", "run", *more]) == 2
    assert f"trained with sort_method {digest}, not None{mend}" in capsys.readouterr().err
    assert cli.run(distill, [*shared, *matched, "--train_epochs", "3", "--out", "run"]) == 0
    assert f"{store.folder}: trained on a curriculum of images, easy ones first (PAD)" in caplog.messages
    assert SyntheticDataset.load("run/synthetic.safetensors").recipe["sort_method"] == digest
    assert (
        cli.run(main, [*TOY[:4], "--buffer_path", "plain", "--num_experts", "1", "--train_epochs", "3", *TOY[8:]]) == 0
    )
    plain = TrajectoryStore("plain/digits/ConvNetD1W4")
    # as before there were curricula, so that distances that were measured then are found again
    assert plain.metadata(0).hyperparameters.keys() == recorded.keys() - SHORT.keys() - {"sort_method"}
    assert torch.equal(plain.read(0, 0), store.read(0, 0))
    assert not torch.equal(plain.read(0, 1), store.read(0, 1))


@pytest.mark.usefixtures("working_folder")
def test_an_order_that_does_not_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    order = order_of_digits()
    some = order[0].clone()
    some[0] = order[1][0]
    swapped = [order[1], order[0], *order[2:]]
    count, last = sum(map(len, order)), len(order[9])
    wrong: dict[str, tuple[Any, str]] = {
        "fewer": (order[:9], f"expected each of the {count} training images once, found {count - last} indices, of "),
        "twice": (
            [some, *order[1:]],
            f"expected each of the {count} training images once, found {count} indices, of {count - 1} ",
        ),
        "swapped": (swapped, "expected the images of class c in row c, found "),
        "fractions": ([*order[:9], order[9].float()], "expected a row of indices for each class"),
        "masks": ([*order[:9], order[9] > 0], "expected a row of indices for each class"),
        "number": (torch.tensor(3), "expected a row of indices for each class"),
        "empty": ([], "expected a row of indices for each class"),
        "words": ({"a": 1}, "expected a tensor, found a dictionary"),
    }
    for name, (value, problem) in wrong.items():
        torch.save(value, f"{name}.pt")
        assert cli.run(main, [*TOY, "--sort_method", f"{name}.pt"]) == 2
        assert f"error: {name}.pt: {problem}" in capsys.readouterr().err
    assert cli.run(main, [*TOY, "--sort_method", "none.pt"]) == 2
    assert "--sort_method none.pt: expected a file" in capsys.readouterr().err
    torch.save(order, "order.pt")
    given = [*TOY, "--sort_method", "order.pt"]
    for flags, problem in {
        (
            "--rm_epoch_first",
            "10",
        ): "--add_end_epoch 20, --rm_epoch_first 10, --rm_epoch_second 60: expected none to be less than the one before",
        (
            "--init_ratio",
            "0.001",
        ): "--init_ratio 0.001: expected an image of each class in epoch 0, found none of class 0",
        ("--init_ratio", "0"): "--init_ratio 0",
    }.items():
        assert cli.run(main, [*given, *flags]) == 2
        assert problem in capsys.readouterr().err
    assert cli.run(main, [*TOY, "--init_ratio", "0.5"]) == 2
    assert "--sort_method" in capsys.readouterr().err
    assert not Path("buffers").exists()


def test_a_rectangle_is_an_order_too(tmp_path: Path) -> None:
    rows = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    torch.save(rows, tmp_path / "order.pt")
    order = read_order(tmp_path / "order.pt")
    check_order(order, torch.tensor([0, 1, 0, 1]), "order.pt")
    assert [row.tolist() for row in order] == [[2, 0], [1, 3]]
    assert {row.dtype for row in order} == {torch.int64}
    with pytest.raises(InputError, match="found 4 of 4 in the row of another class"):
        check_order(order, torch.tensor([1, 0, 1, 0]), "order.pt")
    with pytest.raises(InputError, match="found 2 of 4 in the row of another class"):
        check_order(order, torch.tensor([0, 0, 1, 1]), "order.pt")
    for other in (-1, 4):  # beyond the images on either side
        with pytest.raises(InputError, match="each of the 4 training images once, found 4 indices, of 3 of them"):
            check_order([order[0], torch.tensor([1, other])], torch.tensor([0, 1, 0, 1]), "order.pt")
