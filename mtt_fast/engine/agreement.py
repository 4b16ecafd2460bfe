"""Check that all processes of a group make the same call of `unroll`, and the same backward pass.

The processes add up their results. If their arguments or losses differed, the gradient would be wrong, without any other symptom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtt_fast.errors import InputError
from mtt_fast.runtime.cuda_graphs import is_capturing
from mtt_fast.runtime.tensor_bytes import parts_of

_COLUMNS = 1021
_ROWS = 4096  # rows summed at once, which takes a few times their memory
_ROUNDING = 1e-3  # allowed difference of gradients, relative to their norm


def checked_group(group: Any) -> dist.ProcessGroup | None:
    """Return `group`, or None if it has only this process. Raises `InputError` unless this process belongs to it."""
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"`group`: expected a process group of torch.distributed that this process belongs to, found {type(group).__name__}; "
            "use torch.distributed.group.WORLD after init_process_group"
        )
    return group if group.size() > 1 else None


def check_agreement(group: dist.ProcessGroup, theta: Tensor, **others: Any) -> None:
    """Raise `InputError` in all processes of `group` unless `theta` and each of the `others` is the same in all of them.

    Checksums of tensors, arrays, numbers and strings are compared; other objects are not. Synchronises with a GPU.
    """
    if theta.is_meta:
        raise InputError("`group`: expected numbers, found theta on the device meta, which has none; leave `group` out")
    if is_capturing(theta):
        raise InputError(
            "`group`: expected no capture of a CUDA graph, in which the processes' arguments cannot be compared; call outside of it"
        )
    arguments = {"theta": theta, **others}
    checksums = torch.tensor([checksum_of(value) for value in arguments.values()], device=theta.device)
    extremes = torch.stack([checksums, -checksums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differ = (extremes[0] != -extremes[1]).tolist()
    if any(differ):
        names = ", ".join(f"`{name}`" for name, differs in zip(arguments, differ, strict=True) if differs)
        raise InputError(
            f"{names}: expected the same in all processes of the `group`, found others in some; seed all processes alike, send "
            "what one of them has to the others by torch.distributed.broadcast, or require a gradient in all or none"
        )


def check_same_loss(group: dist.ProcessGroup, gradients: Sequence[Tensor | None], device: torch.device) -> None:
    """Raise `InputError` in all processes of `group` unless the incoming `gradients` of the backward pass are equal in all, up to rounding.

    A gradient is None if the loss does not use that output. Synchronises with a GPU.
    """
    numbers = torch.full((len(gradients), 2), -1, dtype=torch.float64, device=device)
    for row, gradient in zip(numbers, gradients, strict=True):
        if gradient is not None:
            row[0], row[1] = torch.linalg.vector_norm(gradient), gradient.sum()
    extremes = torch.stack([numbers, -numbers])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, least = extremes[0], -extremes[1]
    if bool((most - least > _ROUNDING * most[:, :1].abs()).any()):
        raise InputError(
            "`group`: expected the same loss of the path in all processes, found gradients that differ; compute it from the same numbers "
            "in all, such as the same target"
        )


def checksum_of(value: Any) -> int:
    """Return a checksum of 63 bits of all that can be compared in a tree of values."""
    digest = xxhash.xxh3_64()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            is_learned = leaf.requires_grad and torch.is_grad_enabled()
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} {is_learned}".encode())
            for part in parts_of(leaf if leaf.device.type == "cpu" else sums_of_bits(leaf.detach())):
                digest.update(part)
        elif isinstance(leaf, np.ndarray | np.generic):
            digest.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        elif isinstance(leaf, int | float | complex | str | bytes | None):
            digest.update(f"{leaf!r}, ".encode())
    return digest.intdigest() >> 1


def sums_of_bits(tensor: Tensor) -> Tensor:
    """Return a few integers (k,), on the CPU, that change if a value of `tensor` does, or if two change places.

    Copying all values from a GPU would take long.
    """
    numbers = tensor.resolve_conj().resolve_neg().reshape(-1)
    bits = numbers.view(torch.int32 if numbers.itemsize % 4 == 0 else torch.uint8)
    whole = len(bits) // _COLUMNS * _COLUMNS
    blocks = bits[:whole].view(-1, _COLUMNS).split(_ROWS)
    # without weights, rows that change places would have the same sums
    weights = torch.arange(1, _ROWS + 1, device=bits.device)[:, None]
    sums = [(weights[: len(block)] * block).sum(0) for block in blocks]
    return torch.cat([*sums, bits[whole:].long()]).cpu()
