"""Test images and soft labels that experts choose: the first images of a run, and the random ones beside them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.initial import initial_images, predicted_correctly
from mtt_fast.distill.labels import has_soft_baseline
from mtt_fast.distill.options import DistillOptions
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.protocol import Network
from mtt_fast.testing import module_function, reference_convnet
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import Images
from tests.distill.command_runs import TOY_OF_THREE as TOY
from tests.distill.command_runs import run, summary_of


class Lookup:
    """A network whose parameters are a table: the class that it gives to the image of value v is theta[v]."""

    num_parameters = 12
    mixes_samples = False

    def __call__(self, theta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(theta[images.flatten().long()].long(), 3).float()


def test_images_are_those_that_the_first_expert_then_the_next_gets_right() -> None:
    real = Images(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12) % 3)
    members = [torch.tensor(rows) for rows in ([9, 0, 6, 3], [1, 4, 7, 10], [11, 8, 5, 2])]
    first, second = torch.full((12,), -1.0).clamp(min=0), (torch.arange(12) % 3).float()
    second[[5, 2, 8]] = 0
    network: Network = Lookup()
    # the first says class 0 to all; the second is right but for three images of class 2
    chosen, wrong = predicted_correctly(network, iter([first, second]), real, members, 2)
    assert [rows.tolist() for rows in chosen] == [[9, 0], [1, 4], [11, 8]]
    assert wrong == 1
    chosen, wrong = predicted_correctly(network, iter([second, first]), real, members, 1)
    assert [rows.tolist() for rows in chosen] == [[9], [1], [11]]
    assert wrong == 0


def test_an_expert_adds_only_as_many_images_as_are_missing() -> None:
    """Check it where the first expert gets one image of each class right, and the second one all the others."""
    real = Images(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12) % 3)
    members = [torch.arange(label, 12, 3) for label in range(3)]
    second = (torch.arange(12) % 3).float()
    first = (second + 1) % 3
    first[3:6] = second[3:6]
    chosen, wrong = predicted_correctly(Lookup(), iter([first, second]), real, members, 3)
    assert [rows.tolist() for rows in chosen] == [[3, 0, 6], [4, 1, 7], [5, 2, 8]]
    assert wrong == 0


def test_a_run_starts_from_images_that_an_expert_gets_right(experts: list[str], tmp_path: Path) -> None:
    flags = ["--pix_init", "samples_predicted_correctly", "--ipc", "7", "--Iteration", "0"]
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), *flags) == 0
    images = SyntheticDataset.load(tmp_path / "run" / "synthetic.safetensors").images
    store = TrajectoryStore(Path(experts[-1]) / "digits" / "ConvNetD1W4")
    network = module_function(reference_convnet(1, 10, 8, 4, 1))
    said = network(store.read(0, 6), images).argmax(dim=1)
    assert said.tolist() == torch.arange(10).repeat_interleave(7).tolist()
    assert run(*TOY, *experts, "--out", str(tmp_path / "random"), "--ipc", "7", "--Iteration", "0") == 0
    others = SyntheticDataset.load(tmp_path / "random" / "synthetic.safetensors").images
    assert network(store.read(0, 6), others).argmax(dim=1).tolist() != said.tolist()


@pytest.mark.parametrize("flags", ["--lr_y 1 --label_init experts --max_experts 2", "--teacher_label", ""])
def test_soft_labels_are_compared_with_random_images_that_experts_label(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    sets: dict[str, Images] = {}

    def evaluated(_: Network, train: Callable[..., Images], *__: Any, name: str, **___: Any) -> Accuracy:
        sets[name] = train(torch.Generator().manual_seed(5))
        return Accuracy((0.3, 0.5) if name == "labelled by experts" else (0.2, 0.2))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", evaluated)
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), *flags.split()) == 0
    summary = summary_of(tmp_path / "run")
    told = ", random real images 20.00 % ± 0.00, with labels of the experts 40.00 % ± 14.14, experts"
    if not flags:
        assert "labelled by experts" not in sets
        assert "random_real_images_labelled_by_experts" not in summary["accuracy"]
        assert "with labels of the experts" not in summary["text"]
        return
    labelled, plain = sets["labelled by experts"], sets["random real images"]
    assert torch.equal(labelled.pixels, plain.pixels)
    store = TrajectoryStore(next(Path(experts[-1]).glob("*/*")))
    function = module_function(reference_convnet(1, 10, 8, 4, 1))
    asked = range(2 if "--max_experts" in flags else 3)
    predictions = [function(store.read(expert, 6), plain.pixels).softmax(1) for expert in asked]
    torch.testing.assert_close(labelled.labels, torch.stack(predictions).mean(0), rtol=1e-4, atol=1e-5)
    found = summary["accuracy"]["random_real_images_labelled_by_experts"]
    assert found == {"mean": 0.4, "std": pytest.approx(0.2 / 2**0.5), "n": 2, "lr": 0.01}
    assert told in summary["text"]
    before = len(sets)
    sets.clear()
    (tmp_path / "run" / "summary.json").unlink()
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), "--resume") == 0
    assert not sets, "an earlier process evaluated all"
    assert summary_of(tmp_path / "run")["text"] == summary["text"]
    assert before == 3


def test_a_network_of_batch_statistics_labels_nothing() -> None:
    options = DistillOptions(dataset="digits", lr_y=1.0)
    plain, batch_norm = (
        network_by_name(name, dataset_info("digits").image_shape, 10) for name in ("ConvNetD1", "ConvNetD1BN")
    )
    assert has_soft_baseline(options, plain)
    assert not has_soft_baseline(options, batch_norm)
    assert not has_soft_baseline(dataclasses.replace(options, lr_y=None), plain)


def test_a_class_with_too_few_of_them_is_told(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--pix_init", "samples_predicted_correctly", "--ipc", "140", "--Iteration", "0", "--num_eval", "1"]
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), *flags) == 0
    told = [record.message for record in caplog.records if "no expert gets enough images" in record.message]
    assert len(told) == 1
    images = SyntheticDataset.load(tmp_path / "run" / "synthetic.safetensors").images
    assert len(images.flatten(1).unique(dim=0)) == 1400  # no image twice


@pytest.mark.parametrize(
    "flags",
    ["--lr_y 1 --label_init experts --pix_init samples_predicted_correctly --ipc 140 --Iteration 0", "--teacher_label"],
)
def test_a_run_of_few_experts_does_not_look_at_the_others(experts: list[str], tmp_path: Path, flags: str) -> None:
    folder = Path(experts[-1]) / "digits" / "ConvNetD1W4"
    alone = tmp_path / "buffers" / "digits" / "ConvNetD1W4"
    alone.mkdir(parents=True)
    shutil.copy(folder / "expert_0000.safetensors", alone)
    words = [*TOY, *experts, "--num_eval", "1", *flags.split()]
    assert run(*words, "--max_experts", "1", "--out", str(tmp_path / "few")) == 0
    only = ["--num_experts", "1", "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "only")]
    assert run(*words, *only) == 0
    few, one = (SyntheticDataset.load(tmp_path / name / "synthetic.safetensors") for name in ("few", "only"))
    assert torch.equal(few.images, one.images)
    assert torch.equal(few.labels, one.labels)


def test_the_first_images_of_a_run_are_made_once_for_all_pictures(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return initial_images(*arguments)

    monkeypatch.setattr("mtt_fast.distill.command.initial_images", counted)
    assert run(*TOY, *experts, "--num_eval", "1", "--out", str(tmp_path)) == 0
    assert len(list((tmp_path / "history").iterdir())) == 3
    assert len(asked) == 1


@pytest.mark.parametrize(
    "flags",
    ["--pix_init samples_predicted_correctly", "--lr_y 1 --label_init experts", "--teacher_label"],
)
def test_experts_with_batch_norm_are_not_asked_about_images(
    experts: list[str], flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refuse such experts: trajectories hold no running statistics, and those of a batch of one class mean nothing."""
    arguments = [*TOY, *experts, "--model", "ConvNetD1W4BN", *flags.split(), "--out", str(tmp_path / "run")]
    assert run(*arguments) == 2
    option = flags.removeprefix("--lr_y 1 ")
    assert f"--model ConvNetD1W4BN, {option}: expected a network without batch norm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
