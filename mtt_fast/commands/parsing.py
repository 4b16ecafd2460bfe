"""Read the options of a command line."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mtt_fast.commands.help_page import print_help
from mtt_fast.commands.option_checks import InvalidValue, check_effects, check_values, converted, from_texts, in_words
from mtt_fast.commands.option_fields import Field, fields_of
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
    """Parse as `parse` does, but do not check that each option has an effect: for use before all defaults are known."""
    start = defaults if isinstance(defaults, kind) else apply(kind(), defaults or {}, source)  # type: ignore[arg-type]
    line = _read(kind, argv)
    if line.unknown:
        raise InputError(_unknown(line.unknown[0], kind))
    if line.wants_help:
        print_help(start, prog)  # which ends the process
    if line.others:
        raise InputError(_unknown(line.others[0], kind))
    return _with_values(start, line, prog)


def _check_effects(options: Any, argv: Sequence[str], in_file: Container[str] = ()) -> None:
    """Log the remarks on the options that were given, or raise `InputError` for one that has no effect."""
    line, ignored = _read(type(options), argv), ignored_flags(type(options))
    given = {name for name in fields_of(type(options)) if name in line.given or name in in_file}
    remarks = [f"--{name} is ignored: {ignored[name]}" for name in sorted(line.ignored)]
    for remark in [*remarks, *check_effects(options, given)]:
        log.info("%s", remark)


def given(kind: type, argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options of the dataclass `kind` that `argv` gives, whatever their values."""
    return _read(kind, argv).given


@dataclass
class _Line:
    """A command line, sorted into the options that it gives and the other words."""

    switches: dict[str, bool] = dataclasses.field(default_factory=dict)
    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """the words of each other flag's value, by the option's name"""
    positional: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """the words of each positional option, by name"""
    unknown: list[str] = dataclasses.field(default_factory=list)
    """flags that are no options"""
    others: list[str] = dataclasses.field(default_factory=list)
    """all words that belong to no option, in their order"""
    ignored: set[str] = dataclasses.field(default_factory=set)
    """flags without an effect"""
    wants_help: bool = False

    @property
    def given(self) -> frozenset[str]:
        """Return the names of the options that have a flag in the line."""
        return frozenset({*self.switches, *self.texts})


def _read(kind: type, argv: Sequence[str]) -> _Line:
    """Return `argv` as values of the options of `kind`, not converted yet.

    Raises `InputError` for a switch that is neither on nor off.
    """
    known, line, words = _flags(kind), _Line(), list(argv)
    positional = [field for field in fields_of(kind).values() if field.is_positional]
    while words:
        word = words.pop(0)
        if word == "--":
            _add_words(line, positional, words)
            break
        if word in ("-h", "--help"):
            line.wants_help = True
            continue
        if not _is_flag(word):
            _add_words(line, positional, [word])
            continue
        name, equals, value = (word[2:] if word.startswith("--") else word).partition("=")
        name = name.replace("-", "_")
        off = name.removeprefix("no_") if name not in known else name
        field = known.get(off)
        if field is not None and field.is_switch:
            if not equals and off == name and words and words[0].casefold() in (_YES[0], _NO[0]):
                equals, value = "=", words.pop(0)
            line.switches[field.name] = _is_on(word, value if equals else "true") != (off != name)
        elif field is not None and off == name:
            line.texts[field.name] = [value] if equals else _values_in(words, None if field.is_list else 1)
        elif name in ignored_flags(kind):
            line.ignored.add(name)
            _values_in(words, None)
        else:
            line.unknown.append(word)
            line.others.append(word)
    return line


def _values_in(words: list[str], most: int | None) -> list[str]:
    """Remove from `words`, and return, those before the next flag: at most `most`, or all if None."""
    count = next((index for index, word in enumerate(words) if _is_flag(word)), len(words))
    count = count if most is None else min(most, count)
    values, words[:count] = words[:count], []
    return values


def _is_flag(word: str) -> bool:
    """Return whether a word is meant as a flag: it begins with a hyphen, and is not a negative number."""
    return re.match(r"-(?!\d|\.|inf|nan).", word, re.IGNORECASE) is not None


def _add_words(line: _Line, positional: Sequence[Field], words: Sequence[str]) -> None:
    """Give each of `words` to the first of the `positional` options that has room for it, or to the other words."""
    for word in words:
        free = (field for field in positional if field.is_list or field.name not in line.positional)
        field = next(free, None)
        if field is None:
            line.others.append(word)
        else:
            line.positional.setdefault(field.name, []).append(word)


def _is_on(word: str, value: str) -> bool:
    if value.casefold() not in (*_YES, *_NO):
        raise InputError(f"{word}: expected True or False")
    return value.casefold() in _YES


def _with_values(options: Options, line: _Line, prog: str) -> Options:
    """Return `options` with the values in `line`, each of its option's type and in its range."""
    values: dict[str, Any] = dict(line.switches)
    fields = fields_of(type(options))
    for name, texts in (line.texts | line.positional).items():
        try:
            values[name] = from_texts(fields[name].annotation, texts)
        except InvalidValue as error:
            raise InputError(f"{fields[name].name_in_messages}: {error}; see {prog} --help") from error
    changed: Options = dataclasses.replace(options, **values)  # type: ignore[type-var]
    check_values(changed)
    return changed


def _flags(kind: type) -> dict[str, Field]:
    """Return the options of `kind` by their flags' names."""
    return {field.flag: field for field in fields_of(kind).values() if not field.is_positional}


def ignored_flags(kind: type) -> Mapping[str, str]:
    """Return by name the flags of the public code that do nothing in the command of `kind`, with the reasons."""
    ignored: Mapping[str, str] = getattr(kind, "IGNORED", {})
    return ignored


def _unknown(word: str, kind: type) -> str:
    if not word.startswith("-"):
        return f"{in_words(word)}: expected an option, which begins with --"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    renamed: Mapping[str, str] = getattr(kind, "RENAMED", {})  # flags of other code, by their names there
    hint = f"; here it is --{renamed[name]}" if name in renamed else did_you_mean(name, list(_flags(kind)), "--")
    return f"{word}: unknown option{hint}; see --help"


def parse_known(kind: type[Options], argv: Sequence[str], prog: str) -> Options:
    """Return an instance of the dataclass `kind` from its flags in `argv`; ignore the other flags."""
    return _with_values(kind(), _read(kind, argv), prog)


def parse_part(kind: type[Options], argv: Sequence[str], prog: str) -> tuple[Options, list[str]]:
    """Return an instance of the dataclass `kind` from its flags in `argv`, and the words that are not its own."""
    line = _read(kind, argv)
    if line.wants_help:
        print_help(kind(), prog)  # which ends the process
    options = _with_values(kind(), line, prog)
    _check_effects(options, argv)
    return options, line.others


def integers(text: str, option: str) -> list[int]:
    """Return the numbers in "1,10,100". Raises `InputError` naming `option` for anything else, or one below 1."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers as in 1,10,100") from error
    if min(numbers) < 1:
        raise InputError(f"{option} {text}: expected numbers of at least 1")
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
