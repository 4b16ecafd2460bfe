"""Command lines: the options that several benchmarks share, and an error in one line for what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from mtt_fast.commands import parsing
from mtt_fast.errors import InputError
from mtt_fast.runtime.provenance import choose_device


@dataclass(frozen=True)
class CommonOptions:
    """Where a benchmark runs, how often, and where its record goes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    repetitions: int = 5
    """timed repetitions, interleaved over what is compared"""
    out: str = "bench/results"
    """folder of the record"""
    name: str | None = None
    """name of the record; default from the benchmark, its setting and the device"""

    def torch_device(self) -> torch.device:
        """Return the device. Raises `InputError` if it cannot be used, or if there is nothing to repeat."""
        if self.repetitions < 1:
            raise InputError(f"--repetitions {self.repetitions}: expected at least 1")
        return choose_device(self.device)


Options = TypeVar("Options")


def parse(kind: type[Options], argv: Sequence[str], prog: str) -> Options:
    """Return the dataclass `kind` from `argv`. Raises `InputError` for an unknown option."""
    return parsing.parse(kind, argv, prog)
