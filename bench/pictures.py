"""Write a folder of random pictures in two classes, for rehearsals: `python -m bench.pictures FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

_SIDE = 16


def write_pictures(folder: Path) -> None:
    """Write ten pictures a class to `folder`/train and `folder`/test."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("first", "second"):
            class_folder = folder / part / name
            class_folder.mkdir(parents=True, exist_ok=True)
            for number in range(10):
                pixels = generator.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(class_folder / f"{number}.png")


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]))
