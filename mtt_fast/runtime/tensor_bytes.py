"""Read the bytes of a tensor, for files and for checksums."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy; the view keeps the tensor alive.

    `Tensor.numpy` would forbid its owner to resize it.
    """
    if not tensor.nbytes:
        return memoryview(b"")
    content = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    content.tensor = tensor  # type: ignore[attr-defined]  # the view holds `content`, which holds no memory of its own
    return memoryview(content).cast("B")


def parts_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a CPU tensor in its logical order; row by row unless it is contiguous, since a copy may not fit in memory."""
    for part in [tensor] if tensor.is_contiguous() else tensor.unbind():
        yield bytes_of(part.detach().resolve_conj().resolve_neg().contiguous())
