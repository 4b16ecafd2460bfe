"""Micro-batches that fit a memory budget."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.student import Network, Student

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_VECTORS_BESIDE_PATH = 10  # θ, v, g, H v, λ and their temporaries
_COPIES_OF_A_BATCH = 8  # batch, augmented batch, their gradients and the augmentation's temporaries


def parse_bytes(amount: int | str) -> int:
    """Return a number of bytes from an integer or text such as "6GiB", "400 MB". Raises `InputError` for anything else."""
    if isinstance(amount, int):
        found, unit = float(amount), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", amount)
        if match is None or match[2].upper() not in _UNITS:
            raise InputError(
                f"memory budget '{amount}': expected a number of bytes or one with KB, MB, GB, KiB, MiB or GiB, e.g. 6GiB"
            )
        found, unit = float(match[1]), match[2].upper()
    if found <= 0:
        raise InputError(f"memory budget {amount}: expected more than nothing")
    return int(found * _UNITS[unit])


def microbatch_for(
    net: Network,
    student: Student,
    budget: int | str,
    dtype: torch.dtype,
    images: Tensor,
    *,
    batch: int,
    steps: int,
    momentum: bool = False,
) -> int | None:
    """Return the largest micro-batch with which `unroll` stays below `budget`; None if the whole `batch` fits.

    The estimate covers what `unroll` allocates itself: the path, the gradients, and one micro-batch of one step.
    Raises `InputError` if not even one sample fits, with the budget that would do, or if the network cannot be cut.
    """
    allowed, bytes_each = parse_bytes(budget), dtype.itemsize
    vectors = (steps + 1) * (2 if momentum else 1) + _VECTORS_BESIDE_PATH
    fixed = bytes_each * (
        vectors * net.num_parameters + images.numel() + _COPIES_OF_A_BATCH * batch * images[0].numel()
    )
    each = student.sample_bytes(images.shape[1:], dtype)
    fits = (allowed - fixed) // each
    if fits >= batch:
        return None
    if fits < 1 or net.mixes_samples:
        least = fixed + each * (batch if net.mixes_samples else 1)
        raise InputError(
            f"memory budget {budget}: expected at least {least / 2**20:.0f}MiB for {steps} steps of {batch} images"
            + (" (batch statistics: the batch cannot be cut)" if net.mixes_samples else "")
            + "; raise it, or lower batch_syn or syn_steps"
        )
    return int(fits)
