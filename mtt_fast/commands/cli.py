"""Run a command, and turn an exception into one line and an exit status."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from mtt_fast.errors import InputError, one_line, reason_of, remedy_for
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.memory_info import is_out_of_memory
from mtt_fast.runtime.numerics import torch_defaults

log = logging.getLogger("mtt_fast")


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done; 2: a mistake in the input, a full disk or too little memory, printed as one line; 128 + signal: stopped on request
    with everything saved, or because the reader of the output has closed it.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    _open_closed_streams()
    _escape_unencodable_output()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for verbose in ("matplotlib", "PIL", "tensorboard"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    _keep_freed_memory()
    try:
        with logging_redirect_tqdm(), torch_defaults():
            command(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
    except Stopped as stopped:
        print(one_line(str(stopped)), file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted; what was finished is saved", file=sys.stderr)
        return 130
    except InputError as error:
        return _print_error(with_flags(str(error)))
    except BrokenPipeError:  # the reader of the output, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _print_error(_describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _print_error(
            "out of memory; free some, or give a smaller --networks_at_once or, to a distillation, --memory_budget (or --microbatch): the "
            "result is the same up to rounding"
        )
    return 0


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that the caller has closed, as cron may.

    Otherwise the next file that a run opens gets the stream's number, and what libraries print goes into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the life of the process)


def _escape_unencodable_output() -> None:
    """Let the standard output write ± as \\xb1 if its encoding lacks it, as the standard error does, instead of raising an exception."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")


def _print_error(message: str) -> int:
    """Print `message` as the one line of an error, and return the exit status of a mistake in the input."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def with_flags(message: str) -> str:
    """Return a library's error message with the arguments that it names, such as `lr_teacher`, as flags: --lr_teacher."""
    return _ARGUMENT.sub(lambda match: f"--{_FLAGS.get(match[1], match[1])}", message)


_ARGUMENT = re.compile(r"(?<![^\s(])`([A-Za-z_]\w*)`(?=[:;,.)]*(?:\s|$))")
"""A name in backquotes that is a word by itself, not a part of a path."""
_FLAGS = {"strategy": "dsa_strategy", "batch": "batch_syn", "steps": "syn_steps"}
"""Flags of those arguments that have another name."""


def _describe_os_error(error: OSError) -> str:
    """Return the message for an `error`: the files, the reason, and how to fix it."""
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' -> '.join(files) or 'a file'}: {reason_of(error)}; {remedy_for(error)}"


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks: returning 50 MB activations to the system at every layer halves the speed."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
