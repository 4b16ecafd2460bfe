"""Random numbers that depend on what they are for, not on what was drawn before.

Every expert, iteration and evaluation has a generator of its own, made from the run's seed and its place. So a resumed
run repeats without saved generator states, and expert 7 is the same whether or not expert 6 was trained before it.
"""

from __future__ import annotations

import numpy as np
import torch


def generator_for(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Return a CPU generator determined by (`seed`, `purpose`, `place`), independent of all others."""
    entropy = [seed, *purpose.encode(), *place]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
