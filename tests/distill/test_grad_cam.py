"""Check EDF's weights of the pixels' gradients: Grad-CAM maps against hooks and a closed form, and whole runs."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtt_fast import ConvNet, FlatModule
from mtt_fast.commands import cli
from mtt_fast.data import load
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.cam_network import CamNetwork, prepare_cam_network, weigh_gradients
from mtt_fast.distill.checks import check_options_fit
from mtt_fast.distill.command import main
from mtt_fast.distill.grad_cam import grad_cam, pixel_weights
from mtt_fast.distill.gradients import finish_gradients
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students import choice
from mtt_fast.errors import InputError
from mtt_fast.experts.command import main as experts
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.protocol import Network
from mtt_fast.networks.resnets import resnet
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.testing import reference_convnet
from mtt_fast.training.images import real_images

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 128 --lr_img 10 --save_seconds 0"
).split()
MAPS = "--cam_model ConvNetD2W4 --cam_interval 3 --cam_beta 2".split()


def resized(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `small` (h, w) at another size: linear between the centres of its pixels, constant beyond them."""
    at = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in ((height, small.shape[0]), (width, small.shape[1]))]
    rows = np.stack([np.interp(at[1], np.arange(small.shape[1]), row) for row in small])
    return np.stack([np.interp(at[0], np.arange(small.shape[0]), column) for column in rows.T]).T


def expected_map(module: nn.Module, layer: nn.Module, image: Tensor, label: int) -> np.ndarray:
    """Return the Grad-CAM map (H, W) of one image, from the output of `layer` and a backward hook on it."""
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        kept["features"] = output
        output.register_hook(lambda gradient: kept.update(gradient=gradient))

    handle = layer.register_forward_hook(keep)
    module(image[None])[0, label].backward()
    handle.remove()
    weights = kept["gradient"][0].mean(dim=(1, 2)).numpy()
    total = sum(weight * channel for weight, channel in zip(weights, kept["features"][0].detach().numpy(), strict=True))
    grown = resized(np.maximum(total, 0), *image.shape[1:])
    scaled: np.ndarray = (grown - grown.min()) / max(np.ptp(grown), 1e-300)  # 0 for an image without a positive part
    return scaled


@pytest.mark.parametrize("name", ["resnet", "convnet", "max pooling"])
def test_maps_are_those_of_the_last_features_before_a_pooling(name: str) -> None:
    torch.manual_seed(0)
    shape = (3, 16, 24) if name == "resnet" else (3, 16, 16)
    module: nn.Module
    network: Network
    if name == "resnet":
        module, network = resnet(shape, 4).double(), network_by_name("ResNet18", shape, 4)
        layer = module.get_submodule("layer4")
    elif name == "max pooling":
        layer = nn.Conv2d(3, 5, 3)
        module = nn.Sequential(layer, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 49, 4)).double()
        network = FlatModule(module)
    else:
        module = reference_convnet(3, 4, 16, 8, 2).double()
        network = ConvNet(3, 4, 16, width=8, depth=2)
        layer = [part for part in module.modules() if isinstance(part, nn.ReLU)][-1]
    theta = nn.utils.parameters_to_vector(module.parameters()).detach()
    images, labels = torch.randn(5, *shape, dtype=torch.float64), torch.tensor([1, 3, 0, 3, 2])
    maps = grad_cam(network, theta, images, labels)
    assert maps.shape == (5, 1, *shape[1:])
    assert bool(maps.any())
    assert not images.requires_grad
    for image, label, actual in zip(images, labels, maps, strict=True):
        np.testing.assert_allclose(actual[0].numpy(), expected_map(module, layer, image, int(label)), atol=1e-9)


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class ByName(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(input=images, kernel_size=4)


@pytest.mark.parametrize(
    "pooling", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.LPPool2d(2, 4), Mean(), ByName()], ids=repr
)
def test_any_pooling_may_be_the_last(pooling: nn.Module) -> None:
    torch.manual_seed(0)
    first, layer = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    module = nn.Sequential(first, nn.MaxPool2d(2), layer, pooling, nn.Flatten(), nn.Linear(4, 3)).double()
    network, images = FlatModule(module), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    maps = grad_cam(network, network.init(), images, labels)
    assert bool(maps.any())
    for image, label, actual in zip(images, labels, maps, strict=True):
        np.testing.assert_allclose(actual[0].numpy(), expected_map(module, layer, image, int(label)), atol=1e-9)


