"""Prepare items before they are needed, and copy results back after: threads and streams of their own, so that the device waits for none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index")
Item = TypeVar("Item")


def prefetched(make: Callable[[Index], Item], indices: Iterable[Index], depth: int = 2) -> Generator[Item, None, None]:
    """Yield `make(index)` for each index in turn, made by one thread up to `depth` items ahead of the one in use.

    An exception of `make` is raised in place of its item. Close the generator (`contextlib.closing`) to stop early: the
    current item is finished and dropped, no other is started, and the thread has ended.
    """
    ahead: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        try:
            for index in indices:
                ahead.append(thread.submit(make, index))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


def called(work: Callable[[], Item]) -> Callable[[], Item]:
    """Call `work` now, and return a function that returns its result, or raises its exception in its place."""
    result: Future[Item] = Future()
    try:
        result.set_result(work())
    except Exception as error:
        result.set_exception(error)
    return result.result


def started(device: torch.device, work: Callable[[], Item]) -> Callable[[], Item]:
    """Return a function that returns the result of `work()`, or raises its exception.

    On CUDA, where `work` gives the device its kernels, it is called now; on a CPU when the result is asked for.
    """
    return called(work) if device.type == "cuda" else work


def sender(device: torch.device) -> Callable[[tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Return a function that starts to copy CPU tensors to `device` and returns a second function, which returns the copies.

    The first function may be called in any thread; on CUDA it copies from pinned memory on a stream of its own and waits
    for nothing. The second makes the caller's stream wait for the copies. On a CPU it returns the tensors themselves.
    """
    if device.type != "cuda":
        return lambda tensors: lambda: tensors
    stream = torch.cuda.Stream(device)

    def send(tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        with torch.cuda.stream(stream):
            copies = tuple(upload(tensor, device) for tensor in tensors)
        sent = stream.record_event()

        def received() -> tuple[Tensor, ...]:
            current = torch.cuda.current_stream(device)
            current.wait_event(sent)
            for copy in copies:
                copy.record_stream(current)  # their memory was taken on the other stream
            return copies

        return received

    return send


def download(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy tensors of one device to the host, and return a function that returns the copies.

    On CUDA it waits for the copies alone, not for what the stream was given since. Tensors on a CPU are returned
    themselves, so they may not be written meanwhile.
    """
    if tensors[0].device.type != "cuda":
        return lambda: tensors
    copies = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    )
    copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def received() -> tuple[Tensor, ...]:
        copied.synchronize()
        return copies

    return received


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`. From the host to CUDA the copy only starts, on the current stream, and nothing waits."""
    to_cuda = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if to_cuda else tensor.to(device)
