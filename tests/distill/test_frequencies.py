"""Check FreD's frequencies against scipy's transform."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from mtt_fast import SyntheticDataset
from mtt_fast.commands import cli
from mtt_fast.data import ImageData, load
from mtt_fast.distill.command import main
from mtt_fast.distill.frequencies import filter_frequencies, most_varying_frequencies, with_frequencies
from mtt_fast.distill.gradients import gradients_to_apply
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.recipes import recipe_options
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.checkpoint import State, load_checkpoint
from mtt_fast.training.images import real_images
from mtt_fast.training.subsets import random_subset

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 3 --max_start_epoch 1 --expert_epochs 1 --ipc 4 "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 128 --save_seconds 0 "
    "--msz_per_channel 16 --lr_img 1e4"
).split()


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    monkeypatch.chdir(tmp_path)
    return load("digits", data_path="data", progress=False)


def frequencies_of(images: Tensor) -> np.ndarray:
    """Return the frequencies of FreD's code, scipy's transform without a scale."""
    spectra: np.ndarray = dctn(images.double().numpy(), type=2, axes=(-2, -1))
    return spectra


def images_of(frequencies: np.ndarray) -> Tensor:
    return torch.from_numpy(idctn(frequencies, type=2, axes=(-2, -1)))


def expected_mask(images: Tensor, ipc: int, count: int) -> np.ndarray:
    """Return the mask (classes, H, W) of FreD's code: the largest entries of the diagonal of the covariance."""
    masks = []
    for of_class in images.split(ipc):
        flat = frequencies_of(of_class).mean(1).reshape(ipc, -1)
        mask = np.zeros(flat.shape[1], dtype=bool)
        mask[np.argsort(np.diag(np.cov(flat.T)))[::-1][:count]] = True
        masks.append(mask.reshape(images.shape[-2:]))
    return np.stack(masks)


