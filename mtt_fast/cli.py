"""From a command line to an options dataclass, and from an exception to one line and an exit status."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import io
import logging
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from mtt_fast.errors import InputError
from mtt_fast.files import read_text
from mtt_fast.interrupts import Stopped
from mtt_fast.memory import is_out_of_memory

Options = TypeVar("Options")

log = logging.getLogger("mtt_fast")

RETIRED = {
    "load_all": "trajectories are memory-mapped; nothing is loaded whole",
    "max_files": "there is one file an expert; limit them with --max_experts",
    "save_interval": "every expert is saved as soon as it is trained",
    "force_save": "every evaluation is saved",
}
"""Flags of the public code that have no work left to do: accepted, named in the log, and ignored."""


def parse(kind: type[Options], argv: Sequence[str], prog: str, defaults: dict[str, Any] | None = None) -> Options:
    """Return an instance of the dataclass `kind` from `argv`; `defaults` replace its own.

    Names may be written with - or _. Raises `InputError` for an unknown flag or a default that `kind` does not have.
    """
    import tyro  # here, since only the commands need it

    kept = _without_retired(argv)
    try:
        with _one_line(prog):
            options, unknown = tyro.cli(
                kind,
                prog=prog,
                args=kept,
                default=apply(kind(), defaults or {}, "defaults"),
                return_unknown_args=True,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    if unknown:
        raise InputError(_unknown(unknown[0], [field.name for field in dataclasses.fields(kind)]))  # type: ignore[arg-type]
    return options


def _unknown(word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return (
            f"{word}: expected an option, which begins with --; those that only say yes, such as --zca, take no value"
        )
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    return f"{word}: unknown option{did_you_mean(name, names, '--')}; see --help"


@contextlib.contextmanager
def _one_line(prog: str) -> Iterator[None]:
    """Raise `InputError` with the words in the box that tyro draws about a value, and ends the process after."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as end:
        if not end.code:
            raise  # after --help
        _, *lines = (line.strip("│ ") for line in drawn.getvalue().splitlines())  # but for the title
        parts = [list(part) for is_rule, part in groupby(lines, lambda line: set(line) in _RULES) if not is_rule]
        words = " ".join(parts[0]).strip()
        for theirs, ours in _REWORDED.items():
            words = re.sub(theirs, ours, words)
        raise InputError(f"{words}; see {prog} --help") from end


_RULES = ({"─"}, {"-"})
"""What the lines consist of that part a box; the second where the terminal has only ASCII."""

_REWORDED = {
    r"^Error parsing ([^:]*):": r"\1:",
    r"invalid literal for int\(\) with base 10: (.*)$": r"expected a whole number, found \1",
    r"could not convert string to float: (.*)$": r"expected a number, found \1",
    r"no type matching .* Got errors: .*(expected a (?:whole )?number, found .*)$": r"\1",
    r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.$": r"\2: expected one of \3, found \1",
    r"^Missing value for argument '(.*)'\..*$": r"\1: expected a value after it, found none",
}
"""Expressions in what tyro says, and how this package says it."""


def parse_known(kind: type[Options], argv: Sequence[str], prog: str) -> Options:
    """Return an instance of the dataclass `kind` from those flags in `argv` that it has; ignore the others."""
    return parse_part(kind, [word for word in argv if word not in ("-h", "--help")], prog)[0]


def parse_part(kind: type[Options], argv: Sequence[str], prog: str) -> tuple[Options, list[str]]:
    """Return an instance of the dataclass `kind` from those flags in `argv` that it has, and the other words."""
    import tyro

    with _one_line(prog):
        options, others = tyro.cli(kind, prog=prog, args=list(argv), return_unknown_args=True, use_underscores=True)
    return options, list(others)


def integers(text: str, option: str, minimum: int = 1) -> list[int]:
    """Return the numbers in "1,10,100". Raises `InputError` naming `option` for anything else, or one below `minimum`."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers as in 1,10,100") from error
    if min(found) < minimum:
        raise InputError(f"{option} {text}: expected numbers of at least {minimum}")
    return found


def apply(options: Options, values: dict[str, Any], source: str) -> Options:
    """Return `options` with `values` from `source` (a file's name). Raises `InputError` for unknown names or wrong types."""
    known = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{source}: unknown option '{name}'{did_you_mean(name, list(known))}")
        if (
            known[name] is not None
            and not isinstance(value, type(known[name]))
            and not (isinstance(known[name], float) and isinstance(value, int))
        ):
            raise InputError(f"{source}: option {name}: expected {type(known[name]).__name__}, found {value!r}")
    return dataclasses.replace(options, **values)  # type: ignore[type-var]


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return " (did you mean …?)" for the known name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1) or [other for other in known if name and other.startswith(name)]
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file. Raises `InputError` if it is missing or is not TOML."""
    return parse_toml(read_text(path), path)


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """Return the table in TOML text, which `path` held. Raises `InputError` if it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of the syntax, a number's digits, or the depth
        raise InputError(f"{path}: not valid TOML ({error})") from error


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


def _without_retired(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    dropping = False
    for word in argv:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--"):
            dropping = name in RETIRED
            if dropping:
                log.info("--%s is ignored: %s", name, RETIRED[name])
        if not dropping:
            kept.append(word)
    return kept


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks: returning 50 MB activations to the system at every layer halves the speed."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
