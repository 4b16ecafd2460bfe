"""From a command line to an options dataclass, and from an exception to one line and an exit status."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from mtt_fast.commands.option_fields import Field, fields_of
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.memory_info import is_out_of_memory

log = logging.getLogger("mtt_fast")


def _flags(kind: type) -> dict[str, Field]:
    """Return the options of `kind` by the names of their flags."""
    return {field.flag: field for field in fields_of(kind).values() if not field.is_positional}


def run(job: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 done; 2 a mistake in the input, a full disk or no memory, told in one line; 128 + signal stopped on request with
    everything saved, or because nobody reads what it prints.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("matplotlib", "PIL", "tensorboard"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    _keep_freed_memory()
    try:
        with logging_redirect_tqdm():
            job(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted; what was finished is saved", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at the end fail
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(
            f"error: {error.filename or 'a file'}: {error.strerror or error}; check the path and the free space",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; set a smaller --memory_budget (or --microbatch), which gives the same result",
            file=sys.stderr,
        )
        return 2
    return 0


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks: returning 50 MB activations to the system at every layer halves the speed."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
