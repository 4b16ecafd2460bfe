"""Files of torch.save: read without running what is in them, written whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.storage.files import atomic_path


def load_pickle(path: str | os.PathLike[str], *, mapped: bool = False, numpy_numbers: bool = False) -> Any:
    """Return what torch.save wrote, on the CPU; `mapped`: memory-mapped, so that only what is used is read.

    Read with `weights_only`: nothing in the file is run. `numpy_numbers` lets numpy's floating-point numbers through
    besides, which the public code puts beside its tensors. Raises `InputError` for a missing, broken or foreign file.
    """
    path = Path(path)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    try:
        mapped = mapped and zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
        with _numpy_numbers() if numpy_numbers else contextlib.nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a broken or foreign pickle
        raise InputError(
            f"{path}: expected tensors saved by torch.save, found a broken or foreign file; get it again, or convert it "
            "with the software that wrote it"
        ) from error


def load_tensor(path: str | os.PathLike[str]) -> Tensor:
    """Return the one tensor in a file of torch.save, detached. Raises `InputError` for anything else."""
    value = load_pickle(path)
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: expected a tensor, found {type(value).__name__}; name the right file")
    return value.detach()


def save_pickle(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` with torch.save, atomically, and return the path. Raises `InputError` where the disk is full."""
    with atomic_path(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error
    return Path(path)


def save_large_pickle(path: str | os.PathLike[str], value: Any) -> Path:
    """`save_pickle` of what should not be in memory for longer: torch.save leaves a cycle that holds all tensors."""
    save_pickle(path, value)
    gc.collect()
    return Path(path)


def plain_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that shares nothing: torch.save would write all of what a view is cut from."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _numpy_numbers() -> contextlib.AbstractContextManager[None]:
    """Allow what a pickled numpy float64 or float32 names, under its old and its present module."""
    scalar = np.float64(0).__reduce__()[0]
    names = [f"{module}.multiarray.scalar" for module in ("numpy.core", "numpy._core")]
    allowed: list[Any] = [*((scalar, name) for name in names), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    context: contextlib.AbstractContextManager[None] = torch.serialization.safe_globals(allowed)
    return context
