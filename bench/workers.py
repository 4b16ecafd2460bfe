"""Run worker processes: each holds one subject of a measurement, stays alive, and answers questions in its turn.

Each subject has a process of its own, since allocator settings, compiled code and peak memory belong to a process. The
process stays alive between turns, so that the repetitions of several subjects can alternate. Questions and answers are
lines of JSON: a question names a function and its arguments, and the function gets the worker's state first.
`python -m bench.workers` is the worker.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Environment variables with which glibc keeps freed memory, as in mtt_fast's commands; without them a worker runs like an ordinary script."""

_ROOT = Path(__file__).resolve().parents[1]
_SHARE_OF_FREE_MEMORY = 0.8  # for a worker, so that only the engine that takes more fails, not the whole machine


class WorkerError(Exception):
    """A failure in a worker; the message is one line."""


class Worker(ABC):
    """An object that holds the state that `build(**arguments)` returns, and answers questions about it."""

    @abstractmethod
    def ask(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Return the result of `function(state, **arguments)`. Raises `WorkerError` if the function fails."""

    @abstractmethod
    def close(self) -> None:
        """Forget the state."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Process(Worker):
    """A `Worker` in a process of its own."""

    def __init__(self, build: Callable[..., Any], *, tuned: bool = True, **arguments: Any) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | (TUNED if tuned else {}),
        )
        try:
            self.ask(build, **arguments)
        except WorkerError:
            self.close()
            raise

    def ask(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """See `Worker.ask`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {"function": f"{function.__module__}:{function.__qualname__}", "arguments": arguments}
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(
                f"the process ended with status {self._process.wait()} (−9: killed because memory ran out)"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """See `Worker.close`: the process ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Here(Worker):
    """A `Worker` in this process, which avoids starting another."""

    def __init__(self, build: Callable[..., Any], *, tuned: bool = True, **arguments: Any) -> None:
        self._state: Any = None
        self._state = self._answer(build, **arguments)

    def ask(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """See `Worker.ask`."""
        return self._answer(function, self._state, **arguments)

    def _answer(self, function: Callable[..., Any], *state: Any, **arguments: Any) -> Any:
        try:
            return function(*state, **arguments)
        except Exception as error:  # as in a worker
            raise WorkerError(f"{type(error).__name__}: {_first_line(error)}") from error

    def close(self) -> None:
        """See `Worker.close`."""
        self._state = None


class Subjects(dict[str, Worker]):
    """The workers of a benchmark's subjects by name, and the rows of all subjects, also of those that failed and have no worker."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def row(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the subject's new row. A `WorkerError` in the block is the row's problem."""
        self.rows[name] = fields | {"problem": None}
        try:
            yield self.rows[name]
        except WorkerError as error:
            self.give_up(name, error)

    def give_up(self, name: str, error: Exception) -> None:
        """Record `error` as the problem of a row, and end the row's worker if there is one."""
        self.rows[name]["problem"] = str(error)
        if name in self:
            self.pop(name).close()

    def __enter__(self) -> Subjects:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.values():
            worker.close()


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer questions until there are no more. The first builds the worker's state, an argument of the later ones."""
    state, built = None, False
    for line in questions:
        question = json.loads(line)
        try:
            function = named_function(question["function"])
            if built:
                result = function(state, **question["arguments"])
            else:
                state, built, result = function(**question["arguments"]), True, None
            answer = {"result": result}
        except Exception as error:  # an engine's failure goes in its row; the others continue
            answer = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def named_function(name: str) -> Any:
    """Return the object called `MODULE:NAME`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


@contextlib.contextmanager
def _answers_on_stdout() -> Iterator[TextIO]:
    """Redirect this process's prints to stderr, so that stdout has only the answers; yield the stream for answers."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def _limit_memory() -> None:
    """Limit this process's memory on Linux, so that an allocation fails before the machine is full."""
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="utf-8") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(_SHARE_OF_FREE_MEMORY * free),) * 2)


if __name__ == "__main__":
    _limit_memory()
    with _answers_on_stdout() as answers:
        serve(sys.stdin, answers)
