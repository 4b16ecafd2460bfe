"""Check the spellings of an option's value, and what is said of options without effect."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import tyro

from mtt_fast import InputError
from mtt_fast.commands import parsing
from mtt_fast.commands.option_checks import check_effects
from mtt_fast.commands.option_fields import (
    HARMLESS,
    Needs,
)
from mtt_fast.commands.options import TrueOrFalse


@dataclasses.dataclass(frozen=True)
class Spelled:
    lr_img: float = 1.0
    zca: bool = False
    no_aug: bool = False
    dsa: TrueOrFalse = True
    models: tuple[str, ...] = ()
    maybe: int | None = 3
    place: tyro.conf.Positional[str] = ""


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--lr-img 3", {"lr_img": 3.0}),
        ("--maybe None None", {"maybe": None, "place": "None"}),
        ("--lr_img=3", {"lr_img": 3.0}),
        ("--lr-img=3 --lr_img 4", {"lr_img": 4.0}),
        ("--zca", {"zca": True}),
        ("--zca True", {"zca": True}),
        ("--zca=true", {"zca": True}),
        ("--zca=1", {"zca": True}),
        ("--zca False", {}),
        ("--zca --no_zca", {}),
        ("--no-zca --zca", {"zca": True}),
        ("--no_aug", {"no_aug": True}),
        ("--no_aug True", {"no_aug": True}),
        ("--no-aug=False", {}),
        ("--dsa False", {"dsa": False}),
        ("--dsa=false", {"dsa": False}),
        ("--no_dsa", {"dsa": False}),
        ("--dsa", {}),
        ("--dsa False --dsa True", {}),
        ("--models a b --zca", {"models": ("a", "b"), "zca": True}),
        ("--models a --models b", {"models": ("b",)}),
        ("here --lr_img -3", {"lr_img": -3.0, "place": "here"}),
        ("--lr_img -.5", {"lr_img": -0.5}),
        ("--zca yes", {"zca": True, "place": "yes"}),
        ("--no_dsa True", {"dsa": False, "place": "True"}),
        ("--models a -- --here", {"models": ("a",), "place": "--here"}),
    ],
)
def test_one_value_may_be_spelt_in_several_ways(words: str, changed: dict[str, Any]) -> None:
    assert parsing.parse(Spelled, words.split(), "x") == Spelled(**changed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--zca x maybe", "maybe: expected an option, which begins with --"),
        ("--zca=maybe", "--zca=maybe: expected True or False"),
        ("--lr_im 3", "--lr_im: unknown option (did you mean --lr_img?)"),
        ("--_zca", "--_zca: unknown option"),
        ("--place x", "--place: unknown option"),
        ("-zca", "-zca: unknown option (did you mean --zca?)"),
        ("--lr_img", "--lr_img: expected a value after it"),
        ("--lr_img -x", "-x: unknown option"),
        ("--models a here there -- x y", "y: expected an option"),
        ("--no_lr_img 3", "--no_lr_img: unknown option"),
        ("--models", "--models: expected a value after it"),
    ],
)
def test_misspelt_values_are_refused(words: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parsing.parse(Spelled, words.split(), "x")
    assert str(raised.value).startswith(message)


def test_what_is_given_is_known_whatever_its_value() -> None:
    words = "--lr-img=1.0 --no_zca --dsa True x --what 3".split()
    assert parsing.preview(Spelled, ["--zca", "True", "x"], "").place == "x"
    assert parsing.given(Spelled, words) == {"lr_img", "zca", "dsa"}


@dataclasses.dataclass(frozen=True)
class Dependent:
    size: int | None = None
    count: Annotated[int, Needs("size", " or --large")] = 1
    fast: Annotated[bool, Needs("size")] = False
    speed: Annotated[int, Needs("size"), HARMLESS] = 1


@pytest.mark.parametrize(
    ("given", "reasons", "message"),
    [
        ({"count": 2}, {}, "--count 2: has no effect without --size or --large; give that too, or leave it out"),
        ({"fast": True}, {}, "--fast: has no effect without --size; give that too, or leave it out"),
        ({"count": 2}, {"count": "on Sundays"}, "--count 2: has no effect on Sundays; leave it out"),
    ],
)
def test_an_option_without_effect_is_refused_with_the_reason(
    given: dict[str, Any], reasons: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        check_effects(Dependent(**given), given, reasons)


def test_an_option_that_changes_no_result_is_named_where_it_has_no_effect() -> None:
    assert check_effects(Dependent(speed=2), {"speed"}) == ["--speed 2 has no effect without --size"]
    assert check_effects(Dependent(size=1, speed=2), {"size", "speed"}) == []
