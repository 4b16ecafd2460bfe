"""Leave out what Triton's interpreter does in vain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


@contextmanager
def quick() -> Iterator[None]:
    """Halve the interpreter's time within the block; results stay the same.

    Triton replaces the functions of its language at each launch, and at each call of a function in a kernel: here it does so
    once for each module of kernels. At each operation it makes a table of NumPy's types, where one look-up would do. It also
    repeats sums and products of integers in 64 bits to find an overflow, of which it tells nothing where its options lack `debug`.
    """
    from triton.runtime import interpreter

    builder, replace_language, numpy_type = (
        interpreter.interpreter_builder,
        interpreter._patch_lang,
        interpreter._get_np_dtype,
    )
    replaced: set[int] = set()
    types: dict[str, Any] = {}

    def replace_once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) not in replaced:
            replaced.add(id(function.__globals__))
            stack.callback(replace_language(function).restore)
        return SimpleNamespace(restore=lambda: None)  # which a launch calls at its end

    def known_type(dtype: Any) -> Any:
        if dtype.name not in types:
            types[dtype.name] = numpy_type(dtype)
        return types[dtype.name]

    with ExitStack() as stack:
        stack.enter_context(patch.object(interpreter, "_patch_lang", replace_once))
        stack.enter_context(patch.object(interpreter, "_get_np_dtype", known_type))
        options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
        stack.enter_context(patch.object(builder, "options", options))
        yield
