"""Check that kernels are compiled ahead: several at a time, without a launch, and not again afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mtt_fast import ConvNet, InputError, SiameseAugment, plan
from mtt_fast.engine.draws import draw_steps
from mtt_fast.engine.iteration import planned_iteration
from mtt_fast.engine.students.choice import has_fused_kernels
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.kernels import dispatch
from mtt_fast.runtime.cuda_graphs import capturer

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

from mtt_fast.kernels.triton import classifier, flat, launch, norm_single_pass, warp  # noqa: E402 - imports Triton


class NoDriver:
    """A driver of a GPU that is not there: it knows for what to compile, and cannot launch."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the names of the kernels that are compiled in the test, in a process that believes to have a GPU."""
    names: list[str] = []
    monkeypatch.setattr(launch, "INTERPRETED", True)  # takes tensors on the CPU
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **_: names.append(src.name))
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver())
    forget()
    yield names
    forget()


def forget() -> None:
    """Have no kernel of these families compiled for anything."""
    for module in (classifier, flat, norm_single_pass, warp):
        for kernel in kernels_of(module).values():
            kernel.device_caches.clear()


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """Return the kernels of a family by name."""
    return {name: each for name, each in vars(module).items() if isinstance(each, triton.runtime.jit.JITFunction)}


def steps() -> None:
    """Launch two kernels, one of them twice, and two of another operation."""
    theta, gradient, lr = torch.randn(100), torch.randn(100), torch.tensor(0.1)
    for _ in range(2):
        flat.sgd_step(theta, gradient, lr, torch.empty(100), None, None, 0.0, 0.0)
    flat.squared_distance(theta, gradient)


def test_launches_compile_and_run_nothing(compiled: list[str]) -> None:
    launch.compile_ahead(steps)
    assert len(compiled) == len(set(compiled)) == 3
    launch.compile_ahead(steps)  # all are there
    assert len(compiled) == 3
    with pytest.raises(AttributeError, match="NoDriver"):  # a launch
        steps()
    assert len(compiled) == 3


def test_several_compile_at_a_time(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(3, timeout=100)  # breaks unless all three are under way at once
    places: list[int] = []

    def listen(**_: Any) -> None:
        places.append(both.wait())

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    launch.compile_ahead(steps)
    assert sorted(places) == [0, 1, 2]
    assert not both.broken


def test_backward_passes_stay_in_the_thread_that_compiles(compiled: list[str]) -> None:
    enabled: list[bool] = []
    launch.compile_ahead(lambda: enabled.append(torch._C._is_multithreading_enabled()))
    assert enabled == [False]
    assert torch._C._is_multithreading_enabled()


def test_no_garbage_is_collected_while_threads_parse(compiled: list[str]) -> None:
    """Before Python 3.11.8 a kernel now and then failed with "AST constructor recursion depth mismatch", and so did its launch."""
    enabled: list[bool] = []
    launch.compile_ahead(lambda: enabled.append(gc.isenabled()))
    assert enabled == [False]
    assert gc.isenabled()


def test_an_error_of_the_call_comes_out_and_later_launches_run_again(compiled: list[str]) -> None:
    def fail() -> None:
        steps()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        launch.compile_ahead(fail)
    assert not launch._COMPILES_ONLY.get()
    launch.compile_ahead(steps)
    assert len(compiled) == 3


@triton.jit
def _wrong(x, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.static_assert(BLOCK == 0)


def test_a_kernel_that_does_not_compile_fails_when_it_is_launched(compiled: list[str]) -> None:
    launch.compile_ahead(lambda: launch.launch(_wrong, 1, torch.ones(2), BLOCK=1))
    with pytest.raises((triton.CompilationError, AttributeError)):  # triton 3.6 finds that there is no compiled kernel
        launch.launch(_wrong, 1, torch.ones(2), BLOCK=1)


@pytest.mark.parametrize(("compiler", "reason"), [("false", "non-zero exit status"), ("no-compiler", "no-compiler")])
def test_a_missing_compiler_is_told_before_the_first_launch(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Take Triton's own driver for a GPU, which it compiles at its first use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", triton.runtime.driver.__class__())
    monkeypatch.setattr(triton.backends.backends["nvidia"].driver.__module__ + ".library_dirs", list)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(
        InputError, match=f"^cuda:0: Triton could not compile its driver .*{reason}.*; it needs a C compiler"
    ):
        has_fused_kernels(torch.device("cuda:0"))


@pytest.mark.gpu
def test_a_recording_compiles_its_kernels_ahead_on_a_gpu() -> None:
    device = torch.device("cuda")
    theta, gradient, lr = torch.randn(100, device=device), torch.randn(100, device=device), torch.tensor(0.1).to(device)
    out = torch.zeros(100, device=device)
    before: list[torch.Tensor] = []

    def step() -> tuple[torch.Tensor, ...]:
        before.append(out.clone())
        flat.sgd_step(theta, gradient, lr, out, None, None, 0.0, 0.0)
        return (out,)

    replay, (result,) = capturer(device, launch.compile_ahead)(step)
    replay()
    torch.testing.assert_close(result, theta - lr * gradient)
    assert torch.equal(before[1], torch.zeros_like(out))  # the first call ran no kernel


@pytest.mark.slow
def test_a_whole_iteration_compiles_ahead(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that what is compiled for both sweeps, with augmentation, suffices for a second call."""
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)  # a CPU's tensors go to Triton
    net, augment = ConvNet(in_channels=3, num_classes=3, image_size=8, width=16, depth=2), SiameseAugment("flip_scale")
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    planned = plan(net, images=images, steps=2, batch=2, device=images.device, augment=augment)
    assert isinstance(planned.work.student, FusedConvNetStudent)
    iteration = planned_iteration(planned, augment, (2, 2))
    generator = torch.Generator().manual_seed(0)
    start, target = net.init(generator), net.init(generator)
    draws = draw_steps(
        list(torch.arange(4).split(2)), images.shape[1:], images.dtype, augment.draw_parameters, generator
    )
    given = (start, target, images, labels, torch.tensor(0.1), *draws.tensors())
    launch.compile_ahead(lambda: iteration(*given))
    for module in (classifier, flat, norm_single_pass, warp):
        assert set(compiled) & kernels_of(module).keys(), module.__name__
    before = len(compiled)
    launch.compile_ahead(lambda: iteration(*given))
    assert len(compiled) == before


@pytest.mark.parametrize("value", ["Y", "2"])
def test_kernels_are_interpreted_where_triton_interprets_them(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    code = """
import triton
from mtt_fast.kernels import dispatch
assert dispatch._INTERPRETED == triton.knobs.runtime.interpret
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
