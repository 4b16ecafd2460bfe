"""Describe a batch of planes (B, C, H, W), its shape and its memory format, and allocate results of that format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import accumulator, memory_format

OFFSETS = 2**31  # a sample has fewer elements: kernels count in int32 within a sample, in int64 across samples


@dataclass(frozen=True)
class Planes:
    """Shape and memory format of a contiguous or channels_last tensor. Raises `ValueError` for samples of 2³¹ elements or more."""

    samples: int
    channels: int
    height: int
    width: int
    memory_format: torch.memory_format

    def __post_init__(self) -> None:
        if self.sample_size >= OFFSETS:
            shape = (self.samples, self.channels, self.height, self.width)
            raise ValueError(f"expected less than 2³¹ elements a sample, found shape {shape}")

    @classmethod
    def from_tensors(cls, tensor: Tensor, *alike: Tensor | None) -> Planes:
        """Return the shape and format of `tensor` (B, C, H, W).

        Raises `ValueError` for a tensor in neither format, and for one of `alike` in another format.
        """
        shared = memory_format(tensor)
        for other in alike:
            if other is not None and not other.is_contiguous(memory_format=shared):
                raise ValueError(f"expected tensors all {str(shared)[6:]}, found one with strides {other.stride()}")
        samples, channels, height, width = tensor.shape
        return cls(samples, channels, height, width, shared)

    @property
    def channels_last(self) -> bool:
        """Return whether the channels of a pixel are adjacent in memory. Otherwise the pixels of a channel are."""
        return self.memory_format == torch.channels_last

    @property
    def sample_size(self) -> int:
        """Return the number of elements of one sample."""
        return self.channels * self.height * self.width

    @property
    def windows(self) -> int:
        """Return the number of 2×2 windows of a plane, incomplete ones included."""
        return ((self.height + 1) // 2) * ((self.width + 1) // 2)

    def empty(self, like: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Allocate planes (B, channels, height, width) in this format, with the batch size, dtype and device of `like`."""
        shape = (len(like), channels, height, width)
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self.memory_format)

    def empty_pair(self, like: Tensor, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Allocate planes twice, as `empty` does, adjacent in memory, so that `stacked` can view them as one batch.

        The memory is freed when both tensors are.
        """
        shape = (2 * len(like), channels, height, width)
        both = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self.memory_format)
        return both[: len(like)], both[len(like) :]


def empty_pool(y: Tensor, planes: Planes) -> Tensor:
    """Allocate the pooled planes p (B, C, H//2, W//2) of `y`."""
    return planes.empty(y, planes.channels, planes.height // 2, planes.width // 2)


def empty_stat(y: Tensor) -> Tensor:
    """Allocate a statistic (B, C) of the planes of `y`: float64 for float64 planes, else float32."""
    return torch.empty(y.shape[:2], dtype=accumulator(y.dtype), device=y.device)


def output_buffer(y: Tensor, reuse: bool) -> Tensor:
    """Return memory for the gradient of `y`: with `reuse` that of `y`, else new memory.

    Reuse is safe, since a program reads a window for the last time before it writes there.
    """
    if not reuse:
        return torch.empty_like(y)
    torch.autograd.graph.increment_version(y)
    return y


def stacked(first: Tensor, second: Tensor) -> Tensor | None:
    """Return a view (2 B, …) of both batches (B, …) if they are adjacent in memory, else None."""
    shares_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    distance = second.storage_offset() - first.storage_offset()
    alike = first.dtype == second.dtype and first.shape == second.shape and first.stride() == second.stride()
    if not (shares_memory and alike and distance == len(first) * first.stride(0)):
        return None
    return first.as_strided((2 * len(first), *first.shape[1:]), first.stride(), first.storage_offset())
