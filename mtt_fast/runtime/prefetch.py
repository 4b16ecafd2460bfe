"""Prepare items in a thread before they are needed, and copy tensors on a separate stream, so that the device does not wait."""

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

    An exception of `make` is raised in place of its item. Close the generator (`contextlib.closing`) to stop early: then the
    current item is finished and dropped, and the thread ends.
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


def run_now(work: Callable[[], Item]) -> Callable[[], Item]:
    """Call `work` now, and return a function that returns its result or raises its exception."""
    result: Future[Item] = Future()
    try:
        result.set_result(work())
    except Exception as error:
        result.set_exception(error)
    return result.result


def run_now_on_gpu(device: torch.device, work: Callable[[], Item]) -> Callable[[], Item]:
    """Return a function that returns the result of `work()`, or raises its exception.

    On CUDA `work` is called now, so that its kernels are launched early; on a CPU it is called when the result is needed.
    """
    return run_now(work) if device.type == "cuda" else work


def sender(device: torch.device) -> Callable[[tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Return a function `send` that starts to copy CPU tensors to `device`, and returns a function `received`.

    `send` may be called in any thread; on CUDA it copies from pinned memory on a separate stream, and does not wait. `received`
    returns the copies, after making the caller's stream wait for them. On a CPU it returns the tensors themselves.
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
                copy.record_stream(current)  # their memory was allocated on the other stream
            return copies

        return received

    return send


def download(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy tensors of one device to the host, and return a function that returns the copies.

    On CUDA that function waits only for the copies, not for later work on the stream. Tensors on a CPU are returned themselves, so
    they must not be changed before.
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
    """Return `tensor` on `device`. From the host to CUDA the copy is asynchronous, on the current stream."""
    to_cuda = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if to_cuda else tensor.to(device)
