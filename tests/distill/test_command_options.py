"""Test where a distillation's options come from, and that mistakes in them are told in one line, before any work."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import torch

from mtt_fast import InputError
from mtt_fast.baselines.options import BaselineOptions
from mtt_fast.commands import parsing
from mtt_fast.commands.earlier_run import check_same_run
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.checks import check_options_fit
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from tests.distill.command_runs import TOY, run


def test_options_come_from_the_recipe_then_the_file_then_the_flags(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("lr_img = 5\nsyn-steps = 7\n".replace("-", "_"))
    options = parse_options(["--recipe", "digits", "--config", str(config), "--syn-steps", "9"])
    assert (options.dataset, options.lr_img, options.syn_steps) == ("digits", 5, 9)
    config.write_text('recipe = "quick-digits-datm"\nlr_y = 3\n')
    named = parse_options(["--config", str(config)])
    assert (named.recipe, named.lr_y, named.label_init) == ("quick-digits-datm", 3, "experts")
    public = parse_options(["--dataset", "CIFAR10"])  # the public code's defaults
    assert (public.recipe, public.syn_steps, public.lr_img, public.max_start_epoch) == (None, 20, 1000.0, 25)


def test_a_file_of_options_names_no_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    second.write_text("syn_steps = 7\n")
    for named in (second, first):  # itself, too
        first.write_text(f'config = "{named}"\n')
        message = f"^{first}: option config: expected no further file in a file of options, found '{named}'; write the options"
        with pytest.raises(InputError, match=message):
            parse_options(["--config", str(first)])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--device cpu",
        "--out elsewhere",
        "--out elsewhere --dry_run",
        "--ipc 2 --lr_img 7",
        "--config mine.toml",
        "--config out.toml",
        "--config mine.toml --out elsewhere --model ConvNetD1W4",
    ],
)
def test_without_a_data_set_it_is_the_digits_recipe(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    Path("mine.toml").write_text("syn_steps = 7\nnum_eval = 2\n")
    Path("out.toml").write_text('out = "elsewhere"\n')
    recipe = parse_options(["--recipe", "digits"])
    assert "the digits recipe" not in caplog.text
    options = parse_options(words.split())
    assert "without --dataset and --recipe: the digits recipe; the public code takes CIFAR10" in caplog.text
    given = {"device", "out", "dry_run", "ipc", "lr_img", "config", "model"} & parsing.given(
        DistillOptions, words.split()
    )
    given |= {"syn_steps", "num_eval"} if "mine.toml" in words else {"out"} if "out.toml" in words else set()
    assert options == dataclasses.replace(recipe, **{name: getattr(options, name) for name in given})
    assert options.recipe == "digits"


@pytest.mark.parametrize(
    "words", ["--dataset digits --out elsewhere", "--config mine.toml", "--config mine.toml --ipc 2"]
)
def test_with_a_data_set_it_is_no_recipe(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    Path("mine.toml").write_text('dataset = "digits"\n')
    options = parse_options(words.split())
    assert (options.recipe, options.dataset, options.syn_steps, options.lr_img) == (None, "digits", 20, 1000.0)
    assert "the digits recipe" not in caplog.text


@pytest.mark.parametrize("words", ["--out run --resume", "--config mine.toml --resume"])
def test_a_run_goes_on_with_its_own_options(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('out = "run"\n')
    Path("run").mkdir()
    Path("run/config.toml").write_text('dataset = "MNIST"\nsyn_steps = 3\n')
    options = parse_options(words.split())
    assert (options.recipe, options.dataset, options.syn_steps, options.lr_img) == (None, "MNIST", 3, 1000.0)
    assert (options.resume, options.folder()) == (True, Path("run"))


def test_what_is_to_be_resumed_is_named() -> None:
    with pytest.raises(
        InputError, match="--resume: expected the run's folder with --out, or its --recipe, found neither"
    ):
        parse_options("--dataset digits --resume".split())


MISTAKES = [
    pytest.param(["--recipe", "digit"], r"no such recipe \(did you mean digits\?\)", id="recipe"),
    pytest.param(["--syn_stepz", "3"], r"unknown option \(did you mean --syn_steps\?\)", id="flag"),
    pytest.param(["--Momentum_y", "0.9"], r"unknown option \(did you mean --mom_y\?\)", id="flag-of-DATM"),
    pytest.param(
        ["--lr-freq", "1e8"], r"--lr-freq: unknown option; here it is --lr_img; see --help", id="flag-of-FreD"
    ),
    pytest.param(
        ["--num_saet", "64"], r"--num_saet: unknown option; here it is --parametrisation_options", id="flag-of-SPEED"
    ),
    pytest.param(["--beta", "0.5"], r"--beta: unknown option; here it is --window_start", id="flag-of-SelMatch"),
    pytest.param(["--ITERATION", "3"], r"unknown option \(did you mean --Iteration\?\)", id="flag-in-capitals"),
    pytest.param(["--dataset", "CIFAR-10", "--dry-run"], r"did you mean CIFAR10\?", id="data-set-of-a-dry-run"),
    pytest.param(["--dataset", "CIFAR11"], r"CIFAR11", id="data-set"),
    pytest.param(["--data_path", "nowhere", "--dataset", "CIFAR10"], r"nowhere", id="no-data"),
    pytest.param(["--batch_syn", "11"], r"--batch_syn 11: expected at most the 10 synthetic images", id="batch"),
    pytest.param(["--max_start_epoch", "4"], r"--max_start_epoch.*epoch 4", id="beyond-the-experts"),
    pytest.param(["--model", "ConvNetD9"], r"depth 9", id="too-deep"),
    pytest.param(["--ipc", "5000"], r"ipc 5000: class 0 has only", id="too-many"),
    pytest.param(["--Iteration", "-1"], r"--Iteration -1: expected at least 0", id="negative"),
    pytest.param(["--lr_teacher", "0"], r"--lr_teacher 0.0: expected more than 0", id="rate"),
    pytest.param(["--memory_budget", "much"], r"--memory_budget much: expected a number of bytes", id="budget-text"),
    pytest.param(
        ["--memory_budget", "1KiB"],
        r"--memory_budget 1KiB: expected at least .* or lower --batch_syn or --syn_steps",
        id="budget",
    ),
    pytest.param(["--dsa_strategy", "blur"], r"--dsa_strategy blur", id="augmentation"),
    pytest.param(["--networks_at_once", "0"], r"--networks_at_once 0: expected at least 1", id="networks-at-once"),
    pytest.param(["--device", "cuda:99"], r"--device cuda:99", id="device"),
    pytest.param(["--device", "toaster"], r"--device toaster", id="no-device"),
    pytest.param(["--config", "missing.toml"], r"missing.toml: cannot be read", id="config"),
    pytest.param(["--resume"], r"there is no run in", id="nothing-to-resume"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out), *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (out / "summary.json").exists()


WASTED = [
    (["--ipc", "200"], "--ipc 200: class 0 has only 143 of the 200 real images that are needed"),
    (["--ipc", "40", "--texture"], "--ipc 40, --canvas_size 2: class 0 has only 143 of the 160 real images"),
    (["--num_interpolation", "5"], "--num_interpolation 5: expected from 2 waypoints (the ends) to the 4 saved epochs"),
    (
        ["--max_start_epoch", "4"],
        "--max_start_epoch 4, --expert_epochs 1: segments reach epoch 4, and experts of --train_epochs 3 end",
    ),
    (["--max_start_epoch", "3", "--continuous_start"], "segments reach epoch 4, and experts of --train_epochs 3 end"),
    (["--batch_syn", "11"], "--batch_syn 11: expected at most the 10 synthetic images"),
    (
        ["--eval_mode", "M"],
        "VGG11: nothing is left of images (1, 8, 8); use larger images, or another --model, --models, --eval_mode or --cam_model",
    ),
]


@pytest.mark.parametrize(("flags", "message"), WASTED)
def test_no_expert_is_trained_for_a_run_that_cannot_be(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = [*TOY, *experts, *flags, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    if "--ipc" not in flags:  # how many images there are of a class is not known without them
        assert run(*arguments, "--dry_run") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_start_epoch 60", "segments reach epoch 62, and experts of --train_epochs 50 end before that"),
        ("--batch_syn 11", "--batch_syn 11: expected at most the 10 synthetic images"),
        ("--loss_ratio 1e-6", "--loss_ratio 1e-06: expected at least one parameter to leave out"),
        ("--depth_ratio 1e-6", "--depth_ratio 1e-06: expected at least one parameter to leave out"),
        (
            "--model ConvNetBN --teacher_label",
            "--model ConvNetBN, --teacher_label: expected a network without batch norm",
        ),
        ("--model ConvNetD9", "depth 9"),
    ],
)
def test_options_that_do_not_fit_are_told_before_images_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    places = ["--data_path", str(tmp_path), "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    assert run("--dataset", "CIFAR10", *places, *flags.split()) == 2
    assert message in capsys.readouterr().err


def test_the_largest_batch_and_all_frequencies_fit() -> None:
    info, options = dataset_info("digits"), DistillOptions(dataset="digits", ipc=2, batch_syn=20, msz_per_channel=64)
    network, cpu = options.network(info), torch.device("cpu")
    check_options_fit(options, info, network, cpu)
    for larger in (dataclasses.replace(options, batch_syn=21), dataclasses.replace(options, msz_per_channel=65)):
        with pytest.raises(InputError, match=r"^--(batch_syn 21|msz_per_channel 65): expected at most"):
            check_options_fit(larger, info, network, cpu)


def test_a_dry_run_refuses_what_the_run_would(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TOY, *experts, "--out", str(tmp_path / "run")]
    assert run(*flags) == 0
    for other, message in (
        (["--ema_decay", "0.9"], "holds a run without --ema_decay, not with --ema_decay 0.9; choose another --out"),
        (["--zca"], "holds a run without --zca, not with --zca"),
        (["--out", "new", "--rho_max", "0.1"], "trained with rho_max 0.0, not 0.1; choose another --buf"),
        (["--out", "new", "--max_start_epoch", "4"], "reach epoch 4, but the expert ends at epoch 3"),
        (
            ["--out", "new", "--max_start_epoch", "3", "--continuous_start"],
            "reach epoch 4, but the expert ends at epoch 3",
        ),
    ):
        assert run(*flags, *other, "--dry_run") == 2
        assert message in capsys.readouterr().err


def test_the_last_segment_may_end_with_the_expert(experts: list[str], tmp_path: Path) -> None:
    """Take the longest starts that the public code takes of the same experts: it draws them below --max_start_epoch."""
    flags = [*TOY, *experts, "--max_start_epoch", "3", "--min_start_epoch", "2", "--Iteration", "1", "--eval_it", "1"]
    assert run(*flags, "--out", str(tmp_path / "run")) == 0
    (step,) = (
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"step"' in line
    )
    assert step["start_epoch"] == 2


@pytest.mark.parametrize("dataset", ["../pets", ".", "../pets/", "train/.."])
def test_a_run_of_an_image_folder_has_its_name(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path / "pets")
    assert DistillOptions(dataset=dataset).folder() == Path("runs/pets-ipc1")
    assert BaselineOptions(dataset=dataset).folder("dm") == Path("runs/dm-pets-ipc1")
    check_same_run(Path("run"), {"dataset": dataset}, DistillOptions(dataset="/moved/pets"), ())


def test_an_option_without_effect_is_found_without_reading_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check it beside an unfinished copy of the data set, in the default folder, which is not the one that is used."""
    tmp_path.joinpath("data/CIFAR10/train/cat").mkdir(parents=True)
    tmp_path.joinpath("data/CIFAR10/test").mkdir()
    monkeypatch.chdir(tmp_path)
    reasons = DistillOptions(dataset="CIFAR10", data_path="elsewhere").without_effect()
    assert reasons["res"] == "on CIFAR10, whose images have 32 pixels a side"
