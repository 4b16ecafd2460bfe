"""Make random generators that depend on their purpose, not on earlier draws.

Every expert, iteration and evaluation has a generator of its own, made from the run's seed, its purpose and its indices. So
a resumed run repeats without saved generator states, and expert 7 is the same whether or not expert 6 was trained before.
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator that (`seed`, `purpose`, `indices`) determine, independent of the generators for all others."""
    digest = hashlib.blake2b(repr((seed, purpose, indices)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
