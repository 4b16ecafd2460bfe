"""Triton's norm or bias, ReLU and pool against their definition: interpreted, and on a GPU where there is one."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")

# (B, C, H, W): a plane of one tile, odd sizes, 1×1 after the pool, more channels than a block, a plane of several tiles
SHAPES = [(2, 3, 4, 4), (1, 5, 7, 5), (2, 17, 2, 2), (3, 4, 3, 9), (1, 2, 18, 20)]

COMPARISON = """
import sys
import torch

shapes, device = eval(sys.argv[1]), sys.argv[2]
empty = torch.empty

def poisoned(*arguments, **options):
    tensor = empty(*arguments, **options)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

torch.empty = poisoned
torch.empty_like = lambda tensor: poisoned(tensor.shape, dtype=tensor.dtype, device=tensor.device).as_strided(
    tensor.shape, tensor.stride())

from mtt_fast.kernels import reference, triton

torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    for shape in shapes:
        for form in (torch.contiguous_format, torch.channels_last):
            def planes(*size):
                return torch.randn(size, dtype=dtype).to(device).contiguous(memory_format=form)

            B, C, H, W = shape
            y, y_dot = planes(*shape), planes(*shape)
            gamma, beta, gamma_dot, beta_dot = (torch.randn(C, dtype=dtype).to(device) for _ in range(4))
            gamma[0] = beta[0] = 0  # every u of this channel is exactly 0, where ReLU has its kink
            z = y.clone(memory_format=torch.preserve_format)
            z[:, 0] = 0  # here too, without a norm
            p_bar, p_bar_dot = planes(B, C, H // 2, W // 2), planes(B, C, H // 2, W // 2)
            mean, rstd, k1, k2 = reference.norm_relu_pool_dual(
                y, y_dot, gamma, beta, gamma_dot, beta_dot, 1e-5)[2:]
            for name, arguments in {
                "norm_relu_pool": (y, gamma, beta, 1e-5),
                "norm_relu_pool_backward": (y, mean, rstd, gamma, beta, p_bar),
                "norm_relu_pool_dual": (y, y_dot, gamma, beta, gamma_dot, beta_dot, 1e-5),
                "norm_relu_pool_dual_backward":
                    (y, y_dot, mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot, p_bar, p_bar_dot),
                "bias_relu_pool": (z, beta),
                "bias_relu_pool_backward": (z, beta, p_bar),
                "bias_relu_pool_dual": (z, y_dot, beta, beta_dot),
                "bias_relu_pool_dual_backward": (z, beta, p_bar, p_bar_dot),
            }.items():
                found, expected = (getattr(twin, name)(*arguments) for twin in (triton, reference))
                if name == "bias_relu_pool":
                    found, expected = (found,), (expected,)
                assert len(found) == len(expected)
                for place, (ours, wanted) in enumerate(zip(found, expected)):
                    error = float((ours - wanted).norm() / wanted.norm().clamp_min(1e-3))
                    assert error <= tolerance, (name, place, shape, str(dtype), str(form), error)
                    assert ours.dim() < 4 or ours.is_contiguous(memory_format=form), (name, place, shape)
try:
    triton.norm_relu_pool(planes(2, 4, 6, 8)[:, :, ::2], gamma[:1], beta[:1], 1e-5)
except ValueError as error:
    print("refused:", error)
"""


def compare(shapes: list[tuple[int, int, int, int]], device: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", COMPARISON, repr(shapes), device]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | environment, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_takes_what_the_definition_takes() -> None:
    """The dispatch hands both the same arguments."""
    from mtt_fast.kernels import reference, triton

    shared = [name for name in triton.__all__ if hasattr(reference, name)]
    assert len(shared) >= 13
    for name in shared:
        twins = (inspect.signature(getattr(module, name)).parameters for module in (triton, reference))
        assert list(next(twins)) == list(next(twins)), name


def test_equals_the_definition_interpreted() -> None:
    """In a process of its own: whether Triton interprets is decided when a kernel is defined."""
    assert "refused: expected contiguous or channels_last" in compare(SHAPES, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_equals_the_definition_on_a_gpu() -> None:
    large = [(7, 128, 32, 32), (5, 128, 16, 16), (3, 100, 8, 8), (2, 128, 128, 128), (2, 63, 31, 33)]
    compare([*SHAPES, *large], "cuda")
