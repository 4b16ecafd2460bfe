"""squared_distance: the native twin against the definition, and both against exact arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import native, reference, squared_distance

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
needs_native = pytest.mark.skipif(not native.available, reason="the native kernels are not installed or turned off")
TWINS = [pytest.param(native.squared_distance, id="native", marks=needs_native), reference.squared_distance]

Twin = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(params=["native", "reference"])
def either_twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the public function take one twin, then the other."""
    if request.param == "native" and not native.available:
        pytest.skip("the native kernels are not installed or turned off")
    monkeypatch.setattr(native, "available", request.param == "native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def vectors(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, generator=generator, dtype=torch.float64)
    b = a + torch.randn(size, generator=generator, dtype=torch.float64) / 8
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        15,  # less than the lanes of one vector loop
        16,
        1003,
        (1 << 15) - 1,  # around one block
        (1 << 15) + 1,
        1_200_007,  # more than one thread's share
    ],
)
@pytest.mark.usefixtures("either_twin")
def test_agrees_with_float64(size: int, dtype: torch.dtype) -> None:
    a, b = vectors(size, dtype)
    result = squared_distance(a, b)
    assert result.shape == ()
    assert result.dtype == torch.float64
    expected = (a.double() - b.double()).square().sum()
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("twin", TWINS)
@given(
    pairs=st.lists(
        st.tuples(*[st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60, allow_subnormal=False)] * 2),
        max_size=100,
    )
)
def test_is_exact_to_rounding(twin: Twin, pairs: list[tuple[float, float]]) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float32) for side in (0, 1))
    exact = sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in pairs), Fraction(0))
    assert abs(Fraction(twin(a, b).item()) - exact) <= exact * (len(pairs) + 4) * Fraction(2) ** -52


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_does_not_depend_on_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    a, b = vectors(3_000_001, dtype)
    results = set()
    for count in (1, 2, 3, 7):
        threads(count)
        results.add(squared_distance(a, b).item())
    assert len(results) == 1


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 40, 99])
def test_does_not_hide_what_is_not_finite(twin: Twin, value: float, position: int) -> None:
    a, b = vectors(100, torch.float32)
    a[position] = value
    assert not torch.isfinite(twin(a, b))


@pytest.mark.usefixtures("either_twin")
def test_reads_views_and_memory_maps(tmp_path: Path) -> None:
    a, b = vectors(5000, torch.float32)
    torch.stack([a, b]).numpy().tofile(tmp_path / "vectors")
    mapped = torch.from_file(str(tmp_path / "vectors"), size=10000)
    expected = (a[7:].double() - b[7:].double()).square().sum()  # 7: not at the start of an allocation
    torch.testing.assert_close(squared_distance(mapped[7:5000], mapped[5007:]), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.zeros(3), torch.zeros(4), "one size"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "vectors"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16), "float16"),
        (torch.zeros(6)[::2], torch.zeros(3), "contiguous"),
        (torch.zeros(3), torch.zeros(3, device="meta"), "one device"),
        (torch.zeros(3), torch.zeros(3, requires_grad=True), "requires grad"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("either_twin")
def test_refuses(a: Tensor, b: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^squared_distance: .*{reason}"):
        squared_distance(a, b)


@pytest.mark.gpu
def test_on_a_gpu_agrees_with_the_cpu() -> None:
    a, b = vectors(100_003, torch.float32)
    result = squared_distance(a.cuda(), b.cuda())
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), squared_distance(a, b), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", str(kernels.native_available()))])
def test_the_environment_turns_the_native_twin_off(value: str, expected: str) -> None:
    code = (
        "import torch, mtt_fast.kernels as k;"
        "print(k.native_available(), k.squared_distance(torch.ones(3), torch.zeros(3)).item())"
    )
    environment = os.environ | {"MTT_FAST_NATIVE": value}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [expected, "3.0"]
