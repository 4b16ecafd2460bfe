"""Check that networks trained at the same time have the same results, signals and errors as one after another."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtt_fast import ConvNet, FlatModule
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.protocol import StepBytes
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.accuracy import accuracy
from mtt_fast.training.concurrency import (
    Concurrency,
    Job,
    concurrency_for,
    round_robin,
    run_concurrently,
    saved_bytes_of_an_image,
    steps_that_fill,
)
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.evaluation import evaluate, training_job
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.protocols import EvaluationProtocol
from tests.training.jobs import finished

CPU = torch.device("cpu")
NET = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("network")]


def counting(number: int, counted: list[int] | None = None) -> Job[int]:
    """Yield `number` times."""
    for _ in range(number):
        if counted is not None:
            counted.append(number)
        yield
    return 10 * number


def test_jobs_take_turns_in_their_contexts() -> None:
    counted: list[int] = []
    entered = []

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    jobs = (counting(number, counted) for number in (2, 1, 3, 1))
    results = list(round_robin(jobs, [lambda: context("a"), lambda: context("b")]))
    assert results == [(1, 10), (0, 20), (3, 10), (2, 30)]
    assert counted == [2, 1, 2, 3, 1, 3, 3]
    assert "".join(entered) == "ababababa" + "bb"  # the end of a work is met in its lane too


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_every_job_is_done_once(at_once: int) -> None:
    results = dict(run_concurrently((counting(number) for number in range(7)), Concurrency(at_once, 1), CPU))
    assert results == {number: 10 * number for number in range(7)}


def test_jobs_begin_when_others_end() -> None:
    begun = []

    def jobs() -> Iterator[Job[int]]:
        for number in range(6):
            begun.append(number)
            yield counting(3)

    results = run_concurrently(jobs(), Concurrency(2, 1), CPU)
    next(results)
    assert len(begun) == 2
    next(results)
    assert len(begun) <= 4
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_error_ends_the_other_jobs(at_once: int) -> None:
    begun, closed = threading.Event(), threading.Event()

    def endless() -> Job[int]:
        try:
            while True:
                begun.set()
                time.sleep(0.001)
                yield
        finally:
            closed.set()

    def failing() -> Job[int]:
        yield
        assert at_once == 1 or begun.wait(100)
        raise ValueError("work 1")

    jobs = [failing()] if at_once == 1 else [endless(), failing()]
    with pytest.raises(ValueError, match="work 1"):
        list(run_concurrently(jobs, Concurrency(at_once, 1), CPU))
    assert closed.is_set() == (at_once > 1)


def test_a_caller_that_stops_ends_the_other_jobs() -> None:
    """Check it for a second Ctrl-C, which must not wait for networks that take hours."""
    ended = []

    def long() -> Job[int]:
        for _ in range(10_000):
            time.sleep(0.001)
            yield
        ended.append(True)
        return 0

    results = run_concurrently([counting(0), long()], Concurrency(2, 1), CPU)
    assert next(results) == (0, 0)
    results.close()  # type: ignore[attr-defined]
    assert not ended


def test_results_that_are_there_come_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no expert is lost that was finished when another one was stopped."""
    monkeypatch.setattr("mtt_fast.training.concurrency.FIRST_COMPLETED", ALL_COMPLETED)  # as while an expert is written

    def failing() -> Job[int]:
        yield
        raise ValueError("work 0")

    found, jobs = list[int](), [failing(), *(counting(number) for number in range(1, 10))]
    with pytest.raises(ValueError, match="work 0"):
        found.extend(number for number, _ in run_concurrently(jobs, Concurrency(len(jobs), 1), CPU))
    assert sorted(found) == list(range(1, 10))


@pytest.mark.parametrize("in_threads", [False, True])
def test_a_job_that_has_only_to_return_its_result_comes_before_an_error(in_threads: bool) -> None:
    """Check it for an expert that is trained and not yet returned when another one is stopped."""
    trained, failed = threading.Event(), threading.Event()

    def last_piece() -> Job[int]:
        trained.set()
        assert not in_threads or failed.wait(100)
        time.sleep(0.1)  # in which the error arrives
        yield
        return 7

    def failing() -> Job[int]:
        assert trained.wait(100)
        failed.set()
        if trained.is_set():
            raise ValueError("work 2")
        yield
        return 0

    jobs, found = [counting(10), last_piece(), failing()], list[tuple[int, int]]()
    contexts = [contextlib.nullcontext] * 3
    results = run_concurrently(jobs, Concurrency(3, 1), CPU) if in_threads else round_robin(jobs, contexts)
    with pytest.raises(ValueError, match="work 2"):
        found.extend(results)
    assert (1, 7) in found


