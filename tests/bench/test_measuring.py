"""Test how times and memory are measured, and the processes in which they are."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from bench import measuring
from bench.cases import case_on, make_case
from bench.engines import fused, whole_graph
from bench.measuring import copy_peak, interleaved, matrix_product_peak, peak_above_baseline, repeated
from bench.shares import share_of_operations
from bench.workers import Here, Process, Subjects, Worker, WorkerError
from tests.bench.helpers import CPU, TINY, linux


def test_turns_alternate_and_a_failure_is_left_out() -> None:
    order, told = [], []

    def measure(name: str) -> float:
        order.append(name)
        if name == "b" and len(order) > 3:
            raise RuntimeError("no")
        return float(len(order) ** 2)

    times = interleaved(3, ["a", "b"], measure, lambda name, error: told.append((name, str(error))))
    assert order == ["a", "b", "a", "b", "a"]
    assert times == {"a": {"median": 9, "least": 1, "most": 25, "n": 3}}
    assert told == [("b", "no")]


def test_a_small_operation_is_called_several_times_in_a_measurement() -> None:
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3, CPU)()
    assert len(calls) == 3


def test_peaks_are_operations_and_bytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def in_two_seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
        copied.append(run().nbytes)
        return 2.0

    monkeypatch.setattr(measuring, "seconds", in_two_seconds)
    assert copy_peak(CPU, size=64) == 64  # read and written
    assert set(copied) == {64}
    monkeypatch.setattr(measuring, "seconds", lambda *_: 2.0)
    assert matrix_product_peak(CPU) == 2048**3  # a product and a sum each


@linux
def test_the_peak_is_what_was_allocated_meanwhile() -> None:
    def allocate() -> None:
        torch.ones(16 * 2**20).sum()  # 64 MiB, gone at the end

    peak = peak_above_baseline(allocate, CPU)
    assert 60 * 2**20 < peak["bytes"] < 80 * 2**20


@pytest.mark.native
def test_shares_of_an_iteration_add_up() -> None:
    case = case_on(make_case(TINY), torch.float32, CPU)
    shares = share_of_operations(lambda: fused(case), CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    assert share_of_operations(lambda: whole_graph(case), CPU) == {}


def build_number(number: int) -> list[int]:
    return [number]


def add_to(state: list[int], number: int) -> int:
    state[0] += number
    print("noise on stdout")
    return state[0]


def end(state: list[int]) -> None:
    os._exit(3)


@pytest.mark.parametrize("made", [Process, Here])
def test_a_worker_keeps_its_state_and_survives_a_failure(made: Callable[..., Worker]) -> None:
    with made(build_number, number=40) as worker:
        assert worker.ask(add_to, number=1) == 41
        with pytest.raises(WorkerError, match="TypeError: unsupported operand"):
            worker.ask(add_to, number="1")
        assert worker.ask(add_to, number=1) == 42


def test_a_subject_that_fails_keeps_its_row_and_ends_alone() -> None:
    with Subjects() as workers:
        for name, number in (("good", "1"), ("wrong", None)):
            with workers.row(name, number=number) as row:
                workers[name] = Here(build_number, number=number)
                row["sum"] = workers[name].ask(add_to, number="1") if number else workers[name].ask(add_to, number=1)
        assert list(workers) == ["good"]
        with pytest.raises(KeyError, match="a mistake of the benchmark"), workers.row("another"):
            raise KeyError("a mistake of the benchmark")
        workers.give_up("another", ValueError("it had no worker"))
    assert workers.rows["good"] == {"number": "1", "problem": None, "sum": "11"}
    assert workers.rows["wrong"]["problem"].startswith("TypeError")
    assert workers.rows["another"] == {"problem": "it had no worker"}
    with pytest.raises(WorkerError):  # it was closed, too
        workers["good"].ask(add_to, number="1")


def test_the_end_of_a_process_is_told() -> None:
    with Process(build_number, number=40) as worker, pytest.raises(WorkerError, match="status 3"):
        worker.ask(end)
