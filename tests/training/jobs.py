"""Run a training to its end."""

from __future__ import annotations

from typing import TypeVar

from mtt_fast.training.concurrency import Job

Result = TypeVar("Result")


def finished(job: Job[Result]) -> Result:
    """Run all pieces of `job` and return its result."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            result: Result = end.value
            return result
