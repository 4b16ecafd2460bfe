"""Read numpy arrays (.npy) and archives of them (.npz) without running code from them or unpacking a bomb."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import LARGEST_FILE, complaint_of, largest_unpacked
from mtt_fast.storage.regular import check_regular

Array = np.ndarray[Any, np.dtype[Any]]

_NUMBERS = "fiu"  # kinds of numpy's types: floating point, integers with and without sign
_MAX_HEADER_BYTES = 1 << 10  # bytes


def read_array(path: str | os.PathLike[str]) -> Array:
    """Return the array of real numbers in a file of numpy.save. Raises as `read_arrays`, and nothing has a checksum."""
    path = Path(path)
    check_regular(path, LARGEST_FILE)
    try:
        return _read(lambda: path.open("rb"), path.name, path.stat().st_size)
    except Exception as error:  # numpy raises many kinds for a broken or foreign file
        raise InputError(
            f"{path}: expected a numpy array, found a broken or foreign file ({complaint_of(error)}); get it again"
        ) from error


def read_arrays(path: str | os.PathLike[str], names: Sequence[str], optional: Sequence[str] = ()) -> list[Array]:
    """Return the arrays of real numbers called `names` in an archive of numpy's, then those of the `optional` ones that are there.

    Checksums are checked. Raises `InputError` for a missing, broken, hostile or foreign file, for another type of array,
    and for one that claims more than there is.
    """
    path = Path(path)
    check_regular(path, LARGEST_FILE)
    try:
        with zipfile.ZipFile(path) as archive:
            there = archive.namelist()
            files = [f"{name}.npy" for name in (*names, *(name for name in optional if f"{name}.npy" in there))]
            return [_unpacked(archive, file, path.stat().st_size) for file in files]
    except Exception as error:  # numpy and zipfile raise many kinds for a broken or foreign file
        raise InputError(
            f"{path}: expected arrays {' and '.join(names)}, found a broken or foreign file ({complaint_of(error)}); get it again"
        ) from error


def _unpacked(archive: zipfile.ZipFile, name: str, archive_size: int) -> Array:
    size = archive.getinfo(name).file_size
    if size > largest_unpacked(archive_size):
        raise ValueError(f"{name} would unpack to {size:,} bytes")
    return _read(partial(archive.open, name), name, size)


def _read(opened: Callable[[], IO[bytes]], name: str, size: int) -> Array:
    """Return the array in the file `name` of `size` bytes, after a look at what its header claims."""
    with opened() as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file, max_header_size=_MAX_HEADER_BYTES)
        if dtype.kind not in _NUMBERS or dtype.itemsize > 8 or math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{name} is {dtype} {shape} in {size:,} bytes")
    with opened() as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_MAX_HEADER_BYTES)
        if file.read(1):  # at the end zipfile compares the checksum
            raise ValueError(f"{name} has more bytes after its array")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
