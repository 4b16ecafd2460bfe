"""Several networks trained at the same time, where one alone does not fill the device."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

from mtt_fast.engine.student import Student, live_bytes
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.memory_info import AUTO, MARGIN, free_bytes, parse_bytes

Result = TypeVar("Result")
Job = Generator[None, None, Result]
"""Some work in pieces: it yields after each, and returns its result, on the host."""

Lane = Callable[[], contextlib.AbstractContextManager[object]]
"""Where the pieces of one work run."""

# The work of a step is told by the bytes that autograd would hold in it.
# On a CPU, a step of fewer is done sooner by one thread for each of several networks than by all threads for one.
# Measured on two busy cores with ConvNet at 32×32, width 128: 10 images (47 MB) 1.4 times as fast; digits at width 32
# are done neither sooner nor later, since what takes long there is Python's own share.
_SMALL = 64 * 2**20
# On a GPU, so many numbers for each thread that the device holds fill it. An estimate: no device has confirmed it.
_NUMBERS_A_THREAD = 200
_VECTORS = 12  # parameters and velocity before, within and after a recorded step; SAM's gradients with their parts


class Concurrency(NamedTuple):
    """How many works run at the same time, and with how many threads each on a CPU."""

    at_once: int
    threads: int


def concurrency_for(
    network: Network,
    student: Student,
    image_shape: torch.Size,
    device: torch.device,
    *,
    batch: int,
    jobs: int,
    asked: int | None = None,
    memory_budget: str = AUTO,
) -> Concurrency:
    """Return how many of `jobs` trainings of `network` in steps of `batch` images (C, H, W) to run at the same time.

    `asked` overrides the formulas: on a CPU as many as there are threads, if a step is small, else one; on a GPU as
    many as fill it and fit in `memory_budget`, where "auto" is most of what is free. The number of threads of one training
    depends on the step alone, so its result does not depend on what runs beside it.
    Raises `InputError` if `asked` is less than 1.
    """
    if asked is not None and asked < 1:
        raise InputError(f"--networks_at_once {asked}: expected at least 1")
    job = live_bytes(network, batch, image_shape, torch.float32).gradient
    threads = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        held = properties.multi_processor_count * properties.max_threads_per_multi_processor
        memory = int(MARGIN * free_bytes(device)) if memory_budget == AUTO else parse_bytes(memory_budget)
        step = student.step_bytes(batch, image_shape, torch.float32, device).gradient
        step += _VECTORS * network.num_parameters * torch.float32.itemsize
        most = filling(job, held, step, memory)
    else:
        most, threads = (threads, 1) if job <= _SMALL else (1, threads)
    return Concurrency(max(1, min(asked or most, jobs)), threads)


def filling(job: int, held: int, step: int, memory: int) -> int:
    """Return how many steps fill a GPU that holds `held` threads.

    Each is as much work as `job` bytes are, and takes `step` bytes of the `memory` there is.
    """
    return min(held * _NUMBERS_A_THREAD * 4 // job, memory // step)


def run_concurrently(
    jobs: Iterable[Job[Result]], concurrency: Concurrency, device: torch.device
) -> Iterator[tuple[int, Result]]:
    """Run `jobs`, `concurrency.at_once` at a time; yield (place among the works, result) as each is done.

    Works are taken from the iterable as others end. On a CPU each runs in a thread; on CUDA one thread begins the
    pieces of all in turn, each work's on a stream of its own, so a piece should wait for nothing. When a work raises,
    or the caller stops, the others end after the piece under way.
    """
    if device.type == "cuda":
        yield from round_robin(jobs, [_stream(device) for _ in range(concurrency.at_once)])
    elif concurrency.at_once == 1:
        with _threads(concurrency.threads):
            yield from round_robin(jobs, [contextlib.nullcontext])
    else:
        yield from _in_threads(jobs, concurrency)


def result_of(job: Job[Result]) -> Result:
    """Run all pieces of `job` and return its result."""
    while (done := _advance(job)) is None:
        pass
    return done[0]


def round_robin(jobs: Iterable[Job[Result]], lanes: Sequence[Lane]) -> Iterator[tuple[int, Result]]:
    """Run a piece of one work after a piece of another, as many works at a time as there are `lanes`."""
    waiting = enumerate(jobs)
    running = deque((lane, place, job) for lane, (place, job) in zip(lanes, waiting, strict=False))
    try:
        while running:
            lane, place, job = running[0]
            with lane():
                done = _advance(job)
            running.rotate(-1)
            if done is not None:
                running.pop()
                running.extend((lane, *following) for following in islice(waiting, 1))
                yield place, done[0]
    finally:
        for _, _, job in running:
            job.close()


def _advance(job: Job[Result]) -> tuple[Result] | None:
    """Run one piece of `job`; return its result, in a tuple, if that was the last."""
    try:
        next(job)
    except StopIteration as end:
        return (end.value,)
    return None


def _stream(device: torch.device) -> Lane:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what the works begin with may still be on its way
    return partial(torch.cuda.stream, stream)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the block, torch and the kernels use `count` threads for the operations of this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_threads(jobs: Iterable[Job[Result]], concurrency: Concurrency) -> Iterator[tuple[int, Result]]:
    ended = threading.Event()

    def run(job: Job[Result]) -> Result:
        torch.set_num_threads(concurrency.threads)
        while not ended.is_set():
            if (done := _advance(job)) is not None:
                return done[0]
        job.close()
        raise CancelledError

    waiting = enumerate(jobs)
    running: dict[Future[Result], int] = {}
    # the number of threads is set back for those that begin later
    with (
        _threads(torch.get_num_threads()),
        ThreadPoolExecutor(concurrency.at_once, thread_name_prefix="network") as pool,
    ):
        try:
            while True:
                for place, job in islice(waiting, concurrency.at_once - len(running)):
                    running[pool.submit(run, job)] = place
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            ended.set()
