"""Repeat work in smaller pieces when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

import mtt_fast.kernels as kernels
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.runtime.memory_info import is_out_of_memory

log = logging.getLogger(__name__)


Result = TypeVar("Result")


def with_smaller_pieces(plan: Plan, attempt: Callable[[Plan], Result]) -> tuple[Result, Plan]:
    """Return the result of `attempt(plan)`, and the plan with which `attempt` succeeded.

    When memory runs out, the next smaller plan is tried, with a line in the log. `attempt` must be repeatable: it must not
    change anything before its last allocation. Raises `InputError` if there is no smaller plan.
    """
    while True:
        try:
            return attempt(plan), plan
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # outside the except clause, since the traceback keeps the allocated tensors alive
        smaller = plan.smaller()
        kernels.release_memory()
        if plan.work.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory; repeated exactly, in less. %s", smaller)
        plan = smaller
