"""Check that kernels count samples in 64 bits, where a sample is beyond 2³¹ elements."""

from __future__ import annotations

import pytest

from tests.kernels.triton_comparison import run_part


@pytest.mark.slow
def test_a_sample_beyond_32_bits_is_found_interpreted() -> None:
    lines = run_part("tests.kernels.large_batches", "cpu")
    for kind in ("contiguous_format", "channels_last", "in parts", "patches", "block", "colour_warp", "copied planes"):
        assert any(kind in line for line in lines)
