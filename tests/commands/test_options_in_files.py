"""Check that options in files are checked as strictly as flags, and come back as they were."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Annotated

import pytest
import torch

from mtt_fast import InputError, SyntheticDataset, evaluate
from mtt_fast.baselines.command import parse_method_options
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_fields import (
    MAY_BE_EMPTY,
    Range,
)
from mtt_fast.commands.options import Count
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.recipes import recipe_names, recipe_options
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.text_files import read_toml


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
        ("ipcc = 1", "unknown option 'ipcc' (did you mean ipc?)"),
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