def test_a_second_error_hides_no_result() -> None:
    entered, found = list[str](), list[tuple[int, int]]()

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    def failing(number: int) -> Job[int]:
        yield from ()
        raise ValueError(f"work {number}")

    jobs = [failing(0), failing(1), counting(0)]
    with pytest.raises(ValueError, match="work 0"):
        found.extend(round_robin(jobs, [partial(context, name) for name in "abc"]))
    assert found == [(2, 0)]
    assert "".join(entered) == "abc"


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_job_has_its_number_of_threads(at_once: int) -> None:
    def threads() -> Job[int]:
        yield
        return torch.get_num_threads()

    torch.set_num_threads(2)
    assert [count for _, count in run_concurrently([threads() for _ in range(3)], Concurrency(at_once, 1), CPU)] == [
        1,
        1,
        1,
    ]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


def images(count: int = 12) -> Images:
    generator = torch.Generator().manual_seed(5)
    return Images(torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 3)


@pytest.mark.parametrize("at_once", [None, 2, 5])
def test_evaluations_do_not_depend_on_how_many_run(at_once: int | None) -> None:
    def values(at_once: int | None) -> tuple[float, ...]:
        protocol = EvaluationProtocol(epochs=4, batch_size=5)
        return evaluate(
            NET, lambda _: images(), images(300), 0.1, protocol, num_networks=5, seed=1, indices=(7,), at_once=at_once
        ).values

    assert len(set(values(1))) > 1
    assert values(at_once) == values(1)


def test_each_accuracy_is_of_the_network_of_its_number() -> None:
    protocol, test = EvaluationProtocol(epochs=4, batch_size=5), images(300)
    result = evaluate(NET, lambda _: images(), test, 0.1, protocol, num_networks=3, seed=1, indices=(7,), at_once=2)
    alone = []
    for number in range(3):
        generator = generator_for(1, "evaluation", 7, number)
        theta = finished(training_job(NET, NET.init(generator), images(), 0.1, protocol, generator))
        alone.append(accuracy(NET, theta, test))
    assert result.values == tuple(alone)
    assert len(set(alone)) > 1


