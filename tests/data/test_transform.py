"""Test the images that networks see: normalised or whitened images, and pictures again."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtt_fast.data import ImageData, Normalisation, from_tensors, load, transform_for
from mtt_fast.data.whitening import Whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.tensor_files import load_tensors


def tensors(n: int = 30, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, 4, 4), dtype=torch.uint8, generator=generator), torch.arange(n) % 3


@pytest.fixture
def data() -> ImageData:
    return from_tensors(tensors(), tensors(6, seed=1))


@pytest.fixture
def digits(tmp_path: Path) -> ImageData:
    return load("digits", data_path=tmp_path, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_normalisation_is_the_formula(dtype: torch.dtype) -> None:
    images = torch.rand(5, 2, 3, 4).to(dtype)
    seen = Normalisation((0.5, 0.25), (0.5, 2.0)).apply(images)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen[:, 0], (images[:, 0] - 0.5) / 0.5)
    torch.testing.assert_close(seen[:, 1], (images[:, 1] - 0.25) / 2)
    torch.testing.assert_close(
        Normalisation((0.5, 0.25), (0.5, 2.0)).invert(seen),
        images,
        rtol=1e-3,
        atol=1e-3 if dtype == torch.float16 else 1e-6,
    )


def test_training_images_are_centred(data: ImageData) -> None:
    transform = transform_for(data, zca=False)
    assert isinstance(transform, Normalisation)
    seen = transform.apply(data.train.images.double() / 255)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3).double())
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3).double())


def test_bytes_and_other_channels_are_refused(data: ImageData) -> None:
    transform = transform_for(data, zca=False)
    for images in (data.train.images, torch.rand(2, 1, 4, 4)):
        for function in (transform.apply, transform.invert):
            with pytest.raises(InputError, match=r"expected floating point .* with 3 channels"):
                function(images)


def test_whitening_is_fitted_on_images_in_0_1(data: ImageData) -> None:
    transform = transform_for(data, zca=True)
    assert isinstance(transform, Whitening)
    torch.testing.assert_close(transform.matrix, Whitening.fit(data.train.images.float() / 255, 0.1).matrix)
    torch.testing.assert_close(transform.mean, data.train.images.float().flatten(1).mean(0) / 255)


def test_whitening_is_kept_beside_the_data(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    first = transform_for(digits, zca=True)
    assert digits.path
    assert digits.path.with_name("digits.zca.safetensors").is_file()
    monkeypatch.setattr(Whitening, "fit_bytes", None)
    again = transform_for(digits, zca=True)
    assert isinstance(first, Whitening)
    assert isinstance(again, Whitening)
    assert torch.equal(first.matrix, again.matrix)
    images = digits.test.images[:9].float() / 255
    torch.testing.assert_close(again.invert(again.apply(images)), images, rtol=1e-4, atol=1e-4)


def test_whitening_of_other_data_or_broken_is_fitted_again(digits: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    first = transform_for(digits, zca=True)
    assert not caplog.messages  # nothing is there, which is no fault
    assert digits.path
    kept = digits.path.with_name("digits.zca.safetensors")
    half = replace(digits, train=replace(digits.train, images=digits.train.images // 2), fingerprint="other")
    with caplog.at_level(logging.WARNING):
        other = transform_for(half, zca=True)
    assert "fitted on other data" in caplog.text
    assert isinstance(first, Whitening)
    assert isinstance(other, Whitening)
    assert not torch.allclose(first.mean, other.mean)
    kept.write_bytes(kept.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        again = transform_for(half, zca=True)
    assert "truncated" in caplog.text
    assert isinstance(again, Whitening)
    assert torch.equal(again.matrix, other.matrix)
    assert torch.equal(Whitening.load(kept).matrix, other.matrix)


def test_a_whitening_with_another_eps_is_fitted_again(digits: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    assert digits.path
    kept = digits.path.with_name("digits.zca.safetensors")
    first = transform_for(digits, zca=True)
    assert isinstance(first, Whitening)
    _, metadata = load_tensors(kept)
    other = Whitening.fit_bytes(digits.train.images, torch.device("cpu"), eps=0.01)
    other.save(kept, {name: metadata[name] for name in ("format", "fingerprint")} | {"eps": "0.01"})
    with caplog.at_level(logging.WARNING):
        again = transform_for(digits, zca=True)
    assert "fitting it again" in caplog.text
    assert isinstance(again, Whitening)
    assert torch.equal(again.matrix, first.matrix)


def test_a_whitening_that_cannot_be_kept_does_not_stop_the_run(
    digits: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        transform = transform_for(replace(digits, path=tmp_path / "file" / "digits.safetensors"), zca=True)
    assert isinstance(transform, Whitening)
    assert "cannot be written" in caplog.text


def test_images_that_are_too_large_to_whiten_are_refused() -> None:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(2, 3, 65, 65)
    data = from_tensors((images, torch.arange(2)), (images, torch.arange(2)), mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(InputError, match="use no `zca`"):
        transform_for(data, zca=True)
