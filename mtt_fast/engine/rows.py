"""Store one vector a step on the device, or in host memory with two of them on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as torch's allocator for CPUs aligns


class Rows:
    """Vectors of one size, a row each: on the device, or in host memory with copies of two rows on the device."""

    def __init__(self, stored: Tensor, device: torch.device, *, on_host: bool) -> None:
        self.stored = stored  # (rows, P)
        self._near = _aligned_rows(2, stored[0], device) if on_host else None

    @staticmethod
    def empty(rows: int, like: Tensor, *, on_host: bool) -> Rows:
        """Return rows without values, for vectors like `like` (P,). Host memory of a GPU is pinned."""
        device = torch.device("cpu") if on_host else like.device
        stored = _aligned_rows(rows, like, device, pin_memory=on_host and like.is_cuda)
        return Rows(stored, like.device, on_host=on_host)

    def near(self, n: int) -> Tensor:
        """Return row n on the device, as last written or loaded there; row n + 2 may overwrite it."""
        return self.stored[n] if self._near is None else self._near[n % 2]

    def save(self, n: int) -> None:
        """Copy row n, which was written on the device, to where it is stored; in the current stream's order, as is `load`."""
        if self._near is not None:
            self.stored[n].copy_(self.near(n), non_blocking=True)

    def load(self, n: int) -> Tensor:
        """Return row n, brought back to the device."""
        if self._near is not None:
            self.near(n).copy_(self.stored[n], non_blocking=True)
        return self.near(n)


def _aligned_rows(rows: int, like: Tensor, device: torch.device, *, pin_memory: bool = False) -> Tensor:
    """Return `rows` vectors without values, of the length and dtype of `like` (P,), each aligned as one of its own.

    Libraries sum an unaligned vector in another order, so that θ_n as row n would differ in its last bits from θ_n as a start.
    """
    unit = _ALIGNMENT // like.element_size()
    width = -(-len(like) // unit) * unit
    return torch.empty(rows, width, dtype=like.dtype, device=device, pin_memory=pin_memory)[:, : len(like)]
