"""Make distilled sets, and compare those that are read back, for the tests of several file kinds."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measuring import resident_bytes
from mtt_fast import SyntheticDataset, Whitening
from mtt_fast.interop import (
    TensorSet,
)

CLASSES, IPC = 3, 2
N = CLASSES * IPC

EXAMPLES = int(os.environ.get("MTT_FAST_FUZZ", "0"))
"""Examples of a fuzz test, each time others; 0 stands for few, always the same."""


@contextlib.contextmanager
def growing_less_than(most: int) -> Iterator[None]:
    """Check that the process never takes `most` bytes more within the block than before; on Linux whatever earlier tests took.

    There the code of libraries counts as if all of it were in memory, since the system may take it away and bring it back.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would hide what is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        most += max(0, resident_bytes("VmLib") - resident_bytes("RssFile"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


def distilled(label_kind: str = "indices", whitening: Whitening | None = None, **changes: Any) -> SyntheticDataset:
    soft = torch.randn(N, CLASSES)
    kinds = {
        "indices": torch.arange(CLASSES).repeat_interleave(IPC),
        "probabilities": soft.softmax(1),
        "weights": 2 * soft.relu(),
        "logits": soft,
    }
    arguments: dict[str, Any] = {
        "images": torch.randn(N, 3, 4, 5),
        "labels": kinds[label_kind],
        "lr": torch.tensor(0.0123),
        "class_names": ("cat", "dog / wolf", "owl"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "whitening": whitening,
        "label_kind": label_kind,
        "recipe": {"dataset": "CIFAR10", "ipc": IPC},
        "versions": {"torch": torch.__version__},
    }
    return SyntheticDataset(**arguments | changes)


def assert_same(found: SyntheticDataset | TensorSet, expected: SyntheticDataset | TensorSet) -> None:
    assert found.label_kind == expected.label_kind
    for name in ("images", "labels", "lr"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is None:
            assert one is None
        else:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other), name
