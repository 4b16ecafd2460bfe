"""Make image folders, and check their refusals, for the tests of several topics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast.data import ImageData, load
from mtt_fast.errors import InputError

Array = np.ndarray[Any, np.dtype[np.uint8]]


def noise(seed: int, height: int = 6, width: int = 6, channels: int = 3) -> Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def chw(pixels: Array) -> torch.Tensor:
    return torch.tensor(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def write(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder(root: Path, test: str = "test", channels: int = 3, suffix: str = ".png") -> Path:
    """Make two classes of 3 + 2 training images and 1 + 1 test images; the pixels of each are `noise` of its number."""
    for number, place in enumerate(["train/b/2", "train/b/10", "train/a/x", "train/a/deep/er/y", "train/a/z"]):
        write(root / f"{place}{suffix}", noise(number, channels=channels))
    write(root / test / "a" / f"t{suffix}", noise(5, channels=channels))
    write(root / test / "b" / f"t{suffix}", noise(6, channels=channels))
    return root


def folder_of_six_images(root: Path) -> Path:
    """Make two classes of two training images and one test image each."""
    for number, place in enumerate(["train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/1", "test/b/1"]):
        write(root / f"{place}.png", noise(number))
    return root


def load_folder(root: Path, tmp_path: Path) -> ImageData:
    return load(str(root), data_path=tmp_path / "cache", progress=False)


def check_refused(tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load("folder", data_path=tmp_path, progress=False, **options)
    assert "\n" not in str(raised.value)
    packed = tmp_path / "packed"
    assert not packed.exists() or not list(packed.iterdir())
