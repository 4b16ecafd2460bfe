"""Make distilled sets, and compare those that are read back, for the tests of several file kinds."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.measuring import reset_peak, resident_bytes
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
    """Check on Linux that the process never takes `most` bytes more within the block than before it, whatever earlier tests took.

    Pages of libraries that came back do not count: a system that is short of memory takes them away at any time.
    """
    if sys.platform != "linux":
        yield
        return
    reset_peak()
    before, from_files = resident_bytes("VmHWM"), resident_bytes("RssFile")
    yield
    came_back = max(0, resident_bytes("RssFile") - from_files)
    assert resident_bytes("VmHWM") - before - came_back < most


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
