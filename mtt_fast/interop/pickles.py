"""Read files of torch.save without running code from them, and write them whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.foreign import LARGEST_FILE, plain_tensor
from mtt_fast.storage.regular import check_regular, unreadable

SMALL = 1 << 20
"""Bytes of the pickle in a file with a few tensors."""
LARGE = 16 << 20
"""Bytes of that in a buffer of trajectories: a hundred experts of ConvNet need 10 MB."""

_BYTES_OF_OPCODE = 4  # at least, on average: a tensor takes 25 of them, and 150 bytes
_PICKLES_BEFORE_TENSORS = 5
_NAMES = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch(\.cuda)?\.\w+Storage|torch\.storage\.(Untyped|Typed)Storage"
    r"|collections\.OrderedDict|numpy\.(core|_core)\.multiarray\.scalar|numpy\.dtype|_codecs\.encode|torch\.Size"
)


def load_pickle(
    path: str | os.PathLike[str], *, mapped: bool = False, numpy_numbers: bool = False, most: int = SMALL
) -> Any:
    """Return the value that torch.save wrote, on the CPU; `mapped`: memory-mapped, so that only the used parts are read.

    The file is read with `weights_only`, which runs nothing in it. `numpy_numbers` also allows numpy's floating-point numbers,
    which the public code puts beside its tensors. Its pickle, which is all but the tensors' numbers, has at most `most`
    bytes. Callers check the tensors (`mtt_fast.storage.foreign.plain_tensor`).
    Raises `InputError` for a missing, damaged, hostile or foreign file.
    """
    path = Path(path)
    check_regular(path, LARGEST_FILE)
    try:
        zipped = _is_zip(path)  # the format before torch 1.6 is no archive, and cannot be mapped
        (_check_zip if zipped else _check_pickles)(path, most)
        allowed = _numpy_numbers() if numpy_numbers else contextlib.nullcontext()
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that are refused a moment later
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # torch raises many kinds for a broken or foreign pickle
        reason = f" ({error})" if isinstance(error, _RefusedError) else ""
        raise InputError(
            f"{path}: expected tensors saved by torch.save, found a broken or foreign file{reason}; get it again, or convert it "
            "with the software that wrote it"
        ) from error


def load_tensor(path: str | os.PathLike[str]) -> Tensor:
    """Return the one tensor in a file of torch.save, detached. Raises `InputError` for anything else."""
    return plain_tensor(load_pickle(path), path)


class _RefusedError(Exception):
    """The reason why a file is refused, in words."""


def _is_zip(path: Path) -> bool:
    """Return whether torch reads the file as an archive, which depends only on its first bytes."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_zip(path: Path, most: int) -> None:
    """Raise `_RefusedError` unless an archive is as torch.save writes it: uncompressed, with distinct names and valid checksums."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members):
            raise _RefusedError("it has packed members, as torch.save writes none")
        if len({one.filename for one in members}) < len(members):
            raise _RefusedError("it has one name twice")
        if sum(one.file_size for one in members) > path.stat().st_size:
            raise _RefusedError("its members overlap")
        pickles = [one for one in members if one.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise _RefusedError("it is another archive")
        if pickles[0].file_size > most:
            raise _RefusedError(
                f"its list takes {pickles[0].file_size:,} bytes, where such a file needs {most:,} at most"
            )
        if (damaged := archive.testzip()) is not None:
            raise _RefusedError(f"damaged: the checksum of {shown(damaged)} is wrong")
        _check_pickle(io.BytesIO(archive.read(pickles[0])), most)


def _check_pickles(path: Path, most: int) -> None:
    """Raise `_RefusedError` for a forbidden pickle at the beginning of a file in torch's old format, which has five of them."""
    with open(path, "rb") as file:
        for _ in range(_PICKLES_BEFORE_TENSORS):
            _check_pickle(file, most)


def _check_pickle(file: IO[bytes], most: int) -> None:
    """Raise `_RefusedError` if a pickle names more than plain tensors, lists and numbers need. Nothing is built."""
    for number, (opcode, argument, place) in enumerate(pickletools.genops(file)):
        if (place or 0) > most or number > most // _BYTES_OF_OPCODE:
            raise _RefusedError(f"its list takes more than the {most:,} bytes that such a file needs")
        if opcode.name == "GLOBAL" and not _NAMES.fullmatch(str(argument).replace(" ", ".")):
            raise _RefusedError(f"it names {shown(argument)}, which is no plain tensor")


def save_pickle(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` with torch.save, atomically, and return the path. Raises `InputError` where the disk is full."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # torch's own file would not tell what failed
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return Path(path)


def save_large_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Write as `save_pickle`, and free the tensors of `value`, which a cycle that torch.save leaves would hold."""
    save_pickle(path, value)
    gc.collect()


def plain_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that shares nothing: torch.save would write all of what a view is cut from."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _numpy_numbers() -> contextlib.AbstractContextManager[None]:
    """Let `torch.load` take the names in a pickled numpy float64 or float32, of its old and its present module."""
    scalar = np.float64(0).__reduce__()[0]
    names = [f"{module}.multiarray.scalar" for module in ("numpy.core", "numpy._core")]
    allowed: list[Any] = [*((scalar, name) for name in names), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    context: contextlib.AbstractContextManager[None] = torch.serialization.safe_globals(allowed)
    return context
