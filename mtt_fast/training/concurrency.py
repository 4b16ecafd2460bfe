"""Train several networks at the same time if one alone does not fill the device."""

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
from torch import Tensor

from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.engine.students.protocol import Student
from mtt_fast.networks.protocol import Network, Trainable
from mtt_fast.runtime.memory_info import AUTO, MARGIN, free_bytes, parse_bytes

Result = TypeVar("Result")
Job = Generator[None, None, Result]
"""A training as a generator: it yields after each piece of work, and returns the training's result, on the host."""

Context = Callable[[], contextlib.AbstractContextManager[object]]
"""The context in which the pieces of one job run, such as a CUDA stream."""

# The work of a step is measured by the bytes that autograd saves. Below this limit a CPU is faster with one thread for each
# of several networks than with all threads for one network. Measured on two busy cores: 1.4 times as fast for ConvNet at 32×32 and
# width 128 on 10 images (15 MiB), and no difference for digits at width 32, where Python takes most of the time.
_SMALL_STEP = 48 * 2**20  # bytes
# A GPU counts as full with this many saved values for each of its resident threads. This is an estimate, not measured on a device.
_VALUES_PER_THREAD = 150
_VECTORS = 12  # parameters and velocity before, within and after a captured step; SAM's gradients with their parts


class Concurrency(NamedTuple):
    """The number of jobs at the same time, and on a CPU the number of threads of each job."""

    at_once: int
    threads: int


def concurrency_for(
    network: Trainable,
    student: Student,
    image_shape: torch.Size,
    device: torch.device,
    *,
    batch: int,
    num_jobs: int,
    at_once: int | None = None,
    memory_budget: str = AUTO,
) -> Concurrency:
    """Return how many of `num_jobs` trainings of `network` to run at the same time, and with how many threads each.

    `batch` is the number of images (C, H, W) in a step. On a CPU, one job per thread runs if a step is small, else one job. On a
    GPU, as many jobs run as fill the device and fit in `memory_budget`, where "auto" is most of the free memory. `at_once`
    overrides this number. The number of threads depends only on the step, so results do not depend on the number of jobs.
    """
    work = batch * saved_bytes_of_an_image(network, image_shape, device)
    threads = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu_threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
        memory = int(MARGIN * free_bytes(device)) if memory_budget == AUTO else parse_bytes(memory_budget)
        step = student.step_bytes(batch, image_shape, torch.float32, device).gradient
        step += _VECTORS * network.num_parameters * torch.float32.itemsize
        most = steps_that_fill(work, gpu_threads, step, memory)
    else:
        most, threads = (threads, 1) if work <= _SMALL_STEP else (1, threads)
    return Concurrency(max(1, min(at_once or most, num_jobs)), threads)


def saved_bytes_of_an_image(network: Trainable, image_shape: torch.Size, device: torch.device) -> int:
    """Return the bytes that autograd saves for each image (C, H, W) in a forward pass of `network`, float32, at least 1.

    A few images are computed on `device`, since the meta device, where nothing is computed, imports torch's compiler, in seconds.
    """
    generator = torch.Generator().manual_seed(0)
    theta = network.init(generator).to(device)
    images = torch.rand(3, *image_shape, generator=generator).to(device)
    two, three = (_saved_bytes(network, theta, images[:count]) for count in (2, 3))
    return max(1, three - two)


def _saved_bytes(network: Network, theta: Tensor, images: Tensor) -> int:
    counted = CountLiveBytes()  # not by hooks on saved tensors, which torch.func refuses
    with torch.enable_grad(), counted:
        outputs = network(theta.detach().requires_grad_(), images)
        saved = counted.live  # by the graph of the outputs
    del outputs
    return saved


def steps_that_fill(work: int, gpu_threads: int, step: int, memory: int) -> int:
    """Return the number of steps that fill a GPU of `gpu_threads` threads and fit in `memory` bytes.

    `work` is a step's work, measured in bytes that autograd saves; `step` is its memory in bytes.
    """
    return min(gpu_threads * _VALUES_PER_THREAD * 4 // work, memory // step)


def run_concurrently(
    jobs: Iterable[Job[Result]], concurrency: Concurrency, device: torch.device
) -> Iterator[tuple[int, Result]]:
    """Run `jobs`, `concurrency.at_once` at a time; yield (index of the job, result) when a job is done.

    The next job is taken from the iterable when one ends. On a CPU each job has its own thread. On CUDA one thread launches the
    pieces of all jobs in turn, on one stream per job, so pieces should not synchronise with the device. If a job raises an error,
    every other job runs one more piece, so that a finished training can return its result, before the error is raised. If the
    caller stops, all end after their current piece.
    """
    if device.type == "cuda":
        yield from round_robin(jobs, [_stream(device) for _ in range(concurrency.at_once)])
    elif concurrency.at_once == 1:
        with _threads(concurrency.threads):
            yield from round_robin(jobs, [contextlib.nullcontext])
    else:
        yield from _in_threads(jobs, concurrency)


def round_robin(jobs: Iterable[Job[Result]], contexts: Sequence[Context]) -> Iterator[tuple[int, Result]]:
    """Run one piece of each job in turn, as many jobs at a time as `contexts`; yield as `run_concurrently` does."""
    waiting = enumerate(jobs)
    running = deque((context, index, job) for context, (index, job) in zip(contexts, waiting, strict=False))
    try:
        while running:
            context, index, job = running[0]
            try:
                with context():
                    done = _advance(job)
            except Exception:
                running.popleft()
                yield from _results_of_last_pieces(running)
                raise
            running.rotate(-1)
            if done is not None:
                running.pop()
                running.extend((context, *following) for following in islice(waiting, 1))
                yield index, done[0]
    finally:
        for _, _, job in running:
            job.close()


def _results_of_last_pieces(running: Iterable[tuple[Context, int, Job[Result]]]) -> Iterator[tuple[int, Result]]:
    """Run one piece of each job after another one has failed; yield the results of those that end with it."""
    for context, index, job in running:
        done = None
        with contextlib.suppress(Exception), context():
            done = _advance(job)
        if done is not None:
            yield index, done[0]


def _advance(job: Job[Result]) -> tuple[Result] | None:
    """Run one piece of `job`; return the job's result, in a tuple, if that piece was the last, else None."""
    try:
        next(job)
    except StopIteration as end:
        return (end.value,)
    return None


def _stream(device: torch.device) -> Context:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which may still be copying the jobs' arguments
    return partial(torch.cuda.stream, stream)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch and the kernels to use `count` threads for the operations of this thread within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_threads(jobs: Iterable[Job[Result]], concurrency: Concurrency) -> Iterator[tuple[int, Result]]:
    failed, ended = threading.Event(), threading.Event()

    def run(job: Job[Result]) -> Result:
        torch.set_num_threads(concurrency.threads)
        while not ended.is_set():
            is_last = failed.is_set()
            if (done := _advance(job)) is not None:
                return done[0]
            if is_last:
                break
        job.close()
        raise CancelledError

    waiting = enumerate(jobs)
    running: dict[Future[Result], int] = {}
    error: BaseException | None = None
    # reset torch's number of threads afterwards, which threads that start later inherit
    with (
        _threads(torch.get_num_threads()),
        ThreadPoolExecutor(concurrency.at_once, thread_name_prefix="network") as pool,
    ):
        try:
            while True:
                if error is None:
                    for index, job in islice(waiting, concurrency.at_once - len(running)):
                        running[pool.submit(run, job)] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    if future.exception() is None:
                        yield index, future.result()
                    else:
                        error = error or future.exception()
                        failed.set()
        finally:
            ended.set()
    if error is not None:
        raise error