def test_the_crops_of_canvases_count_as_images_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a step on canvases is given the memory and the threads of all its crops."""
    batches = []

    def record_batch(*_: object, batch: int, **__: object) -> Concurrency:
        batches.append(batch)
        return Concurrency(1, 1)

    monkeypatch.setattr("mtt_fast.training.evaluation.concurrency_for", record_batch)
    canvases = Images(torch.randn(4, 1, 12, 12), torch.arange(4) % 3, canvas=Canvas(2, samples=5))
    for batch_size in (3, 100):
        protocol = EvaluationProtocol(epochs=0, batch_size=batch_size)
        evaluate(NET, lambda _: canvases, images(), 0.1, protocol, num_networks=1, seed=1)
    assert batches == [3 * 5, 4 * 5]


def test_the_random_numbers_of_a_network_are_those_of_its_evaluation() -> None:
    seeds = set()

    def train(generator: torch.Generator) -> Images:
        seeds.add(generator.initial_seed())
        return images()

    protocol = EvaluationProtocol(epochs=0)
    evaluate(NET, train, images(), 0.1, protocol, num_networks=2, seed=5, indices=(7,))
    assert seeds == {generator_for(5, "evaluation", 7, network).initial_seed() for network in range(2)}


def test_a_stop_request_ends_all_jobs() -> None:
    stop = StopRequest()
    protocol = EvaluationProtocol(epochs=10**6)
    timer = threading.Timer(0.3, lambda: setattr(stop, "signum", 15))
    timer.start()
    with pytest.raises(Stopped, match="during an evaluation"):
        evaluate(NET, lambda _: images(), images(), 0.1, protocol, num_networks=4, seed=1, stop=stop, at_once=3)
    timer.join()


def test_as_many_jobs_run_as_fill_the_device() -> None:
    small, large = torch.Size((1, 6, 6)), torch.Size((3, 64, 64))

    def concurrency(net: ConvNet, shape: torch.Size, batch: int, jobs: int, at_once: int | None = None) -> Concurrency:
        return concurrency_for(net, student_for(net, CPU), shape, CPU, batch=batch, num_jobs=jobs, at_once=at_once)

    torch.set_num_threads(2)
    wide = ConvNet(3, 10, 64)
    assert concurrency(NET, small, 10, 5) == Concurrency(2, 1)
    assert concurrency(NET, small, 10, 1) == Concurrency(1, 1)
    assert concurrency(wide, large, 10, 5) == Concurrency(1, 2)
    # asked for or not, one of them computes with the same number of threads
    assert concurrency(NET, small, 10, 5, 1) == Concurrency(1, 1)
    assert concurrency(wide, large, 10, 5, 3) == Concurrency(3, 2)
    device_threads = 132 * 2048
    assert steps_that_fill(35_000_000, device_threads, step=10**8, memory=10**11) == 4
    assert steps_that_fill(35_000_000, device_threads, step=10**8, memory=2 * 10**8) == 2
    assert steps_that_fill(10**10, device_threads, step=10**8, memory=10**11) == 0


def test_as_many_jobs_run_as_a_gpu_has_threads_and_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, batch = torch.Size((1, 6, 6)), 10
    of_one = 1000 + 12 * NET.num_parameters * 4  # its step, and twelve vectors of parameters
    student: Any = SimpleNamespace(step_bytes=lambda *_: StepBytes(1000, *[10**9] * 5))
    gpu = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr("mtt_fast.training.concurrency.free_bytes", lambda _: 10 * of_one)
    monkeypatch.setattr("mtt_fast.training.concurrency.saved_bytes_of_an_image", lambda *_: 5000)

    def at_once(budget: str = "auto") -> int:
        device = torch.device("cuda")
        return concurrency_for(NET, student, shape, device, batch=batch, num_jobs=10**9, memory_budget=budget).at_once

    assert at_once() == 8  # most of the free memory
    assert at_once(f"{3 * of_one}") == 3
    assert at_once("1000 GB") == 132 * 2048 * 150 * 4 // (batch * 5000)


@pytest.mark.gpu
def test_results_on_a_gpu_do_not_depend_on_how_many_run() -> None:
    from mtt_fast.runtime.numerics import numerics

    device = torch.device("cuda")
    pixels, labels = images().pixels.to(device), images().labels.to(device)
    protocol = EvaluationProtocol(epochs=6, batch_size=5)

    def values(at_once: int | None) -> tuple[float, ...]:
        on_device = Images(pixels, labels)
        return evaluate(
            NET, lambda _: on_device, on_device, 0.1, protocol, num_networks=5, seed=1, at_once=at_once
        ).values

    with numerics(device, "tf32"):
        assert values(3) == values(1) == values(None)


@pytest.mark.gpu
def test_steps_replayed_on_a_gpu_are_those_of_a_cpu() -> None:
    from mtt_fast.runtime.numerics import numerics

    device, ends = torch.device("cuda"), []
    with numerics(device, "fp32"):
        for place in (CPU, device):
            seen = Images(images().pixels.to(place), images().labels.to(place))
            epoch = Epochs(student_for(NET, place), seen, Sgd(0.1, 0.9, 5e-4, batch_size=5), SiameseAugment())
            theta = NET.init(torch.Generator().manual_seed(0)).to(place)
            velocity, generator = torch.zeros_like(theta), torch.Generator().manual_seed(1)
            for _ in range(3):
                theta, velocity, _ = epoch(theta, velocity, generator)
            ends.append(theta.cpu())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)


class PartlyFrozen(torch.nn.Module):
    """Has frozen weights, which autograd saves once for all images, and a sigmoid, whose outputs it saves for two operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(36, 36, bias=False)
        self.frozen = torch.nn.Linear(36, 36, bias=False).requires_grad_(False)
        self.classify = torch.nn.Linear(36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.classify(self.frozen(self.first(images.flatten(1))).sigmoid().square())
        return outputs


class OfForces(torch.nn.Module):
    """Differentiates by its images with torch.func, which refuses hooks on saved tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.classify = torch.nn.Linear(36, 8), torch.nn.Linear(36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def energy(each: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self.energy(each).sin().sum()
            return total

        outputs: torch.Tensor = self.classify(torch.func.grad(energy)(images.flatten(1)))
        return outputs


def test_what_is_saved_of_an_image_is_counted_once() -> None:
    sigmoid_square_outputs = (36 + 36 + 3) * 4
    shape = torch.Size((1, 6, 6))
    assert saved_bytes_of_an_image(FlatModule(PartlyFrozen()), shape, CPU) == sigmoid_square_outputs
    assert saved_bytes_of_an_image(FlatModule(OfForces()), shape, CPU) > 36 * 4


def test_no_network_lives_longer_for_having_been_looked_at() -> None:
    network = FlatModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)))
    GenericStudent(network).live_bytes(4, torch.Size((1, 6, 6)), torch.float32)
    held = weakref.ref(network)
    del network
    gc.collect()
    assert held() is None
