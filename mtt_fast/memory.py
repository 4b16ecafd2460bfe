"""Micro-batches that fit a memory budget."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.student import Network

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
