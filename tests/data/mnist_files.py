"""Make the idx files of MNIST, and check what is read of them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mtt_fast.data import ImageData
from mtt_fast.data.mnist import FILES

Array = np.ndarray[Any, np.dtype[np.uint8]]


def idx(values: Array) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def arrays(n: int, seed: int) -> tuple[Array, Array]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
    return pixels, (np.arange(n) % 10).astype(np.uint8)


def files(folder: Path, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(FILES, (*arrays(20, 0), *arrays(10, 1)), strict=True):
        raw = idx(values)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def check(data: ImageData) -> None:
    for split, (pixels, labels) in ((data.train, arrays(20, 0)), (data.test, arrays(10, 1))):
        assert np.array_equal(split.images.numpy(), pixels[:, None])
        assert split.labels.tolist() == labels.tolist()
