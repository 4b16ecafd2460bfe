"""Write tensors to safetensors files with checksums, and verify these when the files are read.

The metadata of every tensor file that is written here has two fields: `checksums` of the bytes of each tensor (of each row,
for a tensor that is read by rows), and `checksum` of everything else in the header. A file that lacks one of them is damaged.
So is a file that lacks both, unless its format has the number 1, which had no checksums.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError, dtype_name
from mtt_fast.runtime.tensor_bytes import bytes_of
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.regular import open_regular, unreadable
from mtt_fast.storage.text_files import MALFORMED, parse_json

_MAX_HEADER_BYTES = 8 << 20  # bytes; that of a data set of 20,000 classes takes 0.7 MB
_FIX = "restore a copy, or delete it and make it again"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

log = logging.getLogger(__name__)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    by_row: Collection[str] = (),
) -> None:
    """Write tensors (any device; copied to contiguous CPU memory) and text metadata to a safetensors file, atomically.

    Each tensor has a checksum; those in `by_row`, which are read by rows, have one for each row. Raises `InputError` for a dtype that
    the files have not, and as `atomic_path`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InputError(
                f"{path}: not written: {name}: expected {', '.join(map(dtype_name, _NAMES))}, found {dtype_name(tensor.dtype)}; convert it"
            )
    contiguous = {name: tensor.detach().cpu().contiguous().resolve_neg() for name, tensor in tensors.items()}
    # the format wants data aligned, so wide types come first
    order = sorted(contiguous, key=lambda name: (-contiguous[name].element_size(), name))
    shapes = {name: (_NAMES[contiguous[name].dtype], tuple(contiguous[name].shape)) for name in order}
    checksums = {
        name: [checksum_of(bytes_of(part)) for part in (contiguous[name] if name in by_row else [contiguous[name]])]
        for name in order
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header_of(shapes, metadata or {}, checksums))
        for name in order:
            file.write(bytes_of(contiguous[name]))


def header_of(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    checksums: Mapping[str, Sequence[str]],
) -> bytes:
    """Return the header of a safetensors file: its length, and JSON with the metadata and the offsets of each tensor.

    `shapes`: types, as the format spells them, and shapes of the tensors in the order in which they lie in the file;
    `checksums`: of the bytes of each, or of equal parts of them. Its length depends on no checksum's value.
    """
    with_checksums = dict(metadata) | {"checksums": json.dumps(checksums)}
    header: dict[str, Any] = {
        "__metadata__": with_checksums | {"checksum": _checksum_of_header(shapes, with_checksums)}
    }
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checksum_of_header(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    return checksum_of(json.dumps([shapes, metadata], sort_keys=True).encode())


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file: `dtype` as the format spells it, `shape`, and its bytes [`begin`, `end`).

    `checksums` are those of equal parts of its bytes; there are none in a file of a format without checksums.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksums: tuple[str, ...] = ()


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return (entries by tensor name, metadata) of a safetensors file, after a check of its header; only the header is read.

    Raises `InputError` if the file is missing, is not a safetensors file, is shorter or longer than its header says, or its
    header was changed.
    """
    path = Path(path)
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise InputError(
                    f"{path}: expected a safetensors file, found {size} bytes without its header; make it again or restore a copy"
                )
            raw = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
    try:
        entries, metadata = _parsed(raw)
    except MALFORMED as error:
        raise InputError(
            f"{path}: expected a safetensors file, found a broken header; make it again or restore a copy"
        ) from error
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise InputError(f"{path}: {what}: expected {expected} bytes, found {size}; delete it and make it again")
    return _checked(path, entries, metadata), metadata


def _parsed(raw: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the entries and the metadata in a header, the checksums among the latter. Raises one of `MALFORMED` for another text."""
    header = parse_json(raw)
    metadata = dict(header.pop("__metadata__", {}))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("metadata that is no text")
    entries = {}
    end = 8 + len(raw)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("a shape that is none")
        begin, end = end, end + math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
        if entry["data_offsets"] != [begin - 8 - len(raw), end - 8 - len(raw)]:
            raise ValueError("tensors that do not follow one another")
        entries[name] = TensorEntry(entry["dtype"], shape, begin, end)
    return entries, metadata


def _checked(path: Path, entries: dict[str, TensorEntry], metadata: dict[str, str]) -> dict[str, TensorEntry]:
    """Take the checksums out of `metadata`; return the entries with them. Raises `InputError` if the header's is wrong."""
    checksum = metadata.pop("checksum", None)
    if checksum is None and "checksums" not in metadata and _is_from_before(metadata):
        return entries
    shapes = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if checksum != _checksum_of_header(shapes, metadata):
        raise InputError(f"{path}: damaged: its header is not the one that was written; {_FIX}")
    checksums = parse_json(metadata.pop("checksums"))
    return {name: replace(entry, checksums=tuple(checksums[name])) for name, entry in entries.items()}


def _is_from_before(metadata: Mapping[str, str]) -> bool:
    """Return whether a file with this metadata may lack checksums: it is of other software, or of a format without them."""
    number = re.fullmatch(r"mtt_fast.*\D(\d+)", metadata.get("format", ""))
    return number is None or number[1] == "1"


def check_part(path: str | os.PathLike[str], name: str, part: memoryview, checksum: str) -> None:
    """Raise `InputError` unless these bytes of a file, those of the tensor or row `name`, have this checksum."""
    if checksum_of(part) != checksum:
        raise InputError(f"{path}: damaged: {name}: not the bytes that were written; {_FIX}")


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors by name, memory-mapped, CPU; metadata) of a safetensors file, read once to check all of it.

    Raises `InputError` as `read_header` does, and for damaged tensors.
    """
    from safetensors import SafetensorError, safe_open

    entries, metadata = read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in entries}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a valid safetensors file ({error}); delete it and make it again") from error
    for name, entry in entries.items():
        content = bytes_of(tensors[name])
        length = len(content) // max(1, len(entry.checksums))
        for place, checksum in enumerate(entry.checksums):
            check_part(path, name, content[place * length : (place + 1) * length], checksum)
    if not all(entry.checksums for entry in entries.values()):
        warn_unchecked(path)
    return tensors, metadata


def warn_unchecked(path: str | os.PathLike[str]) -> None:
    """Warn in the log that a file or a folder has no checksums."""
    log.warning(
        "%s: written before files had checksums, so it is read unchecked; python -m mtt_fast convert rewrites it",
        path,
    )
