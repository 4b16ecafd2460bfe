"""Test the ranges of options, the devices, and the public code's arguments."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest

from mtt_fast import InputError, evaluate
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_checks import check_values
from mtt_fast.commands.option_fields import (
    Range,
    Role,
    fields_of,
    names_of,
    outside_result,
)
from mtt_fast.commands.options import Count, PositiveShare, Share
from mtt_fast.distill.command import main as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts import command as experts
from tests.commands.option_classes import COMMANDS

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


@pytest.mark.parametrize("rate", ["0", "-0.01", "nan", "inf"])
@pytest.mark.parametrize("command", ["evaluate", "cross"])
def test_a_rate_that_trains_nothing_is_refused(command: str, rate: str) -> None:
    assert refused(command, "random", "--dataset", "digits", "--lr_teacher", rate).startswith("--lr_teacher ")
