"""Test the values of options: ranges, types and choices on command lines and in files, spellings, and the public code's arguments."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro

from mtt_fast import InputError, SyntheticDataset, evaluate
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.baselines.command import parse_method_options
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_checks import check_effects, check_values
from mtt_fast.commands.option_fields import (
    HARMLESS,
    MAY_BE_EMPTY,
    Needs,
    Range,
    Role,
    fields_of,
    names_of,
    outside_result,
)
from mtt_fast.commands.options import Count, PositiveShare, Share, TrueOrFalse
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts import command as experts
from mtt_fast.recipes import recipe_names, recipe_options
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.text_files import read_toml
from tests.commands.test_flags import COMMANDS

KINDS = {name: kind for name, kind in COMMANDS.items() if name != "score"}  # whose numbers it checks together
COUNT, SHARE, POSITIVE_SHARE = (typing.get_args(alias)[1] for alias in (Count, Share, PositiveShare))
MEANT_INFINITE = {"threshold", "save_seconds"}
"""Options for which inf has a meaning."""


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types that an option takes, those in a union and in a tuple too."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return set().union(*map(kinds_of, typing.get_args(annotation)))
    return {annotation}


def options_taking(kind: type) -> list[tuple[str, str]]:
    """Return commands with their options of a type; of options that are declared alike in several commands, the first."""
    taking: dict[tuple[Any, ...], tuple[str, str]] = {}
    for command, options in KINDS.items():
        for option, field in fields_of(options).items():
            if kind in kinds_of(field.annotation):
                declared = (option, field.default, str(field.annotation), tuple(map(repr, field.declared)))
                taking.setdefault(declared, (command, option))
    return list(taking.values())


def refused(name: str, *words: str) -> str:
    with pytest.raises(InputError) as raised:
        parsing.preview(KINDS[name], words, name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ------------------------------------------------------------------ ranges


@pytest.mark.parametrize(("command", "option"), options_taking(float))
def test_every_number_is_finite_and_in_range(command: str, option: str) -> None:
    kind, flag = KINDS[command], f"--{option}"
    assert "expected a finite number" in refused(command, flag, "nan")
    assert "expected" in refused(command, flag, "-inf")
    assert "expected" in refused(command, f"{flag}=-0.01")
    assert "expected" in refused(command, flag, "1e300")
    if option in MEANT_INFINITE:
        assert getattr(parsing.preview(kind, [flag, "inf"], ""), option) == math.inf
    else:
        assert "expected a finite number" in refused(command, flag, "inf")
    with pytest.raises(InputError, match=f"{flag} nan: expected a finite number"):
        check_values(dataclasses.replace(kind(), **{option: math.nan}))


@pytest.mark.parametrize(("command", "option"), options_taking(int))
def test_every_whole_number_is_in_range(command: str, option: str) -> None:
    flag = f"--{option}"
    assert "expected at least" in refused(command, flag, "-1")
    assert "expected at most" in refused(command, flag, str(10**30))
    for sign in ("", "-", "+"):
        assert "expected a number of fewer digits" in refused(command, f"{flag}={sign}{'9' * 5000}")
    assert "expected a whole number" in refused(command, flag, "1.5")
    from_zero = {
        "seed",
        "Iteration",
        "epoch_eval_train",
        "min_start_epoch",
        "expansion_end_epoch",
        "epochs",
        "minwindow",
        "d",
    }
    from_zero |= {"add_end_epoch", "rm_epoch_first", "rm_epoch_second"}
    if option in from_zero:
        parsing.preview(KINDS[command], [flag, "1"], "")
    else:
        assert "expected at least" in refused(command, flag, "0")


@pytest.mark.parametrize(("command", "option"), options_taking(str))
def test_no_text_is_empty(command: str, option: str) -> None:
    field = fields_of(KINDS[command])[option]
    if field.default in ("", ()):  # what stands without a flag
        return
    flag = f"--{field.flag}"
    assert refused(command, flag, "").startswith(f"{flag} '': expected a text, found an empty one")
    assert refused(command, flag, "a\udcff").startswith(
        f"{flag} 'a\\udcff': expected a text of Unicode characters (UTF-8)"
    )


@pytest.mark.parametrize(
    ("given", "value", "problem"),
    [
        (COUNT, 1, None),
        (COUNT, 0, "expected at least 1"),
        (COUNT, 10**9, None),
        (COUNT, 10**9 + 1, "expected at most 1000000000"),
        (COUNT, 10**10, "expected at most 1000000000"),
        (POSITIVE_SHARE, 1.0, None),
        (POSITIVE_SHARE, 0.0, "expected more than 0 and at most 1"),
        (Range(0.25), 0.2, "expected at least 0.25"),
        (SHARE, 0.0, None),
        (SHARE, 1.0, "expected at least 0 and less than 1"),
        (SHARE, math.nan, "expected a finite number, at least 0 and less than 1"),
        (Range(0, exclude_low=True), 0.0, "expected more than 0"),
        (Range(0, exclude_low=True), 1e-300, "expected more than 0 in float32, which begins at 1.2e-38"),
        (Range(0, exclude_low=True), 1e39, "expected at most 3.4e+38, the largest number of float32"),
        (Range(), -1e39, "expected at most 3.4e+38, the largest number of float32"),
        (Range(-1, exclude_low=True), 1e-300, None),  # a number that may be 0 as well
        (Range(0, exclude_low=True, allow_infinity=True), math.inf, None),
        (Range(), -math.inf, "expected a finite number"),
    ],
)
def test_a_range_complains_of_values_outside_it(given: Range, value: float, problem: str | None) -> None:
    assert given.problem(value) == problem


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ema_decay 1", "--ema_decay 1.0: expected at least 0 and less than 1"),
        ("--student_mom 1.5", "--student_mom 1.5: expected at least 0 and less than 1"),
        ("--lr_teacher 0", "--lr_teacher 0.0: expected more than 0"),
        ("--num_interpolation 1", "--num_interpolation 1: expected at least 2"),
        ("--threshold 0", "--threshold 0.0: expected more than 0"),
        ("--memory_budget lots", "--memory_budget lots: expected a number of bytes"),
        (
            f"--memory_budget {'9' * 400}GiB",
            f"--memory_budget {'9' * 400}GiB: expected more than nothing, and less than",
        ),
        ("--memory_budget 0", "--memory_budget 0: expected more than nothing"),
        ("--dsa_strategy spin", "--dsa_strategy spin: expected operations among"),
        ("--eval_mode Z", "--eval_mode Z: expected one of S, SS"),
        ("--protocol kip", "--protocol kip: expected mtt, datm, ddranking"),
        ("--precision fp8", "--precision: expected one of 'auto', 'fp32'"),
        ("--seed -1", "--seed -1: expected at least 0"),
        ("--Iteration -1", "--Iteration -1: expected at least 0"),
        ("--num_eval 2000000", "--num_eval 2000000: expected at most 1000000"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused(words: str, message: str) -> None:
    assert refused("distill", *words.split()).startswith(message)


def test_no_iterations_are_an_evaluation_of_the_start() -> None:
    assert parse_options("--dataset digits --Iteration 0".split()).Iteration == 0


# ------------------------------------------------------------------ devices


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda:99", "cpu:1", "cuda:-1", "nonsense", "CUDA", "cuda:"])
@pytest.mark.parametrize(
    ("main", "words"),
    [
        (distill, "--dataset digits"),
        (experts.main, "--dataset digits"),
        (evaluate.main, "random --dataset digits"),
    ],
)
def test_a_device_that_is_missing_is_refused(
    device: str, main: Callable[..., None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(main, [*words.split(), "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --device {device}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("command", "option"), [pair for pair in options_taking(str) if pair[1] == "device"])
def test_a_device_is_checked_by_every_command(command: str, option: str) -> None:
    assert refused(command, "--device", "mps").startswith("--device mps: expected auto, cpu, cuda or cuda:N")


# ------------------------------------------------------------------ files


@dataclasses.dataclass(frozen=True)
class Everything:
    count: Count = 1
    whole: int = 0
    maybe: Count | None = None
    rate: float = 0.5
    maybe_rate: float | None = None
    limit: Annotated[float, Range(allow_infinity=True)] = 1.0
    switch: bool = False
    name: str = "a"
    maybe_name: str | None = None
    note: Annotated[str, MAY_BE_EMPTY] = "a"
    choice: typing.Literal["a", "b"] = "a"
    maybe_choice: typing.Literal["a", "b"] | None = None
    names: tuple[str, ...] = ()
    epochs: Annotated[tuple[int, ...] | None, Range(0)] = None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", True, "expected a whole number, found True"),
        ("count", 1.5, "expected a whole number, found 1.5"),
        ("count", "2", "expected a whole number, found '2'"),
        ("count", 0, "expected at least 1, found 0"),
        pytest.param("count", 10**5000, r"expected at most 1000000000, found \(a number of 5001 digits\)", id="huge"),
        pytest.param("count", -(10**5000), r"expected at least 1, found \(a number of 5001 digits\)", id="below"),
        ("count", [1], "expected a whole number, found 1"),
        ("count", None, "expected a whole number, found None"),
        ("whole", 2**63, "expected at most 9223372036854775807, found 9223372036854775808"),
        ("whole", -(2**63) - 1, "expected at least -9223372036854775808, found -9223372036854775809"),
        ("maybe", "a", "expected a whole number, found 'a'"),
        ("maybe", 2.0, "expected a whole number, found 2.0"),
        ("maybe", 0, "expected at least 1, found 0"),
        ("rate", True, "expected a number, found True"),
        ("rate", math.nan, "expected a finite number, found nan"),
        ("rate", math.inf, "expected a finite number, found inf"),
        ("rate", 10**390, "expected at most 3.4e.38, the largest number of float32"),
        ("rate", -(10**390), "expected at most 3.4e.38, the largest number of float32"),
        ("maybe_rate", "fast", "expected a number, found 'fast'"),
        ("limit", -math.inf, "expected a finite number, found -inf"),
        ("switch", 1, "expected true or false, found 1"),
        ("switch", "true", "expected true or false, found 'true'"),
        ("name", 3, "expected a text, found 3"),
        ("name", "", "expected a text, found an empty one"),
        ("name", "a\0", "expected a text without the character 0"),
        ("maybe_name", False, "expected a text, found False"),
        ("choice", "zz", "expected one of 'a', 'b', found 'zz'"),
        ("choice", 1, "expected one of 'a', 'b', found 1"),
        ("maybe_choice", "zz", "expected one of 'a', 'b', found 'zz'"),
        ("names", "a", "expected a list, found 'a'"),
        ("names", [1], "expected a text, found 1"),
        ("epochs", [1, -1], "expected at least 0, found 1 -1"),
        pytest.param("epochs", [-(10**5000)], r"expected at least 0, found \(a number of 5001 digits\)", id="huge one"),
        ("epochs", [], "expected at least one value"),
        ("epochs", [1.0], "expected a whole number"),
        ("name", {"a": 1}, "expected a text"),
    ],
)
def test_a_file_is_checked_as_strictly_as_flags(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^mine.toml: option {name}: {message}"):
        parsing.apply(Everything(), {name: value}, "mine.toml")


def test_what_a_file_may_say_in_another_type() -> None:
    values = {"rate": 2, "limit": math.inf, "epochs": [0, 3], "names": ["x"], "whole": -(2**63), "note": ""}
    options = parsing.apply(Everything(), values, "mine.toml")
    assert (options.rate, type(options.rate), options.limit, options.whole) == (2.0, float, math.inf, -(2**63))
    assert (options.epochs, options.names, options.note) == ((0, 3), ("x",), "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'pix_init = "zz"',
            "option pix_init: expected one of 'real', 'noise', 'samples_predicted_correctly', 'window', found 'zz'",
        ),
        ("ipc = true", "option ipc: expected a whole number, found True"),
        ("ipc = 1.5", "option ipc: expected a whole number, found 1.5"),
        ('batch_syn = "a"', "option batch_syn: expected a whole number, found 'a'"),
        ('precision = "fp8"', "option precision: expected one of 'auto', 'fp32', 'tf32', 'fp16', 'bf16', found 'fp8'"),
        ("lr_teacher = nan", "option lr_teacher: expected a finite number, more than 0, found nan"),
        ("lr_img = inf", "option lr_img: expected a finite number, at least 0, found inf"),
        ("lr_y = -1", "option lr_y: expected at least 0, found -1"),
        ("seed = 9223372036854775808", "option seed: expected at most 9223372036854775807"),
        ('device = "mps"', "option device: expected auto, cpu, cuda or cuda:N"),
        ('memory_budget = "much"', "option memory_budget: expected a number of bytes"),
        ("model = 1979-05-27", "option model: expected a text"),
        ("canvas_size = 3", None),
        ("mine = 1", "unknown option 'mine'"),
        ("resume = 1", "option resume: expected true or false, found 1"),
    ],
)
def test_wrong_values_in_the_files_of_a_distillation_are_refused(
    line: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tmp_path / "mine.toml", tmp_path / "run"
    config.write_text(f"{line}\n")
    run.mkdir()
    (run / "config.toml").write_text(f'dataset = "digits"\n{line}\n')
    for words, file in ((["--config", str(config)], config), (["--out", str(run), "--resume"], run / "config.toml")):
        if message is None and file != config:
            continue  # what a run was made with is its own affair
        assert cli.run(distill, words) == 2
        error = capsys.readouterr().err
        expected = "--canvas_size 3: has no effect without --texture" if message is None else f"{file}: {message}"
        damaged = f"{file}: damaged or changed by hand"  # its names are looked at first
        assert error.startswith((f"error: {expected}", *[f"error: {damaged}"] * (file != config)))
        assert error.count("\n") == 1
    if line == 'pix_init = "zz"':
        (run / "config.toml").write_text(f'method = "dm"\n{line}\n')
        with pytest.raises(InputError, match="option pix_init: expected one of 'real', 'noise', found 'zz'"):
            parse_method_options("dm", ["--out", str(run), "--resume"])


@pytest.mark.parametrize("text", ["a = 1" + "0" * 5000, "a = " + "[" * 5000, "a = 1\na = 2", "a = \x00", "\xff"])
def test_a_file_that_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"mine.toml: (not valid TOML|expected text in UTF-8)"):
        read_toml(path)


def test_every_value_comes_back_from_a_run_folder(tmp_path: Path) -> None:
    options = {
        "threshold": math.inf, "low": -math.inf, "lr_lr": 1e-7, "lr_img": 1e22, "count": 2**63 - 1, "on": True, "names": ("a", 'b"'),
        "text": "é 😀 \\ \" ' \n \t \x7f \x01 \x85", "empty": "", "nothing": None,
    }  # fmt: skip
    write_config(tmp_path, options, "gradient: exact")
    config = read_config(tmp_path)
    assert config == {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value is not None
    }
    write_config(tmp_path, {"a": math.nan})
    assert math.isnan((read_config(tmp_path) or {})["a"])


def test_a_file_cannot_resume(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("resume = true\n")
    with pytest.raises(InputError, match="option resume: has no effect in a file; leave it out, and give --resume"):
        parse_options(["--config", str(tmp_path / "mine.toml")])


def test_an_infinite_threshold_goes_on(tmp_path: Path) -> None:
    options = parse_options(["--dataset", "digits", "--threshold", "inf", "--save_seconds", "inf"])
    write_config(tmp_path, dataclasses.asdict(options))
    again = parse_options(["--out", str(tmp_path), "--resume"])
    assert dataclasses.replace(again, out=None, resume=False) == options


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_nothing_without_effect(name: str, tmp_path: Path) -> None:
    values = recipe_options(name)
    in_file = {option for option, value in values.items() if value != getattr(DistillOptions(), option)}
    parsing.parse(DistillOptions, [], "", values, source=name, in_file=in_file)


def test_a_set_whose_record_is_broken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load("digits", data_path=tmp_path / "data", progress=False)
    for recipe, message in (
        ({"num_eval": "many"}, "a whole number, found 'many'"),
        ({"dsa": 1}, "true or false, found 1"),
    ):
        path = tmp_path / "synthetic.safetensors"
        SyntheticDataset(
            torch.randn(10, 1, 8, 8), torch.arange(10), torch.tensor(0.1), data.class_names, data.mean, data.std, recipe=recipe
        ).save(path)  # fmt: skip
        assert cli.run(evaluate.main, [str(path)]) == 2
        name = next(iter(recipe))
        assert capsys.readouterr().err == f"error: {path}: option {name}: expected {message}\n"


# ------------------------------------------------------------------ spellings


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


# ------------------------------------------------------------------ effects


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


# ------------------------------------------------------------------ roles


def test_what_options_decide() -> None:
    """Check the role that each option declares; a new option belongs in one of these lists on purpose, or decides the result."""
    assert names_of(DistillOptions, Role.LOCATION) == {
        "recipe", "config", "out", "resume", "dry_run", "download", "data_path", "packed_path", "buffer_path",
        "score_path",
    }  # fmt: skip
    assert names_of(DistillOptions, Role.MACHINE) == {
        "device", "networks_at_once", "memory_budget", "microbatch", "save_seconds",
    }  # fmt: skip
    evaluation = {"num_eval", "epoch_eval_train", "eval_mode", "protocol", "best_epoch"}
    assert names_of(DistillOptions, Role.EVALUATION) == evaluation | {"batch_train"}
    extent = {"Iteration", "eval_it", "num_experts", "max_experts", "train_epochs", "other_data"}
    assert names_of(DistillOptions, Role.EXTENT) == extent
    assert outside_result(DistillOptions) == set(fields_of(DistillOptions)) - names_of(DistillOptions, Role.RESULT)
    for method in METHODS.values():
        assert names_of(method.options, Role.EVALUATION) == evaluation  # its own networks take --batch_train as well
        assert outside_result(method.options) < outside_result(DistillOptions)


# ------------------------------------------------------------------ zero means zero


@pytest.mark.parametrize("rate", ["0", "-0.01", "nan", "inf"])
@pytest.mark.parametrize("command", ["evaluate", "cross"])
def test_a_rate_that_trains_nothing_is_refused(command: str, rate: str) -> None:
    assert refused(command, "random", "--dataset", "digits", "--lr_teacher", rate).startswith("--lr_teacher ")
