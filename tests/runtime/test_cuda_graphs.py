"""Test capturing and replaying on a CPU, with a capturer that only repeats; CUDA's own where there is a GPU."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mtt_fast.runtime.cuda_graphs import CapturedCall, GraphedFunction, graphed
from tests.runtime.repeating import Repeating, Run


def double(values: Tensor) -> tuple[Tensor, ...]:
    return (2 * values,)


def test_a_cpu_gets_the_function_itself() -> None:
    assert graphed(double, torch.device("cpu")) is double


def test_captured_once_for_each_set_of_shapes() -> None:
    capturer = Repeating()
    run = GraphedFunction(double, capturer)
    for values in (torch.ones(2), torch.ones(3), torch.zeros(2), torch.ones(3, dtype=torch.float64)):
        assert torch.equal(run(values)[0], 2 * values)
    assert (capturer.captured, capturer.graphed) == (3, 4)


def test_threads_do_not_take_each_others_inputs() -> None:
    def slowly(values: Tensor) -> tuple[Tensor, ...]:
        time.sleep(0.01)
        return double(values)

    run = GraphedFunction(slowly, Repeating())
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda number: run(torch.tensor(number))[0], range(12)))
    assert [int(result) for result in results] == [2 * number for number in range(12)]


@pytest.mark.parametrize("most", [8, 3])
def test_too_many_shapes_are_told_once_and_still_computed(most: int, caplog: pytest.LogCaptureFixture) -> None:
    capturer = Repeating()
    run = GraphedFunction(double, capturer, *([] if most == 8 else [most]))
    for size in range(1, 12):
        assert torch.equal(run(torch.ones(size))[0], torch.full((size,), 2.0))
    assert torch.equal(run(torch.ones(1))[0], torch.full((1,), 2.0))
    assert capturer.captured == most
    assert capturer.graphed == most + 1
    assert caplog.text.count(f"more than {most} sets of shapes") == 1


def test_what_cannot_be_captured_is_told_once_and_still_computed(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Run) -> CapturedCall:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # at its end

    run = GraphedFunction(double, refuse)
    for value in (1.0, 2.0):
        assert torch.equal(run(torch.tensor(value))[0], torch.tensor(2 * value))
    assert caplog.messages == [
        "not captured in a CUDA graph, so that it runs slower, with the same result: "
        "RuntimeError: CUDA error: operation not permitted when stream is capturing"
    ]


def test_a_mistake_of_the_function_is_not_hidden() -> None:
    def wrong(values: Tensor) -> tuple[Tensor, ...]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        GraphedFunction(wrong, Repeating())(torch.ones(1))


def test_out_of_memory_comes_out_and_holds_nothing() -> None:
    held: list[weakref.ref[Tensor]] = []

    def exhausted(run: Run) -> CapturedCall:
        large = torch.ones(10)
        held.append(weakref.ref(large))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory: 10 GiB")
        finally:
            raise RuntimeError("the capture was interrupted")  # what CUDA says when the block ends

    run = GraphedFunction(double, exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory: 10 GiB") as told:
        run(torch.ones(1))
    assert told.value.__context__ is None
    gc.collect()
    assert held[0]() is None
    assert run.problem is None


@pytest.mark.gpu
def test_replayed_on_a_gpu() -> None:
    device = torch.device("cuda")
    run = graphed(lambda a, b: (a @ b, (a * b).sum()), device)
    for size in (3, 64, 3):
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        product, total = run(a, b)
        assert torch.equal(product, a @ b)
        assert torch.equal(total, (a * b).sum())
    assert isinstance(run, GraphedFunction)
    assert run.problem is None


@pytest.mark.gpu
def test_what_waits_is_not_captured_and_the_device_still_works() -> None:
    device = torch.device("cuda")
    run = graphed(lambda a: (a * float(a.sum()),), device)
    before = torch.cuda.current_stream()
    for _ in range(2):
        assert torch.equal(run(torch.ones(3, device=device))[0], torch.full((3,), 3.0, device=device))
    assert isinstance(run, GraphedFunction)
    assert run.problem is not None
    assert torch.cuda.current_stream() == before
    again = graphed(lambda a: (a + 1,), device)
    assert torch.equal(again(torch.ones(3, device=device))[0], torch.full((3,), 2.0, device=device))


@pytest.mark.gpu
def test_a_call_that_does_not_fit_on_a_gpu() -> None:
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info()
    run = graphed(lambda a: (a.expand(free, -1).double() + 1,), device)
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(2, device=device))
    assert torch.equal(graphed(double, device)(torch.ones(2, device=device))[0], torch.full((2,), 2.0, device=device))
