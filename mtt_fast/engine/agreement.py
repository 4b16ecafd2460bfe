"""Check that all processes of a group make the same call of `unroll`.

They add up what they compute. From different arguments this would be a wrong gradient without any other symptom.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtt_fast.errors import InputError
from mtt_fast.runtime.cuda_graphs import is_capturing
from mtt_fast.runtime.tensor_bytes import bytes_of

_COLUMNS = 1021  # a prime, so that the same rows in another order have other sums


def checked_group(group: Any) -> dist.ProcessGroup | None:
    """Return `group`, or None for one of this process alone. Raises `InputError` unless it is one that this process belongs to."""
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

    Checksums of their tensors, arrays, numbers and texts are compared; other objects are not. A GPU is waited for.
    """
    if is_capturing(theta):
        raise InputError(
            "`group`: expected no capture of a CUDA graph, in which it cannot be checked that the processes agree; call outside of it"
        )
    arguments = {"theta": theta, **others}
    checksums = torch.tensor([checksum_of(value) for value in arguments.values()], device=theta.device)
    extremes = torch.stack([checksums, -checksums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differ = (extremes[0] != -extremes[1]).tolist()
    if any(differ):
        names = ", ".join(f"`{name}`" for name, differs in zip(arguments, differ, strict=True) if differs)
        raise InputError(
            f"{names}: expected the same in all processes of the `group`, found others in some; seed all processes alike, or send "
            "what one of them has to the others by torch.distributed.broadcast"
        )


def checksum_of(value: Any) -> int:
    """Return a checksum of 63 bits of all that can be compared in a tree of values."""
    digest = xxhash.xxh3_64()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} {leaf.requires_grad}".encode())
            digest.update(bytes_of(_sums_of_bits(leaf)))
        elif isinstance(leaf, np.ndarray):
            digest.update(leaf.tobytes())
        elif isinstance(leaf, int | float | str | None):
            digest.update(repr(leaf).encode())
    return digest.intdigest() >> 1


def _sums_of_bits(tensor: Tensor) -> Tensor:
    """Return a few whole numbers, on the CPU, that change if any of a tensor's numbers does.

    All numbers would be a long copy from a GPU.
    """
    numbers = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    bits = numbers.view(torch.int32 if numbers.itemsize % 4 == 0 else torch.uint8)
    whole = len(bits) // _COLUMNS * _COLUMNS
    return torch.cat([bits[:whole].view(-1, _COLUMNS).sum(0), bits[whole:].long()]).cpu()
