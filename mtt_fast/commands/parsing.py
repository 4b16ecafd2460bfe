"""Read the options of a command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, TypeVar

from mtt_fast.commands.help_page import print_help
from mtt_fast.commands.option_fields import (
    Field,
    InvalidValue,
    check_effects,
    check_values,
    converted,
    fields_of,
    in_words,
)
from mtt_fast.errors import InputError, did_you_mean

log = logging.getLogger(__name__)


Options = TypeVar("Options")

_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


def parse(
    kind: type[Options],
    argv: Sequence[str],
    prog: str,
    defaults: Options | Mapping[str, Any] | None = None,
    *,
    source: str = "defaults",
    in_file: Container[str] = (),
) -> Options:
    """Return an instance of the dataclass `kind` from `argv`.

    Names may be written with - or _, a switch as --zca, --zca True, --zca=True or --no_zca; of a flag that is given twice
    the last one counts. `defaults` replace those of the class: an instance, or values from `source` by name. `in_file` are
    the options that the user wrote in a file. An option in `argv` or `in_file` that has no effect is refused, or named in
    the log.
    Raises `InputError` for an unknown flag, for a value that an option does not take (mtt_fast/commands/option_fields.py), and for
    a default that `kind` does not have.
    """
    options = preview(kind, argv, prog, defaults, source=source)
    _check_effects(options, argv, in_file)
    return options


def preview(
    kind: type[Options],
    argv: Sequence[str],
    prog: str,
    defaults: Options | Mapping[str, Any] | None = None,
    *,
    source: str = "defaults",
) -> Options:
    """Return what `parse` returns, without a check that each option has an effect: for use before all defaults are known."""
    start = defaults if isinstance(defaults, kind) else apply(kind(), defaults or {}, source)  # type: ignore[arg-type]
    line = _read(kind, argv)
    if line.unknown:
        raise InputError(_unknown(line.unknown[0], list(_flags(kind))))
    options, unknown = _parsed(kind, line.words, prog, start)
    if unknown:
        raise InputError(_unknown(unknown[0], list(_flags(kind))))
    check_values(options)
    for name, field in fields_of(kind).items():
        if name in line.given and getattr(options, name) == ():
            raise InputError(f"--{field.flag}: expected a value after it, found none; see {prog} --help")
    return options


def _check_effects(options: Any, argv: Sequence[str], in_file: Container[str] = ()) -> None:
    """Log the remarks on the options that were given, or raise `InputError` for one that has no effect."""
    line, ignored = _read(type(options), argv), ignored_flags(type(options))
    given = {name for name in fields_of(type(options)) if name in line.given or name in in_file}
    remarks = [f"--{name} is ignored: {ignored[name]}" for name in sorted(line.ignored)]
    for remark in [*remarks, *check_effects(options, given)]:
        log.info("%s", remark)


def given(kind: type, argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options of the dataclass `kind` that `argv` gives, whatever their values."""
    return frozenset(_read(kind, argv).given)


