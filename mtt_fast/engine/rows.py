"""Store one vector per step, on the device or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as torch's allocator for CPUs aligns


class Rows:
    """A matrix with one row per step, on the device or in host memory. With host memory, two buffers on the device hold the rows in use."""

    def __init__(self, stored: Tensor, device: torch.device, *, on_host: bool) -> None:
        self.stored = stored  # (rows, P), or (rows, vectors, P)
        self._buffers = _aligned_rows(2, stored[0], device) if on_host else None

    @staticmethod
    def empty(rows: int, like: Tensor, *, on_host: bool) -> Rows:
        """Return uninitialised rows of the shape, dtype and device of `like`, (P,) or (vectors, P). Host memory is pinned if `like` is on a GPU."""
        device = torch.device("cpu") if on_host else like.device
        stored = _aligned_rows(rows, like, device, pin_memory=on_host and like.is_cuda)
        return Rows(stored, like.device, on_host=on_host)

    def on_device(self, n: int) -> Tensor:
        """Return row n, or its buffer on the device, which it shares with rows n ± 2. Nothing is copied."""
        return self.stored[n] if self._buffers is None else self._buffers[n % 2]

    def save(self, n: int) -> None:
        """Copy row n from its device buffer, if it has one, to host memory, on the current stream."""
        if self._buffers is not None:
            self.stored[n].copy_(self.on_device(n), non_blocking=True)

    def load(self, n: int) -> Tensor:
        """Return row n on the device. From host memory it is copied on the current stream."""
        if self._buffers is not None:
            self.on_device(n).copy_(self.stored[n], non_blocking=True)
        return self.on_device(n)


def _aligned_rows(rows: int, like: Tensor, device: torch.device, *, pin_memory: bool = False) -> Tensor:
    """Return uninitialised tensors (rows, …, P) of the shape and dtype of `like` (…, P), each vector aligned like a separate tensor.

    Libraries sum an unaligned vector in another order. Without the alignment a step from row n would differ in its last bits from
    the same step from a copy of the row.
    """
    unit = _ALIGNMENT // like.element_size()
    *vectors, length = like.shape
    width = -(-length // unit) * unit
    return torch.empty(rows, *vectors, width, dtype=like.dtype, device=device, pin_memory=pin_memory)[..., :length]
