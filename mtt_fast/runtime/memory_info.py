"""Measure free memory, parse sizes, and recognise errors that say that memory ran out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from mtt_fast.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

AUTO = "auto"
"""The memory budget that stands for the share `MARGIN` of the free memory."""
MARGIN = 0.8


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out: Python's, torch's on either device, or a library's.

    CUDA and Triton need memory beside torch's, for graphs and for code, and call the error by a phrase of their own.
    """
    phrases = (
        "can't allocate memory",
        "bad_alloc",
        "_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "[CUDA]: out of memory",
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(phrase in str(error) for phrase in phrases)


def parse_bytes(amount: float | str) -> int:
    """Return a number of bytes from a number or text such as "6GiB", "400 MB". Raises `InputError` for anything else."""
    if isinstance(amount, int):
        number, unit = float(amount), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(amount))
        if match is None or match[2].upper() not in _UNITS:
            raise InputError(
                f"`memory_budget` '{amount}': expected a number of bytes or one with KB, MB, GB, KiB, MiB or GiB, e.g. 6GiB"
            )
        number, unit = float(match[1]), match[2].upper()
    if not 0 < number * _UNITS[unit] < 2**63:
        raise InputError(f"`memory_budget` {amount}: expected more than nothing, and less than 8 EiB")
    return int(number * _UNITS[unit])


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device`, as the driver, or the system and the control group, say.

    On a GPU memory that torch has reserved and does not use counts as free. On other systems than Linux half of the
    physical memory counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        system = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([system, *bytes_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def bytes_left_in_groups(membership: Path, mount: Path) -> list[int]:
    """Return the bytes left below the limit of each control group of this process, version 1 or 2, and of the groups above."""
    left = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        own_group = root / path.lstrip("/")
        for group in [own_group, *own_group.parents]:
            if group.is_relative_to(root):
                left += _bytes_left_in(group, *names)
    return left


def _bytes_left_in(group: Path, limit: str, usage: str, cached: str) -> list[int]:
    try:
        allowed = (group / limit).read_text().strip()
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the page cache is the first thing to go when a group is full
        used = int((group / usage).read_text()) - int(statistics.get(cached, 0))
    except (OSError, ValueError):  # no such group here, or not ours to read
        return []
    return [] if allowed == "max" else [max(0, int(allowed) - used)]
