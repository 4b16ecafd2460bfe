"""Print the page of --help: a box for each group of options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Annotated, Any

from mtt_fast.commands.option_fields import Field, Group, Range, fields_of


def print_help(options: Any, prog: str) -> None:
    """Print the help of the command `prog` with the values of the dataclass `options` as the defaults."""
    import tyro  # here, since only the commands need it

    tyro.cli(
        _boxes(options),
        prog=prog,
        description=ast.get_docstring(_definition(type(options))),  # from the source, since python -OO leaves it out
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _boxes(options: Any) -> type:
    """Return a dataclass with the ungrouped options and one dataclass for each group, for which tyro draws a box each."""
    members: dict[Group, list[tuple[str, Any, Any]]] = {group: [] for group in Group}
    texts = help_texts(type(options))
    for name, field in fields_of(type(options)).items():
        members[field.group].append((name, _with_help(field, texts.get(name, "")), getattr(options, name)))
    ungrouped = members.pop(Group.OTHER)
    boxes = {
        group.value: dataclasses.make_dataclass(group.value, fields) for group, fields in members.items() if fields
    }
    return dataclasses.make_dataclass(
        "Options", [*ungrouped, *((name, box, dataclasses.field(default_factory=box)) for name, box in boxes.items())]
    )


def _with_help(field: Field, text: str) -> Any:
    """Return the type of an option with its declarations, its help text, and its range beside the default."""
    import tyro

    hint = "" if field.is_positional else None
    ranges = " and ".join(map(str, field.declarations(Range)))
    help_argument = tyro.conf.arg(
        help=text, help_behavior_hint=(lambda default: f"({ranges}; default: {default})") if ranges else hint
    )
    return Annotated[field.annotation, *field.declared, help_argument]


def help_texts(kind: type) -> dict[str, str]:
    """Return the text below each option in the source of the dataclass `kind` and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for line, following in pairwise(_definition(base).body):
            match line, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def _definition(kind: type) -> ast.ClassDef:
    """Return the syntax tree of the source of the class `kind`."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return definition
