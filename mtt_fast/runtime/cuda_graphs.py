"""Record a function of tensors once in a CUDA graph and replay it: the host then starts one graph, not thousands of kernels.

On a CPU there is nothing to record, and `graphed` returns the function itself. Only `recorder` calls CUDA.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.runtime.memory_info import is_out_of_memory

log = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]
"""A pure function of tensors on one device, which reads no tensor's value on the host and draws no random number."""


class Recording(NamedTuple):
    """A recorded call: the function that repeats the call, and the tensors that hold the results afterwards."""

    replay: Callable[[], object]
    outputs: tuple[Tensor, ...]


Record = Callable[[Callable[[], tuple[Tensor, ...]]], Recording]
"""A function that records one call of a function without arguments."""

_MOST = 8  # recordings of one function, since each keeps its own inputs and outputs
_one_capture = threading.Lock()  # a capture begins with a wait for the whole device, which no other capture survives


FirstCall = Callable[[Callable[[], tuple[Tensor, ...]]], object]
"""Make the first of two calls that come before a recording; its results are not used."""


def _plainly(run: Callable[[], tuple[Tensor, ...]]) -> object:
    return run()


def graphed(function: Function, device: torch.device, first_call: FirstCall = _plainly) -> Function:
    """Return a function equal to `function` for tensors on `device`; on CUDA it replays a graph.

    `function` must depend on nothing but its arguments and constants. A call with new shapes or dtypes is recorded,
    after two other calls; `first_call` makes the first of them, and may compile kernels without running them. Results are new
    tensors.
    Raises `torch.OutOfMemoryError` if a recording does not fit on the device.
    """
    return GraphedFunction(function, recorder(device, first_call)) if device.type == "cuda" else function


class GraphedFunction:
    """A function with its recordings, one for each set of shapes and dtypes of its arguments.

    Where there are too many such sets, or a call cannot be recorded, the function itself is called, and the log says so.
    """

    def __init__(self, function: Function, record: Record) -> None:
        self._function = function
        self._record = record
        self._recordings: dict[tuple[object, ...], tuple[tuple[Tensor, ...], Recording]] = {}
        self._one_call = threading.Lock()  # at a time: another thread's inputs would take the place of this one's
        self.problem: str | None = None
        """the reason why calls are not recorded; None while they are"""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results for `inputs`."""
        with self._one_call:
            return self._called(*inputs)

    def _called(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kind not in self._recordings and self.problem is None:
            self._add(kind, inputs)
        if kind not in self._recordings:
            return self._function(*inputs)
        static_inputs, recording = self._recordings[kind]
        for static_input, tensor in zip(static_inputs, inputs, strict=True):
            static_input.copy_(tensor, non_blocking=True)
        recording.replay()
        return tuple(output.clone() for output in recording.outputs)  # the next replay writes over them

    def _add(self, kind: tuple[object, ...], inputs: tuple[Tensor, ...]) -> None:
        if len(self._recordings) == _MOST:
            self._give_up(f"more than {_MOST} sets of shapes")
            return
        static_inputs = tuple(tensor.detach().clone() for tensor in inputs)
        try:
            self._recordings[kind] = static_inputs, self._record(lambda: self._function(*static_inputs))
            return
        except RuntimeError as error:
            out_of_memory, cause = _out_of_memory(error), f"{type(error).__name__}: {error}".splitlines()[0]
        # after the except clause, where the error and the tensors of its frames are gone
        if out_of_memory:
            raise torch.OutOfMemoryError(out_of_memory)
        self._give_up(cause)

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        log.warning("not recorded in a CUDA graph, so that it runs slower, with the same result: %s", problem)


def recorder(device: torch.device, first_call: FirstCall = _plainly) -> Record:
    """Return a function that records calls in CUDA graphs on `device`, each after a `first_call` and a plain one.

    The graphs of one recorder share memory, so only one of them may run at a time, on one stream after another.
    """
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(run: Callable[[], tuple[Tensor, ...]]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _one_capture:
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):  # also brings the old stream back where a capture fails
                first_call(run)  # compiles kernels, chooses algorithms
                run()  # loads the kernels, and is like all later calls
                # thread_local: a thread that prefetches may meanwhile call CUDA freely
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
            before.wait_stream(stream)
        return Recording(graph.replay, outputs)

    return record


def _out_of_memory(error: BaseException | None) -> str | None:
    """Return the message of the out-of-memory error that caused `error`, or None; an interrupted capture hides the cause."""
    while error is not None:
        if is_out_of_memory(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