def brightness() -> FlatModule:
    """Return a network whose logits are the image's mean and its negative, so that maps are known."""
    classifier = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return FlatModule(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), classifier))


def test_weights_follow_from_a_known_map() -> None:
    network, image = brightness(), torch.arange(-4, 12).view(1, 1, 4, 4) / 4
    images, classes = torch.cat([image, image, image.clamp(max=-0.25)]), torch.tensor([0, 1, 0])
    light = image[0, 0].clamp(min=0) / 2.75
    dark = (-image[0, 0]).clamp(min=0)
    maps = [light, dark, torch.zeros(4, 4)]  # the third image says nothing for its class
    for each in (images, images.repeat(3, 1, 1, 1)):  # the latter are more than are computed together
        weights = pixel_weights(network, network.init(), each, classes.repeat(len(each) // 3), 1.5)
        for number, actual in enumerate(weights):
            known = maps[number % 3]
            torch.testing.assert_close(actual[0], torch.where(known < known.mean(), 1.0, 1.5 + known))


def test_weights_are_made_anew_after_an_interval() -> None:
    network = brightness()
    cam = CamNetwork(network, network.init(), "")
    options = DistillOptions(ipc=1, cam_model="any", cam_interval=3, cam_beta=2.0)
    images = torch.arange(-4, 12).view(1, 1, 4, 4).repeat(2, 1, 1, 1) / 4
    state = State(0, 1, images, torch.tensor([0, 1]), torch.tensor(0.01), torch.zeros_like(images), torch.tensor(0.0))
    of_images, of_lr = torch.randn_like(images), torch.tensor(3.0)

    def weights() -> Tensor:
        gradients = weigh_gradients(options, cam, state, [of_images, of_lr])
        assert gradients is not None
        assert gradients[1] is of_lr
        assert state.pixel_weights is not None
        torch.testing.assert_close(gradients[0], of_images * state.pixel_weights)
        return state.pixel_weights

    first = weights()
    torch.testing.assert_close(first, pixel_weights(network, cam.theta, images, torch.tensor([0, 1]), 2.0))
    state.images = images.flip(2)
    for state.iteration in (1, 2):
        assert weights() is first
    state.iteration = 3
    assert weigh_gradients(options, cam, state, None) is None
    state.iteration = 4
    assert not torch.equal(weights(), first)  # an iteration without finite gradients has made them, too
    assert weigh_gradients(options, None, state, [of_images]) == [of_images]


def test_an_image_is_weighed_for_the_class_of_its_place_whatever_its_learned_label() -> None:
    network, images = brightness(), torch.randn(4, 1, 4, 4)
    logits = torch.tensor([[0.0, 1.0]]).repeat(4, 1)
    state = State(0, 1, images, logits, torch.tensor(0.01), torch.zeros_like(images), torch.tensor(0.0))
    options = DistillOptions(ipc=2, cam_model="any", cam_beta=2.0)
    weigh_gradients(options, CamNetwork(network, network.init(), ""), state, None)
    assert state.pixel_weights is not None
    expected = pixel_weights(network, network.init(), images, torch.tensor([0, 0, 1, 1]), 2.0)
    torch.testing.assert_close(state.pixel_weights, expected)


def state_in(folder: str) -> dict[str, Tensor]:
    return load_tensors(Path(folder, "checkpoint.safetensors"))[0]


def test_a_run_multiplies_the_gradient_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out, flags in (("plain", []), ("maps", MAPS)):
        assert cli.run(main, [*TOY, "--Iteration", "1", "--out", out, *flags]) == 0
    plain, weighted = state_in("plain"), state_in("maps")
    weights = weighted["pixel_weights"]
    assert weights.shape == (10, 1, 8, 8)
    assert weights.min() == 1
    assert weights.max() == 3
    torch.testing.assert_close(weighted["images_velocity"], weights * plain["images_velocity"])
    assert torch.equal(weighted["lr"], plain["lr"])


def test_truncated_gradients_are_compared_as_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    computed: list[Tensor] = []

    def finished(*arguments: Any) -> Any:
        result = finish_gradients(*arguments)
        assert result.gradients is not None
        computed.append(result.gradients[0])
        return result

    monkeypatch.setattr("mtt_fast.distill.gradients.finish_gradients", finished)
    assert cli.run(main, [*TOY, *MAPS, *"--gradient truncated --Iteration 0 --out run".split()]) == 0
    truncated, exact = ((each * state_in("run")["pixel_weights"]).double().flatten() for each in computed)
    cosines = [record["cosine"] for record in read_records(Path("run/metrics.jsonl")) if record["kind"] == "gradient"]
    assert cosines == [pytest.approx(float(F.cosine_similarity(truncated, exact, dim=0)), abs=1e-9)]


def test_a_run_goes_on_with_its_weights_and_the_network_that_made_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    assert cli.run(main, [*TOY, *MAPS, "--out", "whole", "--Iteration", "5"]) == 0
    assert cli.run(main, [*TOY, *MAPS, "--out", "parts", "--Iteration", "2"]) == 0
    assert cli.run(main, ["--out", "parts", "--resume", "--Iteration", "5"]) == 0
    whole, parts = state_in("whole"), state_in("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    folder = Path("buffers/digits/ConvNetD2W4")
    shutil.move(folder, "own")
    go_on = ["--out", "parts", "--resume", "--Iteration", "6"]
    told = f"{folder}: expected the expert of --cam_model with which the run began, found"
    for flags in ([], ["--dry-run"]):
        assert cli.run(main, [*go_on, *flags]) == 2
        assert f"{told} none; restore it, or choose another --out" in capsys.readouterr().err
    trained = "--dataset digits --model ConvNetD2W4 --num_experts 1 --train_epochs 3 --seed 1".split()
    assert cli.run(experts, trained) == 0
    assert cli.run(main, go_on) == 2
    assert f"{told} another" in capsys.readouterr().err
    shutil.copy("own/expert_0000.safetensors", folder / "expert_0001.safetensors")  # the other one was added before it
    assert cli.run(main, go_on) == 0
    assert f"Grad-CAM maps by {folder}/expert_0001.safetensors" in caplog.text


def test_the_network_is_trained_as_the_experts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    trained = "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --lr_teacher 0.02 --seed 4".split()
    assert cli.run(experts, trained) == 0
    plain = [flag for flag in TOY if flag not in ("--batch_real", "128", "--train_epochs", "3")]
    assert cli.run(main, [*plain, *MAPS, "--seed", "4", "--Iteration", "0", "--out", "run"]) == 0
    with_experts, with_network = (TrajectoryStore(f"buffers/digits/{name}") for name in ("ConvNetD1W4", "ConvNetD2W4"))
    of_experts, of_maps = with_experts.metadata(0), with_network.metadata(0)
    assert of_maps.hyperparameters == of_experts.hyperparameters
    assert of_maps.seed == of_experts.seed == 4
    assert len(with_network) == 1  # no more than are used
    assert f"Grad-CAM maps by {with_network.path(0)} after 3 epochs" in caplog.text
    assert "digits/ConvNetD2W4: used as they are" not in caplog.text
    others = "--Iteration 0 --model ConvNetD1W5 --train_epochs 4 --out other".split()
    assert cli.run(main, [*TOY, *MAPS, *others]) == 0
    told = "digits/ConvNetD2W4: used as they are, trained with --train_epochs 3 (not 4), --expert_lr 0.02 (not 0.01)"
    assert told in caplog.text


def test_the_network_may_be_that_of_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*TOY, "--num_interpolation", "2", "--cam_model", "ConvNetD1W4", "--out", "run"]
    assert cli.run(main, [*flags, "--dry-run"]) == 0
    assert "maps      by ConvNetD1W4, the first expert, every 100 iterations" in capsys.readouterr().out
    assert cli.run(main, [*TOY, "--num_interpolation", "2", "--Iteration", "0", "--out", "first"]) == 0
    folder = Path("buffers/digits/ConvNetD1W4")
    for expert in folder.glob("*.safetensors"):
        expert.unlink()  # their waypoints are enough for a run, and no expert is trained beside these
    assert cli.run(main, [*flags, "--seed", "5", "--Iteration", "1"]) == 0
    assert not list(folder.glob("*.safetensors"))
    assert cli.run(main, ["--out", "run", "--resume", "--Iteration", "2"]) == 0


def test_what_the_network_cannot_be_is_known_before_the_experts_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "has_fused_kernels", lambda device: True)
    info, gpu = dataset_info("ImageNet", "imagenette", 32), torch.device("cuda")
    options = DistillOptions(dataset="ImageNet", ipc=1, precision="fp16", cam_model="ConvNetD2W4")
    check_options_fit(options, info, options.network(info), gpu)
    options = dataclasses.replace(options, cam_model="ResNet18")
    with pytest.raises(InputError, match="`precision` fp16: only the fused step of ConvNet supports it"):
        check_options_fit(options, info, options.network(info), gpu)

    monkeypatch.chdir(tmp_path)
    buffers = Path("buffers/digits/ConvNetD2W4")
    buffers.mkdir(parents=True)
    (buffers / "replay_buffer_0.pt").write_bytes(b"of the public code")
    assert cli.run(main, [*TOY, *MAPS, "--out", "run"]) == 2
    assert f"{buffers}: expected experts (expert_0000.safetensors, …), found buffers" in capsys.readouterr().err
    shutil.rmtree(buffers)
    buffers.touch()
    assert cli.run(main, [*TOY, *MAPS, "--out", "run"]) == 2
    assert (
        f"{buffers}: expected a folder to write in, found a file; choose another --buffer_path"
        in capsys.readouterr().err
    )
    assert not Path("buffers/digits/ConvNetD1W4").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cam_model Foo", "--cam_model Foo: expected ConvNet, with depth"),
        ("--cam_model ConvNetD0MP", "--cam_model ConvNetD0MP: expected a depth"),
        (
            "--cam_model MLP",
            "--cam_model: expected a network with a pooling layer, whose input is mapped, found none; use",
        ),
        ("--cam_model ResNet18", "use larger images, or another --model, --models, --eval_mode or --cam_model"),
        ("--cam_model ConvNetBN", "--cam_model ConvNetBN: expected a network without batch norm"),
        ("--cam_model ConvNet --texture", "--texture, --cam_model: expected one of them, found both"),
        ("--cam_interval 3", "--cam_interval 3: has no effect without --cam_model"),
    ],
)
def test_networks_that_make_no_maps_are_refused(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, [*TOY, *flags.split(), "--out", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_network_of_other_images_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = "--dataset digits --model ConvNetD2W4 --num_experts 1 --train_epochs 1 --zca --buffer_path other".split()
    assert cli.run(experts, trained) == 0
    shutil.move("other/digits_ZCA", "other/digits")
    assert cli.run(main, [*TOY, *MAPS, "--buffer_path", "other", "--out", "run"]) == 2
    assert "other/digits/ConvNetD2W4/expert_0000.safetensors: whitened in another way" in capsys.readouterr().err
    assert not Path("other/digits/ConvNetD1W4").exists()


def test_the_network_of_other_images_of_the_same_classes_is_used_on_purpose_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    assert cli.run(experts, "--dataset digits --model ConvNetD2W4 --num_experts 1 --train_epochs 2".split()) == 0
    other = dataclasses.replace(load("digits", data_path="data", progress=False), fingerprint="another")
    real, options = real_images(other, torch.device("cpu"), zca=False), DistillOptions(cam_model="ConvNetD2W4")
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: made from other images: .* give `other_data`"):
        prepare_cam_network(options, real)
    cam = prepare_cam_network(dataclasses.replace(options, other_data=True), real)
    assert cam is not None
    assert torch.equal(cam.theta, TrajectoryStore("buffers/digits/ConvNetD2W4").read(0, 2))
    assert "buffers/digits/ConvNetD2W4: made from other images" in caplog.text


def test_the_network_of_whitened_images_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = real_images(load("digits", data_path="data", progress=False), torch.device("cpu"), zca=True)
    options = DistillOptions(cam_model="ConvNetD2W4", zca=True, train_epochs=1)
    first, again = (prepare_cam_network(options, real) for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.digest == again.digest == TrajectoryStore("buffers/digits_ZCA/ConvNetD2W4").digest(0)


def test_the_dry_run_counts_the_network_that_makes_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, [*TOY, *MAPS, "--dry-run"]) == 0
    assert "maps      by ConvNetD2W4, to be trained first, every 3 iterations" in capsys.readouterr().out
    assert cli.run(experts, "--dataset digits --model ConvNetD2W4 --num_experts 1 --train_epochs 1".split()) == 0
    capsys.readouterr()
    assert cli.run(main, [*TOY, *MAPS, "--dry-run"]) == 0
    assert "maps      by ConvNetD2W4, trained, every 3 iterations" in capsys.readouterr().out
    assert cli.run(main, [*TOY, "--dry-run"]) == 0
    assert "maps" not in capsys.readouterr().out