def random_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 400, 1 << 20])
@pytest.mark.parametrize(("ipc", "channels", "height", "width"), [(3, 3, 8, 8), (2, 1, 7, 12), (5, 2, 1, 6)])
def test_frequencies_are_those_of_the_public_code(
    ipc: int, channels: int, height: int, width: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtt_fast.distill.frequencies._BLOCK", block)
    images = random_images(2 * ipc, channels, height, width)
    for count in (1, 5, height * width):
        kept = most_varying_frequencies(images, ipc, count)
        expected = expected_mask(images, ipc, count)
        np.testing.assert_array_equal(kept.numpy(), expected)
        filtered = images_of(frequencies_of(images) * expected.repeat(ipc, 0)[:, None])
        torch.testing.assert_close(with_frequencies(images, kept), filtered)
    torch.testing.assert_close(with_frequencies(images, torch.ones(2, height, width, dtype=torch.bool)), images)


def state_of(images: Tensor, frequencies: Tensor | None) -> State:
    return State(
        0, 1, images, torch.zeros(len(images)), torch.ones(()), torch.zeros_like(images), torch.zeros(()),
        frequencies=frequencies,
    )  # fmt: skip


def test_a_step_on_filtered_gradients_is_a_step_on_the_frequencies() -> None:
    """Compare with autograd through the inverse transform, as a matrix made of the images of single frequencies."""
    images = random_images(6, 2, 4, 6)
    kept = most_varying_frequencies(images, 3, 7)
    inverse = images_of(np.eye(24).reshape(24, 4, 6)).flatten(1)
    mask = kept.repeat_interleave(3, 0)[:, None].flatten(2)
    frequencies = torch.from_numpy(frequencies_of(images)).flatten(2).requires_grad_()
    learned, rate = random_images(6, 2, 24).cos(), torch.randn(())
    optimizer = torch.optim.SGD([frequencies], 3.0, momentum=0.5)
    pixels, velocity = with_frequencies(images, kept), torch.zeros_like(images)
    for _ in range(3):
        optimizer.zero_grad()
        (((frequencies * mask) @ inverse - learned) ** 3).sum().backward()
        optimizer.step()
        gradient = 3 * (pixels - learned.view_as(pixels)) ** 2
        filtered, untouched = filter_frequencies(state_of(pixels, kept), [gradient, rate])
        assert untouched is rate
        velocity = 0.5 * velocity + filtered
        pixels = pixels - 3.0 * velocity
        torch.testing.assert_close(pixels.flatten(2), ((frequencies * mask) @ inverse).detach())
    assert filter_frequencies(state_of(pixels, None), [pixels, rate]) == [pixels, rate]


def test_a_filter_has_float64_copies_of_one_block_of_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 1 << 14
    monkeypatch.setattr("mtt_fast.distill.frequencies._BLOCK", block)
    images = torch.randn(1000, 3, 16, 16)
    state = state_of(images, torch.ones(10, 16, 16, dtype=torch.bool))
    with CountLiveBytes() as count:
        filter_frequencies(state, [images])
    assert images.nbytes < count.peak < images.nbytes + 5 * 8 * block


def test_weighed_gradients_are_filtered_too() -> None:
    """Weigh pixels by Grad-CAM maps (EDF): the update must not leave the kept frequencies."""
    images = random_images(6, 2, 4, 6)
    state = state_of(images, most_varying_frequencies(images, 3, 7))
    state.iteration, state.pixel_weights = 1, random_images(6, 1, 4, 6).abs()  # made by an iteration before
    run: Any = SimpleNamespace(options=DistillOptions(ipc=3), cam="any")
    gradient, rate = images.cos(), torch.randn(())
    applied = gradients_to_apply(run, state, [gradient, rate])
    expected = filter_frequencies(state, [gradient * state.pixel_weights, rate])
    assert applied is not None
    assert torch.equal(applied[0], expected[0])
    assert gradients_to_apply(run, state, None) is None


def test_a_run_keeps_to_its_frequencies_when_it_goes_on(digits: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert cli.run(main, [*TOY, "--ema_decay", "0.5", "--out", "whole"]) == 0
    assert (
        "images: 16 of 64 frequencies in each channel, so 4 per class have as many numbers as 1 of all pixels; "
        "--lr_img 10000 moves them about as far as 39.1 moves pixels" in caplog.text
    )
    assert cli.run(main, [*TOY, "--ema_decay", "0.5", "--Iteration", "2", "--out", "halves"]) == 0
    assert cli.run(main, "--resume --out halves --Iteration 4".split()) == 0
    state = load_checkpoint(Path("halves"), torch.device("cpu"))
    assert state is not None
    assert state.frequencies is not None
    first = random_subset(real_images(digits, torch.device("cpu"), zca=False), 4, generator_for(0, "initial images"))
    assert np.array_equal(state.frequencies.numpy(), expected_mask(first.pixels, 4, 16))
    others = ~state.frequencies.numpy().repeat(4, 0)[:, None]
    for name in ("synthetic", "ema"):
        whole, halves = (SyntheticDataset.load(f"{run}/{name}.safetensors").images for run in ("whole", "halves"))
        assert torch.equal(whole, halves)
        assert np.abs(frequencies_of(whole)[others]).max() < 1e-4
    assert state.images_velocity is not None
    assert bool(state.images_velocity.any())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pix_init noise", "--msz_per_channel 16, --pix_init noise: expected real images"),
        ("--distilled_share 0.5", "--msz_per_channel 16, --distilled_share 0.5: expected one of them, found both"),
        ("--ipc 1", "--msz_per_channel 16, --ipc 1: expected at least two images per class"),
        ("--texture", "--texture, --msz_per_channel: expected one of them"),
        (
            "--msz_per_channel 65",
            "--msz_per_channel 65: expected at most the 64 frequencies that a channel of 8×8 pixels",
        ),
        ("--msz_per_channel 0", "--msz_per_channel 0: expected at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, [*TOY, *words.split(), "--out", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_the_setting_of_the_public_code() -> None:
    options: Any = DistillOptions(**recipe_options("fred-cifar10-ipc1"))
    assert (options.ipc, options.msz_per_channel, options.lr_img, options.Iteration) == (32 * 32 // 64, 64, 1e8, 15000)
    assert (options.syn_steps, options.expert_epochs, options.max_start_epoch, options.batch_syn) == (50, 2, 5, None)
    assert (options.lr_lr, options.lr_teacher, options.zca, options.model) == (1e-7, 0.01, False, "ConvNet")
