"""Files that are either whole or absent: atomic writes, and safetensors read with clear errors."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtt_fast.errors import InputError

_LONGEST_HEADER = 100 << 20  # the limit of the safetensors format itself


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if it does not.

    The content reaches the disk before the name does, so a crash at any moment leaves the old file or the new one.
    Raises `InputError` when the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def all_or_none() -> Iterator[list[Path]]:
    """Yield a list for the files that the block writes; delete them, and folders that hold no others, if it fails."""
    written: list[Path] = []
    try:
        yield written
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there are others
                path.parent.rmdir()
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device; copied to contiguous CPU memory) and text metadata to a safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata or {}))
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file: `dtype` as the format spells it, `shape`, bytes [`begin`, `end`)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return (entries by tensor name, metadata) of a safetensors file, reading only its header.

    Raises `InputError` if the file is missing, is no safetensors file, or is shorter than its header says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise InputError(
                    f"{path}: expected a safetensors file, found {size} bytes without its header; make it again or restore a copy"
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {
            name: TensorEntry(
                str(entry["dtype"]),
                tuple(int(side) for side in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: expected a safetensors file, found a broken header; make it again or restore a copy"
        ) from error
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size < expected:
        raise InputError(f"{path}: truncated: expected {expected} bytes, found {size}; delete it and make it again")
    return entries, metadata


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors by name, memory-mapped, CPU; metadata) of a safetensors file. Raises `InputError` as `read_header`."""
    from safetensors import SafetensorError, safe_open

    _, metadata = read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a valid safetensors file ({error}); delete it and make it again") from error


def as_record(text: str) -> dict[str, Any]:
    """Parse one JSON object kept as text in safetensors metadata; an empty text is an empty record."""
    record = json.loads(text) if text else {}
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object in the metadata, found {type(record).__name__}")
    return record


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file. Raises `InputError` if it is missing or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a TOML file of options") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from error
