"""Random numbers that depend on what they are for, not on what was drawn before.

Every expert, iteration and evaluation has a generator of its own, made from the run's seed and its place. So a resumed
run repeats without saved generator states, and expert 7 is the same whether or not expert 6 was trained before it.
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Return a CPU generator determined by (`seed`, `purpose`, `place`), independent of all others."""
    digest = hashlib.blake2b(repr((seed, purpose, place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