def _parsed(kind: type[Options], words: Sequence[str], prog: str, start: Options) -> tuple[Options, list[str]]:
    """Return the options, and the words that belong to none of them."""
    import tyro  # here, since only the commands need it

    if _asks_for_help(words):
        print_help(start, prog)  # which ends the process
    try:
        with _one_line(prog):
            options, unknown = tyro.cli(
                kind,
                prog=prog,
                args=list(words),
                default=start,
                return_unknown_args=True,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return options, list(unknown)


def _asks_for_help(words: Sequence[str]) -> bool:
    """Return whether -h or --help is among the words, before a -- that ends the options."""
    return any(word in ("-h", "--help") for word in takewhile(lambda word: word != "--", words))


@dataclass
class _Line:
    """A command line, put into the one spelling that the parser takes."""

    words: list[str] = dataclasses.field(default_factory=list)
    given: set[str] = dataclasses.field(default_factory=set)
    """names of the options in it"""
    unknown: list[str] = dataclasses.field(default_factory=list)
    """flags that are no options, which are among `words` too"""
    ignored: set[str] = dataclasses.field(default_factory=set)
    """flags without an effect, which are not among `words`"""


def _read(kind: type, argv: Sequence[str]) -> _Line:
    """Return `argv` in the parser's spelling of the options of `kind`: underscores, switches as --x True, --x or --no_x.

    Raises `InputError` for a switch that is neither on nor off.
    """
    known = _flags(kind)
    line, left = _Line(), list(argv)
    while left:
        word = left.pop(0)
        if word == "--":
            line.words += [word, *left]
            break
        if not word.startswith("--"):
            line.words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        off = name.removeprefix("no_") if name not in known else name
        field = known.get(off)
        if field is None or (off != name and not field.is_switch):
            if name in ignored_flags(kind):
                line.ignored.add(name)
                while left and not left[0].startswith("--"):
                    left.pop(0)
                continue
            if name != "help" and not name.startswith("tyro_"):
                line.unknown.append(word)
            line.words.append(word)
            continue
        line.given.add(field.name)
        if not field.is_switch:
            line.words.append(f"--{name}{equals}{value}")
            continue
        if not equals and off == name and left and left[0].casefold() in (_YES[0], _NO[0]):
            equals, value = "=", left.pop(0)
        line.words += _switch(field, word, (value if equals else "true"), negated=off != name)
    return line


def _switch(field: Field, word: str, value: str, *, negated: bool) -> list[str]:
    if value.casefold() not in (*_YES, *_NO):
        raise InputError(f"{word}: expected True or False")
    on = (value.casefold() in _YES) != negated
    import tyro

    return (
        [f"--{field.flag}", str(on)]
        if tyro.conf.FlagConversionOff in field.declared
        else [f"--{field.flag}" if on else f"--no_{field.flag}"]
    )


def _flags(kind: type) -> dict[str, Field]:
    """Return the options of `kind` by their flags' names."""
    return {field.flag: field for field in fields_of(kind).values() if not field.is_positional}


def ignored_flags(kind: type) -> Mapping[str, str]:
    """Return by name the flags of the public code that do nothing in the command of `kind`, with the reasons."""
    ignored: Mapping[str, str] = getattr(kind, "IGNORED", {})
    return ignored


def _unknown(word: str, names: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"{in_words(word)}: expected an option, which begins with --"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    return f"{word}: unknown option{did_you_mean(name, names, '--')}; see --help"


@contextlib.contextmanager
def _one_line(prog: str) -> Iterator[None]:
    """Raise `InputError` with the text of the box that tyro prints about a value before it ends the process."""
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
"""Characters of the lines that divide a box; the second set is for terminals that have only ASCII."""

_REWORDED = {
    r"^.*?(--\w+).*Exceeds the limit \(\d+ digits\).*$": r"\1: expected a number of fewer digits",
    r"^Error parsing ([^:]*):": r"\1:",
    r"invalid literal for int\(\) with base 10: (.*)$": r"expected a whole number, found \1",
    r"could not convert string to float: (.*)$": r"expected a number, found \1",
    r"no type matching .* Got errors: .*(expected a (?:whole )?number, found .*)$": r"\1",
    r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.$": r"\2: expected one of \3, found \1",
    r"^(--\w+): no type matching .* could be instantiated from \[([^]]{0,60}).*$": r"\1: expected what --help tells, found \2",
    r"^Missing value for argument '(.*)'\..*$": r"\1: expected a value after it, found none",
}
"""Patterns in tyro's messages, and their replacements in this package's words."""


def parse_known(kind: type[Options], argv: Sequence[str], prog: str) -> Options:
    """Return an instance of the dataclass `kind` from its flags in `argv`; ignore the other flags."""
    words = [word for word in argv if word not in ("-h", "--help")]
    options, _ = _parsed(kind, _read(kind, words).words, prog, kind())
    check_values(options)
    return options


def parse_part(kind: type[Options], argv: Sequence[str], prog: str) -> tuple[Options, list[str]]:
    """Return an instance of the dataclass `kind` from its flags in `argv`, and the words that are not its own."""
    options, others = _parsed(kind, _read(kind, argv).words, prog, kind())
    check_values(options)
    _check_effects(options, argv)
    return options, others


def integers(text: str, option: str, minimum: int = 1) -> list[int]:
    """Return the numbers in "1,10,100". Raises `InputError` naming `option` for anything else, or one below `minimum`."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers as in 1,10,100") from error
    if min(numbers) < minimum:
        raise InputError(f"{option} {text}: expected numbers of at least {minimum}")
    return numbers


def apply(options: Options, values: Mapping[str, Any], source: str) -> Options:
    """Return `options` with `values` from `source` (a file's name).

    Raises `InputError` for a name that is not an option's, and for a value that the option's flag would not take.
    """
    fields = fields_of(type(options))
    changed = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{source}: unknown option '{name}'{did_you_mean(name, list(fields))}")
        try:
            changed[name] = converted(fields[name], value)
        except InvalidValue as error:
            raise InputError(
                f"{source}: option {name}: {error}, found {repr(value) if isinstance(value, str) else in_words(value)}"
            ) from error
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]
