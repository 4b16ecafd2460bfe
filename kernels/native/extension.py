"""Load the compiled extension module (cpp/) and allocate the memory of its results."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

# Results of at least this many bytes take memory that the extension keeps from one call to the next (cpp/pool.h).
LARGE = 1 << 20

CPP = Path(__file__).resolve().parents[1] / "cpp"


def check_sources(module: ModuleType, folder: Path = CPP) -> None:
    """Raise `ImportError` if the extension `module` was built from other C++ sources than those in `folder`.

    Only an editable install has sources there. A pull or an edit changes them, and leaves the extension as it was built.
    """
    files = sorted(path for kind in ("*.cpp", "*.h") for path in folder.glob(kind))
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    if files and getattr(module, "sources", None) != hashlib.sha256(digests.encode()).hexdigest():
        raise ImportError(
            f"{folder}: expected the sources that {module.__file__} was built from, found other ones; build it again with "
            f"`pip install -e .` in {folder.parents[1]}, or run without it: MTT_FAST_NATIVE=0"
        )


def load_extension() -> ModuleType | None:
    """Return the extension module, or None where it is not installed. Raises `ImportError` for one that cannot be used."""
    name = f"{__package__.rpartition('.')[0]}._native"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:  # not installed; one that is there but does not load is an error, not a fallback
            return None
        raise
    check_sources(module)
    return module


# MTT_FAST_NATIVE=0 turns the compiled code off. It is read here, once, when the package is imported.
_extension = load_extension() if os.environ.get("MTT_FAST_NATIVE", "1") != "0" else None
LOADED = _extension is not None


def extension() -> ModuleType:
    """Return the extension module. Raises `AssertionError` where it is not installed, or turned off."""
    assert _extension is not None, "the native kernels are not installed"
    return _extension


def allocate(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised contiguous tensor of `shape` and the dtype of `like`; large ones take the extension's memory."""
    size = math.prod(shape) * like.element_size()
    if size < LARGE:
        return torch.empty(shape, dtype=like.dtype, device="cpu")
    memory: Tensor = extension().memory(size)
    return memory.view(like.dtype).view(shape)


def release_memory() -> None:
    """See `mtt_fast.kernels.release_memory`."""
    if _extension is not None:
        _extension.release_memory()
